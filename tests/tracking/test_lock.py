"""A search locks its directory, whatever happens to its process."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys

import pytest

from accumtune.commands.searches import end_abandoned
from accumtune.errors import SearchDirectoryError
from accumtune.tracking.journal import Journal, read_search_journal
from accumtune.tracking.lock import LOCK_FILE, abandoned, held, only_search

HOLDER = """
import sys
from pathlib import Path
from accumtune.tracking.lock import only_search
with only_search(Path(sys.argv[1])):
    print("holds", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    Journal(tmp_path / "search.jsonl").append("search_started", search_id="0" * 32, name="held")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "holds\n"
    yield process
    process.kill()
    process.communicate()


def is_free(folder):
    with held(folder) as answer:
        return answer


def is_abandoned(folder):
    with abandoned(folder) as answer:
        return answer


def test_a_second_search_is_refused_as_long_as_the_first_one_lives(tmp_path, holder):
    with pytest.raises(SearchDirectoryError, match=f"process {holder.pid} on {socket.gethostname()}"):
        only_search(tmp_path).__enter__()
    assert not is_free(tmp_path)
    assert not is_abandoned(tmp_path)
    end_abandoned(tmp_path)
    assert read_search_journal(tmp_path).status == "running"


def test_a_search_that_ends_gives_its_directory_back(tmp_path, holder):
    holder.communicate("")
    assert is_free(tmp_path)
    assert not is_abandoned(tmp_path)
    with pytest.raises(RuntimeError), only_search(tmp_path):
        raise RuntimeError
    with only_search(tmp_path):
        pass


def test_a_search_that_was_killed_is_told_from_one_that_runs(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert is_abandoned(tmp_path)
    for _ in range(2):
        end_abandoned(tmp_path)
    events = [event["event"] for event in Journal(tmp_path / "search.jsonl").events()]
    assert events == ["search_started", "search_ended"], "said once"
    with only_search(tmp_path):
        pass


def test_of_a_search_on_another_machine_no_one_can_tell(tmp_path, holder):
    holder.kill()
    holder.wait()
    (tmp_path / LOCK_FILE).write_text(json.dumps({"pid": 1, "host": "another"}))
    assert not is_abandoned(tmp_path)
    (tmp_path / LOCK_FILE).write_text("[torn")
    assert not is_abandoned(tmp_path)


def test_where_nothing_was_searched_nothing_is_held(tmp_path):
    assert not is_abandoned(tmp_path) and not any(tmp_path.iterdir())


def test_a_lock_that_nfs_gives_only_for_writing_is_asked_for_so(tmp_path, holder, monkeypatch):
    """Linux makes a byte-range lock of `flock` on NFS: a file that is open for reading gets EBADF."""
    flock = fcntl.flock

    def flock_of_nfs(descriptor, operation):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_of_nfs)
    assert not is_free(tmp_path) and not is_abandoned(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_the_file_says_who_holds_it(tmp_path, holder, monkeypatch, number):
    def flock(descriptor, operation):
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert not is_free(tmp_path)
    holder.kill()
    holder.wait()
    assert is_free(tmp_path)
    (tmp_path / LOCK_FILE).write_text(json.dumps({"pid": 1, "host": "another"}))
    with pytest.raises(SearchDirectoryError, match="process 1 on another"):
        only_search(tmp_path).__enter__()


def test_an_error_of_the_disk_is_no_leave_to_take_it(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="broken"):
        only_search(tmp_path).__enter__()
