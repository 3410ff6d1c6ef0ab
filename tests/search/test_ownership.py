"""A search deletes and replaces only files that it has written itself."""


import pytest
from made_tuner import make, search

from accumtune.errors import SearchDirectoryError
from accumtune.search import ownership
from accumtune.tracking.journal import Journal
from accumtune.tracking.lock import held


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp/a", "a\\b", " ", "a\0b", None, 3])
def test_a_project_name_is_the_name_of_a_folder(tmp_path, name):
    with pytest.raises(SearchDirectoryError, match="project_name"):
        make(tmp_path, project_name=name)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_files_of_the_user_stay_whatever_the_search_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs = [tmp_path / "mnist" / name for name in ("data/train.bin", "data/arrays/a.npy", "notes.txt", ".git/HEAD")]
    for file in theirs:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    for overwrite in (False, True):
        tuner = search(make(".", project_name="mnist", max_trials=1, overwrite=overwrite), epochs=1)
        assert [file.read_text() for file in theirs] == ["mine"] * 4
        assert not (tmp_path / "mnist" / "payload").exists()
    assert len(tuner.record().trials) == 1
    # Only to read, and to start over, while another process searches.
    (tmp_path / "mnist" / "oracle.json").write_bytes(b"{")  # as if it were written at this moment, not whole
    before = contents(tmp_path / "mnist")
    with held(tmp_path / "mnist") as is_held:
        assert is_held
        looking = make(".", project_name="mnist", max_trials=1)
        assert looking.get_best_config().objective == tuner.get_best_config().objective
        for begin in (lambda: make(".", project_name="mnist", overwrite=True), lambda: search(looking, epochs=1)):
            with pytest.raises(SearchDirectoryError, match="is running already"):
                begin()
        assert contents(tmp_path / "mnist") == before


def contents(folder):
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != "search.lock")
    return {str(file): file.read_bytes() for file in files}


def test_a_folder_with_files_that_would_be_replaced_is_refused(tmp_path):
    (tmp_path / "report").mkdir()
    with pytest.raises(SearchDirectoryError, match="holds report, and no search of accumtune"):
        ownership.claim(tmp_path)
    (tmp_path / "report").rename(tmp_path / "figures")
    ownership.claim(tmp_path)
    (tmp_path / "report").mkdir()
    ownership.claim(tmp_path)
    ownership.clear(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {ownership.MARKER, "figures"}


def test_a_search_of_before_folders_were_marked_goes_on(tmp_path):
    (tmp_path / "oracle.json").write_text("{}")
    with pytest.raises(SearchDirectoryError, match="oracle.json"):
        ownership.claim(tmp_path)
    Journal(tmp_path / "search.jsonl").append("search_started", search_id="0" * 32)
    ownership.claim(tmp_path)
    ownership.clear(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [ownership.MARKER]
