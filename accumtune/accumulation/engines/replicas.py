"""Runs functions on the replicas of a `tf.distribute` strategy; the default strategy has one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf
from keras import tree
from keras.src.losses import loss as loss_module

from accumtune.accumulation.patched_attributes import replaced
from accumtune.errors import ModelError


class Replicas:
    """Splits values by replica, joins them, and runs a function on each.

    Args:
        strategy: the `tf.distribute.Strategy` that the model was built under.

    Raises:
        ModelError: some of its replicas are in other processes, whose samples are unknown here.
    """

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy
        self.number = int(strategy.num_replicas_in_sync)
        here = len(strategy.extended.worker_devices) if self.number > 1 else 1
        if here != self.number:
            raise ModelError(
                f"Received a model under {type(strategy).__name__} with {self.number} replicas, {here} of them here.",
                "a strategy whose replicas are all in this process.",
                "use tf.distribute.MirroredStrategy on one machine, or train without accumulate.",
            )
        self.scope = strategy.scope if tf.distribute.has_strategy() or self.number > 1 else contextlib.nullcontext

    def run(self, function: Callable[..., Any], around: Callable[[], Any]) -> Callable[..., Any]:
        """Returns a function that calls `function` once per replica with its arguments, within one context `around()`.

        Replicas are traced in threads that take turns, so replacements on model and optimizer are made outside, once.
        """

        def on_each(*args: Any) -> Any:
            with around(), self._unscaled():
                return self.strategy.run(function, args=args)

        return on_each

    @contextlib.contextmanager
    def _unscaled(self) -> Iterator[None]:
        """Turns off Keras's division of losses by the number of replicas, which skips losses with one number per batch.

        Here a replica's micro-batch is weighted by its share of the window, like any other.
        """
        names = ("scale_loss_for_distribution", "unscale_loss_for_distribution") if self.number > 1 else ()
        own = {name: getattr(loss_module, name) for name in names}
        for name in names:
            setattr(loss_module, name, lambda value: value)
        try:
            yield
        finally:
            for name, function in own.items():
                setattr(loss_module, name, function)

    def parts(self, value: Any) -> list[Any]:
        """Turns a structure of per-replica values into one structure per replica."""
        if self.number == 1:
            return [value]
        leaves = [
            (None,) * self.number if leaf is None else self.strategy.experimental_local_results(leaf)
            for leaf in tree.flatten(value)
        ]
        return [tree.pack_sequence_as(value, [leaf[index] for leaf in leaves]) for index in range(self.number)]

    def join(self, parts: list[Any]) -> Any:
        """Turns one structure per replica into one structure of per-replica values."""
        if self.number == 1:
            return parts[0]

        def joined(*leaves: Any) -> Any:
            if leaves[0] is None:
                return None
            return self.strategy.experimental_distribute_values_from_function(
                lambda context: leaves[context.replica_id_in_sync_group]
            )

        return tree.map_structure(joined, *parts)

    def mean(self, logs: Any) -> Any:
        """Reduces logs over replicas, as Keras does."""
        from keras.src.backend.tensorflow.trainer import reduce_per_replica

        return logs if self.number == 1 else reduce_per_replica(logs, self.strategy, reduction="auto")

    def summed(self, gradients: list[Any]) -> list[Any]:
        """Returns, within a replica, the gradients summed over all replicas; None for missing ones."""
        if self.number == 1:
            return gradients
        present = [gradient for gradient in gradients if gradient is not None]
        context = tf.distribute.get_replica_context()
        totals = iter(context.all_reduce(tf.distribute.ReduceOp.SUM, present) if present else [])
        return [None if gradient is None else next(totals) for gradient in gradients]

    @contextlib.contextmanager
    def summed_already(self, optimizers: list[Any]) -> Iterator[None]:
        """Turns off Keras's sum over replicas, which comes after clipping; `summed` comes before."""
        as_they_are = {"_all_reduce_sum_gradients": lambda gradients_and_variables: gradients_and_variables}
        with contextlib.ExitStack() as changed:
            for optimizer in optimizers:  # also for one replica of a strategy, where Keras's sum would fail
                changed.enter_context(replaced(optimizer, as_they_are))
            yield
