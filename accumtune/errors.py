"""Every error that accumtune raises, in one tree.

    AccumtuneError
    ├── BudgetError             a memory budget that cannot be read, or that no device can give
    │   └── BudgetTooSmallError     not even micro-batch 1 fits in it
    ├── BatchSizeError          micro-batch sizes or accumulation steps that cannot be used
    ├── ModelError              a model that cannot be accumulated
    │   ├── UncompiledModelError
    │   ├── CustomTrainStepError
    │   └── BuildError              the user's build function raised, or returned something other than a model
    ├── DataError               data that cannot be split into batches
    │   └── UnsendableDataError     ... or that cannot be sent to another process
    ├── SearchError             a search that cannot continue
    │   ├── SearchDirectoryError    its directory is corrupt, or belongs to another search
    │   ├── SearchFailedError       too many trials in a row failed
    │   ├── NoResultError           nothing to choose from
    │   └── WorkerError             the process that starts trials does not work here
    ├── ConfigError             a training configuration that cannot be read
    │   └── VerificationError       ... or whose memory or results are not met on this machine
    ├── TrackingError           a tracking store that cannot be used
    └── CompatibilityError      an installed Keras without an internal name that accumulation needs

Running out of memory and exceeding the budget are outcomes of a trial, never exceptions of a search.
"""

from __future__ import annotations


class AccumtuneError(Exception):
    """Base of every error of accumtune.

    Args:
        received: what accumtune got, in one sentence.
        expected: what it can work with.
        fix: what to do about it.
    """

    # Keras leaves an error in a layer's call as it is, instead of putting `args[0]` alone into a new one.
    _keras_call_info_injected = True

    def __init__(self, received: str, expected: str = "", fix: str = "") -> None:
        super().__init__(received, expected, fix)
        self.received = received
        self.expected = expected
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.received]
        if self.expected:
            lines.append(f"Expected: {_sentence(self.expected)}")
        if self.fix:
            lines.append(f"Fix: {_sentence(self.fix)}")
        return "\n".join(lines)


def _sentence(text: str) -> str:
    """Adds a full stop after a letter or a digit; other endings are punctuation already, or code to copy."""
    return f"{text}." if text[-1].isalnum() else text


class BudgetError(AccumtuneError, ValueError):
    """A memory budget that cannot be read, or that no device can give."""


class BudgetTooSmallError(BudgetError):
    """Not even micro-batch 1 fits in the memory budget."""


class BatchSizeError(AccumtuneError, ValueError):
    """Micro-batch sizes or accumulation steps that cannot be used."""


class ModelError(AccumtuneError, ValueError):
    """A model that cannot be accumulated."""


class UncompiledModelError(ModelError):
    """The model was not compiled."""


class CustomTrainStepError(ModelError):
    """The model overrides how Keras trains it, in a way that cannot be accumulated exactly."""


class BuildError(ModelError):
    """The user's build function raised, or returned something other than a compiled model."""


class DataError(AccumtuneError, ValueError):
    """Data that cannot be split into batches."""


class UnsendableDataError(DataError):
    """Something that a trial needs cannot be sent to another process."""


class SearchError(AccumtuneError):
    """A search that cannot continue."""


class SearchDirectoryError(SearchError):
    """The directory of a search is corrupt, or belongs to another search."""


class SearchFailedError(SearchError):
    """Too many trials in a row failed."""


class NoResultError(SearchError):
    """There is no completed trial to choose from."""


class WorkerError(SearchError):
    """The process that starts trials does not work here."""


class ConfigError(AccumtuneError, ValueError):
    """A training configuration that cannot be read."""


class VerificationError(ConfigError):
    """A training configuration's memory or results are not met on this machine."""


class TrackingError(AccumtuneError):
    """A tracking store that cannot be used."""


class CompatibilityError(AccumtuneError):
    """The installed Keras, or its backend, lacks an internal name that accumulation needs."""
