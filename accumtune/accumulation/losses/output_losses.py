"""Weights the logged losses of a model's outputs in validation on TensorFlow as plain Keras does.

Keras takes the number of samples from a batch's static shape. If the last batch may be smaller, there is no static
number unless the model runs eagerly, and Keras logs a mean over batches. So a part of a batch is weighted by its share
of that batch; if the number of batches is not known beforehand, the last one is weighted by its own samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from accumtune.accumulation.data.batches import part_of, samples_of
from accumtune.accumulation.losses import loss_shares
from accumtune.accumulation.losses.batch_metrics import is_spread
from accumtune.accumulation.patched_attributes import replaced


def output_loss_weights(model: Any) -> OutputLossWeights | None:
    """Returns the weights for a model's validation; None if Keras's are right, or batches are spread over devices."""
    import keras

    is_needed = keras.backend.backend() == "tensorflow" and model._compile_loss is not None
    return OutputLossWeights(model) if is_needed and not is_spread(model) else None


class OutputLossWeights:
    """Splits the parts of validation where plain Keras's batches would end, and weights the pieces."""

    def __init__(self, model: Any) -> None:
        import tensorflow as tf

        self._model = model
        self._weight = tf.Variable(-1.0, trainable=False)  # below 0: Keras's own weight
        self._value = -1.0
        self._is_sized = False
        self._seen = 0

    def is_cut_otherwise(self) -> bool:
        """Returns whether a `fit` validates in other batches than plain Keras, and logs losses of outputs."""
        is_stated = self._model._accumtune_metric_batch_size is not None
        return self._model._accumtune_is_validating and is_stated and bool(self._model._compile_loss.metrics)

    def begin(self) -> None:
        """Begins an evaluation."""
        self._seen = 0

    def look_at(self, batches: Any) -> None:
        """Notes whether these batches have a static number of samples."""
        from accumtune.accumulation.engines.tensor_slices import has_static_batch

        self._is_sized = has_static_batch(self._model, batches)

    def pieces(self, part: Any, samples_of_batch: int) -> Iterator[Any]:
        """Yields the part of a batch, split where a batch of plain Keras would end; sets the weight of each piece."""
        from accumtune.accumulation.engines.tensor_slices import cut

        samples = samples_of(part)
        if not self.is_cut_otherwise():
            self._set(float(samples) if self._is_sized else samples / samples_of_batch)
            yield part
            return
        size = self._model._accumtune_metric_batch_size
        total = self._model._accumtune_validation_samples or float("inf")
        first = self._seen
        self._seen += samples
        ends = [*range(first - first % size + size, self._seen, size), self._seen]
        for start, end in zip([first, *ends], ends, strict=False):
            begin = start - start % size
            share = 1 if self._model.run_eagerly else 1 / (min(begin + size, total) - begin)
            self._set((end - start) * share)
            yield part if len(ends) == 1 else part_of(part, slice(start - first, end - first), cut)

    def leave_to_keras(self) -> None:
        """Uses Keras's own weights from now on."""
        self._set(-1.0)

    def _set(self, weight: float) -> None:
        if weight != self._value:
            self._weight.assign(weight)
            self._value = weight

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Applies the weight to the logged losses inside the `with` block (run or traced)."""
        import tensorflow as tf

        compiled = self._model._compile_loss

        def weighed(metric: Any) -> Any:
            update = metric.update_state

            def update_state(value: Any, sample_weight: Any = None) -> Any:
                of_keras = tf.cast(1 if sample_weight is None else sample_weight, self._weight.dtype)
                return update(value, sample_weight=tf.where(self._weight < 0, of_keras, self._weight))

            return update_state

        def replacements() -> Iterator[contextlib.AbstractContextManager[None]]:
            return (replaced(metric, {"update_state": weighed(metric)}) for metric in compiled.metrics)

        with loss_shares.once_built(compiled, replacements):
            yield
