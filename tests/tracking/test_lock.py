"""A search holds its directory, whatever becomes of its process."""

import json
import socket
import subprocess
import sys

import pytest

from accumtune.commands.searches import end_abandoned
from accumtune.errors import SearchDirectoryError
from accumtune.tracking.journal import Journal, read_search_journal
from accumtune.tracking.lock import LOCK_FILE, abandoned, only_search, refuse_held

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


def is_abandoned(folder):
    with abandoned(folder) as answer:
        return answer


def test_a_second_search_is_refused_as_long_as_the_first_one_lives(tmp_path, holder):
    for attempt in (lambda: only_search(tmp_path).__enter__(), lambda: refuse_held(tmp_path)):
        with pytest.raises(SearchDirectoryError, match=f"process {holder.pid} on {socket.gethostname()}"):
            attempt()
    assert not is_abandoned(tmp_path)
    end_abandoned(tmp_path)
    assert read_search_journal(tmp_path).status == "running"


def test_a_search_that_ends_gives_its_directory_back(tmp_path, holder):
    holder.communicate("")
    refuse_held(tmp_path)
    assert not is_abandoned(tmp_path)
    with pytest.raises(RuntimeError), only_search(tmp_path):
        raise RuntimeError
    with only_search(tmp_path):
        pass


def test_a_search_that_was_killed_is_told_from_one_that_runs(tmp_path, holder):
    holder.kill()
    holder.wait()
    refuse_held(tmp_path)
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
    refuse_held(tmp_path)
    assert not is_abandoned(tmp_path) and not any(tmp_path.iterdir())
