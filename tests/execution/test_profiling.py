"""`accumtune.profile`: probes in processes of their own, under the budget, predict what fits."""

from dataclasses import replace

import keras
import numpy as np
import pytest

import accumtune
from accumtune import errors
from accumtune.execution.profiling import Profiler

X = np.zeros((64, 32, 32, 3), "float32")
Y = np.zeros((64, 1), "float32")


def build(hp):
    width = hp.Choice("width", [16, 32])
    model = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            keras.layers.Conv2D(width, 3, padding="same", activation="relu"),
            keras.layers.Conv2D(width, 3, padding="same", activation="relu"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(1),
        ]
    )
    model.compile("adam", "mse")
    return model


@pytest.mark.slow
def test_the_largest_micro_batch_of_a_profile_has_run_under_the_budget():
    """This model's peak jumps by half between 128 and 144: the line through 2, 8, 32 and 128 promises too much."""
    lines = []
    profile = accumtune.profile(
        build, X, Y, micro_batch_sizes=(2, 8, 32, 128, 1024), memory_budget="48MiB", on_probe=lines.append
    )
    largest = profile.largest_micro_batch_size("48MiB", accumulation_steps=2)
    assert 100 <= largest < 1024
    ran = [m for m in profile.measurements if m.is_feasible and m.accumulation_steps == 2]
    assert largest == max(measurement.micro_batch_size for measurement in ran)
    assert all(measurement.peak_memory_bytes <= 48 * 2**20 for measurement in ran)
    assert len(lines) == len({measurement.micro_batch_size for measurement in profile.measurements})
    assert profile.predict_throughput(micro_batch_size=8, accumulation_steps=4) > 0


def test_hyperparameters_reach_the_build_function():
    narrow = accumtune.profile(build, X, Y, micro_batch_sizes=(16,), hyperparameters={"width": 16})
    wide = accumtune.profile(build, X, Y, micro_batch_sizes=(16,), hyperparameters={"width": 32})
    assert wide.predict_peak_memory(16, 2) > 1.1 * narrow.predict_peak_memory(16, 2)


@pytest.mark.parametrize(
    "arguments, error",
    [
        ({"memory_budget": "much"}, errors.BudgetError),
        ({"micro_batch_sizes": (0,)}, errors.BatchSizeError),
        ({"micro_batch_sizes": (2.5,)}, errors.BatchSizeError),
    ],
)
def test_bad_arguments_are_refused_before_anything_starts(arguments, error):
    with pytest.raises(error, match="Fix:"):
        accumtune.profile(build, X, Y, **arguments)


def test_a_model_that_does_not_train_says_why():
    with pytest.raises(errors.BuildError) as caught:
        accumtune.profile(build, X[..., :2], Y, micro_batch_sizes=(2,))
    assert "Traceback" in str(caught.value) and "shape" in str(caught.value)


def in_batch_softmax(y_true, y_pred):
    ops, logits = keras.ops, keras.ops.matmul(y_pred[:, 0], keras.ops.transpose(y_pred[:, 1]))
    return ops.mean(keras.losses.sparse_categorical_crossentropy(ops.arange(ops.shape(logits)[0]), logits, True))


def build_two_towers(hp):
    pairs = keras.Input((2, 64))
    hidden = keras.layers.Dense(512, activation="relu")(pairs)
    model = keras.Model(pairs, keras.layers.Dense(16)(keras.layers.Dense(512, activation="relu")(hidden)))
    model.compile("adam", in_batch_softmax)
    return model


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="on a CPU torch counts the pages of the process")
def test_the_matrix_of_an_in_batch_loss_is_predicted_from_small_windows(monkeypatch):
    """A window of 2,048 samples, where at most 32 were probed; and what the prediction would be without."""
    pairs = np.random.default_rng(0).normal(size=(2048, 2, 64)).astype("float32"), np.zeros((2048, 1), "float32")
    profile = accumtune.profile(build_two_towers, *pairs, micro_batch_sizes=(4, 16))
    monkeypatch.setattr(Profiler._probe, "__defaults__", ((128,), None))
    (measured,) = accumtune.profile(build_two_towers, *pairs, micro_batch_sizes=(16,)).measurements
    assert measured.accumulation_steps == 128
    predicted = profile.predict_peak_memory(16, 128)
    assert predicted == pytest.approx(measured.peak_memory_bytes, rel=0.15)
    assert replace(profile, loss_bytes=(0, 0, 0)).predict_peak_memory(16, 128) < 0.7 * measured.peak_memory_bytes
