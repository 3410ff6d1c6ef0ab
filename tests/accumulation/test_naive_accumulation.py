"""Negative controls: the naive ways are other trainings, so the comparison can tell."""

import keras
import numpy as np
import pytest
from equality import as_array, assert_same_training, dense, largest_difference, regression, train


def native(optimizer, steps, **fit):
    """Keras's own accumulation over batches of 4."""

    def build():
        return dense(optimizer=lambda: optimizer(gradient_accumulation_steps=steps))()

    return train(build, regression(), batch_size=4, **fit)


def schedule():
    return keras.optimizers.schedules.ExponentialDecay(0.2, decay_steps=1, decay_rate=0.5)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda **k: keras.optimizers.SGD(0.1, **k),  # mean of means and stale residue: the batches are 4 4 4 4 4 1
        pytest.param(lambda **k: keras.optimizers.SGD(schedule(), **k), marks=pytest.mark.slow),
        pytest.param(
            lambda **k: keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2, **k),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["mean-of-means", "schedule-per-micro-step", "ema-per-micro-step"],
)
def test_the_comparison_tells_naive_accumulation_apart(optimizer):
    plain = train(dense(optimizer=optimizer), regression())
    naive = native(optimizer, 2)
    pairs = zip(naive.weights(), plain.weights(), strict=True)
    assert max(np.abs(one - other).max() for one, other in pairs) > 1e-4
    ours = train(dense(optimizer=optimizer), regression(), batch_size=4, accumulation_steps=2)
    assert largest_difference(ours, plain) < 1e-6


def test_keras_own_accumulation_leaves_a_residue():
    """Negative control: 5 equal batches, 2 to an update. The fifth waits for the next epoch, and the next fit."""
    data = {name: array[:20] for name, array in regression().items()}
    sgd = keras.optimizers.SGD
    plain = train(dense(optimizer=lambda: sgd(0.1)), data, epochs=1)
    ours = train(dense(optimizer=lambda: sgd(0.1)), data, batch_size=4, accumulation_steps=2, epochs=1)
    naive = train(dense(optimizer=lambda: sgd(0.1, gradient_accumulation_steps=2)), data, batch_size=4, epochs=1)
    assert_same_training(ours, plain)
    assert (ours.updates(), naive.updates()) == (3, 2)
    pairs = zip(naive.model.trainable_variables, plain.model.trainable_variables, strict=True)
    assert max(np.abs(as_array(one) - as_array(other)).max() for one, other in pairs) > 1e-4
    accumulators = [as_array(v) for v in naive.model.optimizer.variables if "accumul" in v.path]
    assert max(np.abs(array).max() for array in accumulators) > 0
