"""Other people's files are read without trusting them; our own files are replaced atomically."""

import os
import stat
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accumtune.tracking.small_files import read_small, write_whole


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=50), most=st.integers(0, 40))
def test_no_more_is_read_than_tells_that_it_is_too_much(tmp_path, content, most):
    (tmp_path / "file").write_bytes(content)
    assert read_small(tmp_path / "file", most) == content[: most + 1]


def test_what_may_never_end_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(OSError, match="regular file|directory"):
            read_small(path, 10)


@pytest.fixture
def umask():
    before = os.umask(0o077)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o002, 0o027])
def test_a_new_file_has_what_the_umask_leaves_and_an_old_one_what_it_had(tmp_path, umask, mask):
    umask(mask)
    write_whole(tmp_path / "folder" / "file", "one")
    assert stat.S_IMODE((tmp_path / "folder" / "file").stat().st_mode) == 0o666 & ~mask
    os.chmod(tmp_path / "folder" / "file", 0o640)
    write_whole(tmp_path / "folder" / "file", "two")
    assert stat.S_IMODE((tmp_path / "folder" / "file").stat().st_mode) == 0o640
    assert (tmp_path / "folder" / "file").read_text() == "two"
    assert os.listdir(tmp_path / "folder") == ["file"]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_stays_a_link(tmp_path, is_there):
    if is_there:
        (tmp_path / "real").write_text("one")
    (tmp_path / "link").symlink_to("real")
    write_whole(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "two"


def test_a_device_is_written_into_and_not_replaced(tmp_path):
    """As root, /dev/null would be a file afterwards."""
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_whole(tmp_path / "pipe", "text")
    reader.join()
    assert read == ["text"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path):
    (tmp_path / "file").write_text("one")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "file", "\ud800")
    assert (tmp_path / "file").read_text() == "one" and os.listdir(tmp_path) == ["file"]
