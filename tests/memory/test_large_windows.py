"""A loss over far more samples than fit in one pass, under a real limit: what is kept of each is its embedding."""

import math
import os

import pytest

BUDGET = 8 * 2**20
FITS, FAILS = 2, 4
TIMES = 64


@pytest.mark.slow
@pytest.mark.skipif(os.environ["KERAS_BACKEND"] != "tensorflow", reason="others have no limit on a CPU")
def test_a_window_of_64_times_the_largest_batch_that_fits_in_one_pass(in_child):
    def train(samples, micro_batch_size):
        import keras
        import numpy as np
        from keras import layers, ops

        import accumtune
        from accumtune.memory.device import open_device

        def in_batch_softmax(y_true, y_pred):
            one, other = ops.split(ops.normalize(y_pred, axis=-1), 2, axis=-1)
            logits = 5 * ops.matmul(one, ops.transpose(other))
            partners = ops.arange(ops.shape(logits)[0])
            return ops.mean(ops.sparse_categorical_crossentropy(partners, logits, from_logits=True))

        device = open_device("tensorflow", 8 * 2**20)
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((16384, 1)),
                layers.Dense(16, activation="relu"),
                layers.Reshape((128, 2048)),
                layers.Dense(8, activation="relu"),
                layers.Flatten(),
                layers.Dense(16),
            ]
        )
        model.compile(keras.optimizers.Adam(1e-2), in_batch_softmax)
        if micro_batch_size:
            accumtune.accumulate(model, micro_batch_size)
        x = np.random.default_rng(0).normal(size=(samples, 16384, 1)).astype("float32")
        history = model.fit(x, np.zeros((samples, 1)), batch_size=samples, epochs=3, shuffle=False, verbose=0)
        return [history.history["loss"], int(model.optimizer.iterations.numpy()), device.peak_memory_bytes()]

    one_pass = in_child(train, FITS, None, budget_bytes=BUDGET)
    assert one_pass.is_completed, one_pass.traceback
    # The negative control: twice as many run out of memory, so the largest batch that fits has fewer.
    assert in_child(train, FAILS, None, budget_bytes=BUDGET).ran_out_of_memory
    two_passes = in_child(train, TIMES * FAILS, FITS // 2, budget_bytes=BUDGET)
    assert two_passes.is_completed, two_passes.traceback
    losses, updates, peak = two_passes.result["value"]
    assert updates == 3 and peak <= BUDGET
    # Who knows nothing takes the right one of all for as likely as each other; of a micro-batch's there is one.
    assert losses[0] == pytest.approx(math.log(TIMES * FAILS), abs=0.5) and len(set(losses)) == 3
