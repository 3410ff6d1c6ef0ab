"""One training for all trials that ask for it."""

from concurrent.futures import Future, ThreadPoolExecutor

from accumtune.search.trial.claims import Claims
from accumtune.search.trial.trial_result import TrialResult

RESULT = TrialResult("completed", {"width": 8})


def test_who_comes_later_waits_for_whoever_trains():
    claims = Claims()
    claim = claims.claim("key")
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(claims.claim, "key") for _ in range(2)]
        assert isinstance(claims.claim("another key"), Future)
        assert not any(future.done() for future in waiting)
        claims.release("key", claim, ("7", RESULT))
        assert [future.result(timeout=10) for future in waiting] == [("7", RESULT)] * 2


def test_where_it_fails_one_of_those_who_wait_tries_for_itself():
    claims = Claims()
    claim = claims.claim("key")
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(claims.claim, "key")
        claims.release("key", claim, None)
        second = waiting.result(timeout=10)
    assert isinstance(second, Future) and second is not claim
    claims.release("key", second, ("8", RESULT))
    assert claims.claim("key") == ("8", RESULT)


def test_what_was_trained_in_an_earlier_session_is_known():
    claims = Claims()
    claims.remember("key", ("3", RESULT))
    assert claims.claim("key") == ("3", RESULT)
