"""The records and messages at the beginning and the end of a search."""

import pytest

from accumtune.search.results.search_results import SearchResults
from accumtune.search.session.reporter import Reporter, setup_advice
from accumtune.tracking.journal import Journal
from accumtune.worker.transport.task_directory import SearchDirectory


class Results(SearchResults):
    """Notes what the journal says when the report is written."""

    def __init__(self, files):
        super().__init__(files, None)
        self.journal = Journal(files.journal_file)
        self.at_report = None

    def write_report(self, best, status, reason):
        self.at_report = names(self.journal)


def names(journal):
    return [event["event"] for event in journal.events()]


def report(tmp_path, kind=Results, is_hurried=False):
    files = SearchDirectory(tmp_path)
    results = kind(files)
    reporter = Reporter(files, results, False)
    reporter.begin(lambda: {"name": "made"}, [], [], lambda line: None)
    reporter.end("finished", "", None, lambda: results.journal.append("saved"), is_hurried=is_hurried)
    return results


def test_a_search_has_ended_when_its_report_is_there(tmp_path):
    """A background thread copies the journal: an end before the report would finish the run without a report."""
    results = report(tmp_path)
    assert results.at_report == ["search_started", "saved"]
    assert names(results.journal) == ["search_started", "saved", "search_ended"]


def test_its_end_is_written_whatever_happens_to_its_report(tmp_path):
    class Broken(Results):
        def write_report(self, best, status, reason):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        report(tmp_path / "broken", Broken)
    assert names(Journal(SearchDirectory(tmp_path / "broken").journal_file))[-1] == "search_ended"


def test_nobody_who_hurries_waits_for_a_report(tmp_path):
    assert report(tmp_path, is_hurried=True).at_report is None


def test_advice_is_given_once_and_another_session_is_told_apart(tmp_path):
    files = SearchDirectory(tmp_path)
    lines = []
    for _ in range(2):
        reporter = Reporter(files, Results(files), False)
        reporter.begin(dict, ["hello"], ["take care"], lines.append)
    assert lines == ["hello", "take care", "hello"]
    assert names(Journal(files.journal_file)) == ["search_started", "advice", "search_resumed"]


# Advice


def texts(**changes):
    settings = {
        "hyperparameters": ["width", "learning_rate"], "effective_batch_sizes": (8, 64), "learning_rate_scaling": None,
        "batch_coupled_layers": [], "searches_pairs": False,
    }  # fmt: skip
    return setup_advice(**{**settings, **changes})


def test_nothing_to_say():
    assert texts() == []
    assert texts(hyperparameters=["width", "lr"]) == []
    assert texts(hyperparameters=["width"], learning_rate_scaling="sqrt") == []
    assert texts(hyperparameters=["width"], effective_batch_sizes=(64,)) == []


def test_a_fixed_learning_rate_with_many_batches():
    (text,) = texts(hyperparameters=["width", "filters"])
    assert "learning_rate_scaling" in text


def test_coupled_layers_are_named_with_what_follows():
    (text,) = texts(batch_coupled_layers=["BatchNormalization bn_1"], searches_pairs=True)
    assert "bn_1" in text and "are searched too" in text
    (text,) = texts(batch_coupled_layers=["BatchNormalization bn_1"])
    assert "search_over='pairs'" in text


def test_batches_larger_than_the_data_are_told():
    (text,) = texts(effective_batch_sizes=(64, 128, 256, 512), samples=133)
    assert "133 samples" in text and "256, 512" in text and "64" not in text
    assert texts(effective_batch_sizes=(64, 128, 256), samples=133) == []  # one of them is the whole batch, on purpose
    assert texts(effective_batch_sizes=(64, 128, 256), samples=None) == []
