"""Metrics that are one number per batch (F1, Dice, R²): they get the whole effective batch, not each micro-batch.

A mean of such numbers over micro-batches depends on their size. So the micro-steps do not update these metrics, but
return targets and predictions, which are kept on the host; after the update the metrics get all of them together.
Validation, which runs in micro-batches too, gives these metrics batches of the size that plain Keras would have taken.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from accumtune.accumulation.patched_attributes import replaced

# (y, y_pred, sample weights, masks of the leaves of y_pred)
Outputs = tuple[Any, Any, Any, Any]


class WholeWindow:
    """The metrics of `model` that wait for the whole window (or validation batch), and the outputs kept for them.

    Args:
        is_able: False if a window is spread over devices; metrics then get each micro-batch.
    """

    def __init__(self, model: Any, is_able: bool = True) -> None:
        self._model = model
        self._is_able = is_able
        self._waiting: list[Any] = []
        self._given: list[Outputs] = []

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Does not update metrics over the batch inside the `with` block (run or traced)."""
        with contextlib.ExitStack() as stack:
            for metric in _own_metrics(self._model) if self._is_able else []:
                stack.enter_context(replaced(metric, {"update_state": self._unless_number(metric)}))
            yield

    def _unless_number(self, metric: Any) -> Callable[..., Any]:
        from keras import ops

        update = metric.update_state

        def update_state(y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
            if not _is_function(metric):
                self._wait_for(metric)
                return None
            values = ops.convert_to_tensor(metric._fn(y_true, y_pred, **metric._fn_kwargs))
            if not len(values.shape):
                self._wait_for(metric)
                return None
            with replaced(metric, {"_fn": lambda *args, **kwargs: values}):
                return update(y_true, y_pred, sample_weight=sample_weight)

        return update_state

    def _wait_for(self, metric: Any) -> None:
        if all(metric is not other for other in self._waiting):
            self._waiting.append(metric)

    def outputs(self, y: Any, y_pred: Any, sample_weight: Any) -> Outputs | tuple[()]:
        """Returns what a micro-step returns for the metrics; () if no metric waits."""
        from keras import tree

        from accumtune.accumulation.losses.loss_shares import mask_of

        if not self._waiting:
            return ()
        return y, y_pred, sample_weight, [mask_of(leaf) for leaf in tree.flatten(y_pred)]

    def take(self, outputs: Any) -> None:
        """Keeps the outputs of a micro-step, on the host."""
        if outputs:
            self._given.append(_on_host(tuple(outputs)))

    def update(self, logs: Any, batch_size: int | None = None) -> Any:
        """Updates the waiting metrics, in Keras's current state; returns the logs with their results.

        Args:
            batch_size: metrics get this number of samples at a time, and the rest is kept; None: all samples.
        """
        from keras import tree

        rows = sum(_rows(y_pred) for _, y_pred, _, _ in self._given)
        if not rows or rows < (batch_size or 0):
            return logs
        given, self._given = self._given, []
        shapes = {tuple(leaf.shape[1:] for leaf in tree.flatten(one) if leaf is not None) for one in given}
        if len(shapes) > 1:
            names = ", ".join(metric.name for metric in self._waiting)
            warnings.warn(
                f"Metrics over the batch ({names}) see each micro-batch by itself: those of an update differ in shape.",
                stacklevel=2,
            )
        elif batch_size is None:
            given = [_joined(given)]
        else:
            whole, left = _joined(given), rows % batch_size
            given = [_cut(whole, slice(start, start + batch_size)) for start in range(0, rows - left, batch_size)]
            self._given = [_cut(whole, slice(rows - left, None))] if left else []
        for outputs in given:
            _update(self._model, self._waiting, outputs)
        results = self._model._compile_metrics.result()
        return _with_results(logs, results)

    def update_within(self, metrics: Any, logs: Any, batch_size: int | None = None) -> tuple[Any, Any]:
        """As `update`, but on the given values of the model's metrics; returns the logs and the new values."""
        from keras import StatelessScope

        if not self._given:
            return logs, metrics
        variables = self._model.metrics_variables
        with StatelessScope(state_mapping=list(zip(variables, metrics, strict=True))) as scope:
            logs = self.update(logs, batch_size)
        return logs, [scope.get_current_value(variable) for variable in variables]

    @contextlib.contextmanager
    def noting(self) -> Iterator[list[Outputs]]:
        """Collects in the list what the compiled metrics are updated with, if some wait; in the `with` block."""
        noted: list[Outputs] = []
        compiled = self._model._compile_metrics
        update = compiled.update_state

        def update_state(y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
            if not compiled.built:
                compiled.build(y_true, y_pred)
            with self.waiting():
                update(y_true, y_pred, sample_weight=sample_weight)
            outputs = self.outputs(y_true, y_pred, sample_weight)
            if outputs:
                noted.append(outputs)

        with replaced(compiled, {"update_state": update_state}):
            yield noted

    def forget(self) -> None:
        """Drops the outputs of an interrupted window."""
        self._given = []


@contextlib.contextmanager
def tracking(model: Any, share: Any) -> Iterator[None]:
    """Weights a number that is given to a model's `keras.metrics.Mean` by the micro-batch's share of the window.

    Models update such means in `compute_loss`, `compute_metrics` or layers, often with a part of the loss.

    Args:
        share: the micro-batch's share of the window; None if it is the whole window.
    """
    import keras
    from keras import ops

    def by_share(metric: Any) -> Callable[..., Any]:
        update = metric.update_state

        def update_state(values: Any, sample_weight: Any = None) -> Any:
            if sample_weight is None and not len(ops.convert_to_tensor(values).shape):
                sample_weight = ops.cast(share, metric.dtype)
            return update(values, sample_weight=sample_weight)

        return update_state

    with contextlib.ExitStack() as stack:
        for metric in model.metrics if share is not None else []:
            if getattr(type(metric), "update_state", None) is keras.metrics.Mean.update_state:
                stack.enter_context(replaced(metric, {"update_state": by_share(metric)}))
        yield


def own_metrics_of_spread_windows(model: Any) -> list[Any]:
    """Returns a model's own metrics if its windows are spread over devices, where they get each micro-batch alone."""
    return _own_metrics(model) if is_spread(model) else []


def is_spread(model: Any) -> bool:
    """Whether batches are spread over devices."""
    import keras

    return keras.distribution.distribution() is not None or is_replicated(model)


def is_replicated(model: Any) -> bool:
    """Whether batches are spread over the replicas of a `tf.distribute` strategy."""
    strategy = getattr(model, "_distribute_strategy", None)
    return bool(strategy and strategy.num_replicas_in_sync > 1)


def may_have_own_metrics(model: Any) -> bool:
    """Returns whether some metric may be one over the batch; False if batches are spread over devices."""
    compiled = model._compile_metrics
    if compiled is None or is_spread(model):
        return False
    return bool(_own_metrics(model) if compiled.built else True)


def _own_metrics(model: Any) -> list[Any]:
    """Returns the metrics that may be over the batch; Keras's own are not, except Dice and Tversky."""
    compiled = model._compile_metrics
    return [metric for metric in compiled.metrics if _may_look_at_batches(metric)] if compiled is not None else []


def _may_look_at_batches(metric: Any) -> bool:
    import keras

    from accumtune.accumulation.coupling.detection import DECLARATION

    code = metric._fn if _is_function(metric) else metric
    if getattr(code, DECLARATION, getattr(metric, DECLARATION, False)):
        return False
    if code in (keras.losses.dice, keras.losses.tversky):
        return True
    module = getattr(code, "__module__", "") if _is_function(metric) else type(metric).__module__
    return not str(module).startswith(("keras.", "keras_hub."))


def _is_function(metric: Any) -> bool:
    import keras

    return isinstance(metric, keras.metrics.MeanMetricWrapper) and (
        type(metric).update_state is keras.metrics.MeanMetricWrapper.update_state
    )


def _update(model: Any, metrics: list[Any], outputs: Outputs) -> None:
    """Updates only these of the compiled metrics."""
    from keras import ops, tree
    from keras.src import backend

    y, y_pred, sample_weight, masks = tree.map_structure(
        lambda leaf: None if leaf is None else ops.convert_to_tensor(leaf), outputs
    )
    for leaf, mask in zip(tree.flatten(y_pred), masks, strict=False):
        if mask is not None:
            backend.set_keras_mask(leaf, mask)
    with contextlib.ExitStack() as stack:
        for metric in model._compile_metrics.metrics:
            if all(metric is not other for other in metrics):
                stack.enter_context(replaced(metric, {"update_state": lambda *args, **kwargs: None}))
        model._compile_metrics.update_state(y, y_pred, sample_weight)


def _with_results(logs: Any, results: dict[str, Any]) -> Any:
    """Returns the logs with these results, also in nested dicts, which a user's own step may return."""
    return {
        name: _with_results(value, results) if isinstance(value, dict) else results.get(name, value)
        for name, value in logs.items()
    }


def _on_host(outputs: Outputs) -> Outputs:
    import keras
    from keras import ops, tree

    def on_host(leaf: Any) -> Any:
        if leaf is None or isinstance(leaf, np.ndarray):
            return leaf
        if keras.backend.backend() == "torch":
            return leaf.detach().cpu()
        return np.asarray(ops.convert_to_numpy(leaf))

    host: Outputs = tree.map_structure(on_host, outputs)
    return host


def _joined(given: list[Outputs]) -> Outputs:
    from keras import tree

    def joined(*leaves: Any) -> Any:
        if leaves[0] is None:
            return None
        if isinstance(leaves[0], np.ndarray):
            return np.concatenate(leaves)
        import torch

        return torch.cat(leaves)

    whole: Outputs = tree.map_structure(joined, *given)
    return whole


def _cut(outputs: Outputs, part: slice) -> Outputs:
    from keras import tree

    cut: Outputs = tree.map_structure(lambda leaf: None if leaf is None else leaf[part], outputs)
    return cut


def _rows(y_pred: Any) -> int:
    from keras import tree

    return int(tree.flatten(y_pred)[0].shape[0])
