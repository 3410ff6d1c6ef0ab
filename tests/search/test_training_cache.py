"""Trials that need the same training share one."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

from accumtune.search.trial.training_cache import TrainingCache
from accumtune.search.trial.trial_result import TrialResult

RESULT = TrialResult("completed", {"width": 8})
FAILED = TrialResult("failed", {"width": 8})


def never():
    raise AssertionError("trained once more")


class Training:
    """Signals its start, and ends when a test allows it."""

    def __init__(self, result=RESULT):
        self.result, self.begun, self.may_end = result, Event(), Event()

    def __call__(self):
        self.begun.set()
        assert self.may_end.wait(10)
        return self.result


def test_who_comes_later_waits_for_whoever_trains():
    cache, training = TrainingCache(), Training()
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(cache.get_or_train, "key", "7", training)
        assert training.begun.wait(10)
        waiting = [threads.submit(cache.get_or_train, "key", name, never) for name in "89"]
        assert cache.get_or_train("another key", "10", lambda: RESULT) == ("10", RESULT)
        assert not any(future.done() for future in waiting)
        training.may_end.set()
        assert [future.result(timeout=10) for future in (first, *waiting)] == [("7", RESULT)] * 3


def test_where_it_fails_one_of_those_who_wait_tries_for_itself():
    cache, training = TrainingCache(), Training(FAILED)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(cache.get_or_train, "key", "7", training)
        assert training.begun.wait(10)
        second = threads.submit(cache.get_or_train, "key", "8", lambda: RESULT)
        training.may_end.set()
        assert first.result(timeout=10) == ("7", FAILED) and second.result(timeout=10) == ("8", RESULT)
    assert cache.get_or_train("key", "9", never) == ("8", RESULT)


def test_an_error_is_the_trial_s_own():
    cache = TrainingCache()
    with pytest.raises(AssertionError):
        cache.get_or_train("key", "7", never)
    assert cache.get_or_train("key", "8", lambda: RESULT) == ("8", RESULT)


def test_what_was_trained_in_an_earlier_session_is_known():
    cache = TrainingCache()
    cache.add("key", "3", RESULT)
    assert cache.get_or_train("key", "4", never) == ("3", RESULT)
