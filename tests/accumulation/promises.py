"""Marks the tests that check the lines of the documentation's exactness lists."""

from collections.abc import Callable


def holds(promise: str) -> Callable:
    """Marks a test that checks a line of a list in `concepts/exactness.md`, word for word."""

    def mark(test):
        test.promises = [promise, *getattr(test, "promises", [])]
        return test

    return mark
