"""What the README promises of exactness, and which tests hold it."""

from collections.abc import Callable


def holds(promise: str) -> Callable:
    """Marks a test that holds a promise: a line of a list in the README's section "The engine alone", word for word."""

    def mark(test):
        test.promises = [promise, *getattr(test, "promises", [])]
        return test

    return mark
