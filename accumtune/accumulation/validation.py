"""Validation in micro-batches of the data that a `fit` has prepared by itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from accumtune.accumulation.data.batches import micro_batches
from accumtune.accumulation.losses import whole_batch_loss


def in_micro_batches(model: Any, test_function: Any) -> Any:
    """A test function of the backend in use that takes a batch in parts, while a `fit` asks for that."""
    import keras

    of_backend = {"tensorflow": _on_tensorflow, "jax": _on_jax}.get(keras.backend.backend(), _on_torch)
    return of_backend(model, test_function)


def _on_tensorflow(model: Any, test_function: Any) -> Any:
    from keras import tree

    from accumtune.accumulation.engines import tensor_slices

    def test(iterator: Any) -> Any:
        size = model._accumtune_validation_size
        if size is None or model.distribute_strategy.num_replicas_in_sync > 1:
            return test_function(iterator)
        batches = itertools.islice(iterator, model.steps_per_execution)
        tensor_batches = (tree.map_structure(tensor_slices.as_tensor, batch) for batch in batches)
        logs = None
        if whole_batch_loss.is_wanted(model):
            is_sized = tensor_slices.has_static_batch(iterator)
            for batch in tensor_batches:
                parts = micro_batches(batch, size, None, tensor_slices.cut)
                logs = model.train_function.two_passes.test(parts, is_sized)
        for part in _parts(tensor_batches, size, tensor_slices.cut):
            logs = test_function(iter([part]))
        if logs is None:
            raise StopIteration
        return logs

    return test


def _on_jax(model: Any, test_function: Any) -> Any:
    def test(state: Any, iterator: Any) -> Any:
        size = model._accumtune_validation_size
        if size is None:
            return test_function(state, iterator)
        logs = None
        batches = itertools.islice(iterator, model.steps_per_execution)
        if whole_batch_loss.is_wanted(model):
            for batch in batches:
                parts = micro_batches(batch, size, None)
                logs, state = model.train_function.two_passes.test(state, parts)
        for part in _parts(batches, size):
            logs, state = test_function(state, iter([part]))
        if logs is None:
            raise StopIteration
        return logs, state

    return test


def _on_torch(model: Any, test_function: Any) -> Any:
    def test(data: Any) -> Any:
        size = model._accumtune_validation_size
        if size is None:
            return test_function(data)
        logs = None
        if whole_batch_loss.is_wanted(model):
            for batch in data:
                logs = model.train_function.two_passes.test(micro_batches(batch, size, None))
            return logs
        for part in _parts(data, size):
            logs = test_function([part])
        return logs

    return test


def _parts(batches: Iterable[Any], size: int, cut: Any = None) -> Iterator[Any]:
    for batch in batches:
        for part in micro_batches(batch, size, None, cut):
            yield part.take()
