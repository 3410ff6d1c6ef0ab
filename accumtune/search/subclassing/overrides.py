"""Refuses a subclass of a tuner or an oracle that overrides methods which nothing would call."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import keras_tuner

from accumtune.errors import SearchError

# Called by a search or by the user.
HONOURED_OF_TUNER = frozenset({
    "get_best_hyperparameters", "get_best_models", "get_state", "load_model", "on_search_begin", "on_search_end",
    "on_trial_begin", "on_trial_end", "pre_create_trial", "reload", "remaining_trials", "results_summary", "run_trial",
    "save", "save_model", "search", "search_space_summary", "set_state",
})  # fmt: skip
HONOURED_OF_ORACLE = frozenset({
    "create_trial", "end_trial", "get_space", "get_state", "get_trial", "populate_space", "reload", "remaining_trials",
    "set_state", "update_space", "update_trial", "verbose",
})  # fmt: skip

_CALLBACK = (
    "give search() a keras.callbacks.Callback with these methods: it runs in the trial's process, with self.model."
)
_IN_FIT = "do it in the build function, or in the `fit` of a keras_tuner.HyperModel: trials call both."
_FOLDER = "give directory= and project_name=."
_FIXES = {
    "on_batch_begin": _CALLBACK, "on_batch_end": _CALLBACK, "on_epoch_begin": _CALLBACK, "on_epoch_end": _CALLBACK,
    "get_trial_dir": _FOLDER, "project_dir": _FOLDER,
    "get_best_trials": "override get_best_hyperparameters or get_best_models of the tuner.",
    "score_trial": "return the score from HyperModel.fit or run_trial, as the objective.",
}  # fmt: skip


def is_overridden(method: str, kind: type) -> bool:
    """Returns whether a tuner's class overrides a method."""
    return method in _overridden(kind, keras_tuner.Tuner)


def refuse_overridden(tuner: type, oracle: type) -> None:
    """Refuses subclasses with methods that nothing would call.

    Raises:
        SearchError: there is one.
    """
    for kind, base, honoured in (
        (tuner, keras_tuner.Tuner, HONOURED_OF_TUNER),
        (oracle, keras_tuner.Oracle, HONOURED_OF_ORACLE),
    ):
        names = sorted(_never_called(kind, base, honoured))
        if names:
            raise SearchError(
                f"Received {kind.__name__}, which overrides {', '.join(names)}: a search would not call it, because "
                "models are built and trained in processes of their own.",
                f"a subclass that overrides only {', '.join(sorted(honoured))}.",
                next((_FIXES[name] for name in names if name in _FIXES), _IN_FIT),
            )


def _never_called(kind: type, base: type, honoured: Collection[str]) -> Iterator[str]:
    for name in _overridden(kind, base):
        # An oracle's private methods are still called; those of a tuner, which AutoKeras overrides, are not.
        if name not in honoured and (not name.startswith("_") or base is keras_tuner.Tuner):
            yield name


def _overridden(kind: type, base: type) -> Iterator[str]:
    """Yields the base class's names that a user's class overrides."""
    for name in dir(base):
        owner = next((cls for cls in kind.__mro__ if name in vars(cls)), base)
        if not name.startswith("__") and owner.__module__.partition(".")[0] not in ("accumtune", "keras_tuner"):
            yield name
