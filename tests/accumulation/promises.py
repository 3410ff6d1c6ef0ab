"""What the documentation promises of exactness, and which tests hold it."""

from collections.abc import Callable


def holds(promise: str) -> Callable:
    """Marks a test that holds a promise: a line of a list in `concepts/exactness.md`, word for word."""

    def mark(test):
        test.promises = [promise, *getattr(test, "promises", [])]
        return test

    return mark
