"""The gradient noise scale against its closed form, and training that does not notice that it is measured."""

import math

import equality
import keras
import numpy as np
import pytest
from conftest import set_precision

from accumtune import GradientNoiseScale
from accumtune.accumulation import accumulate
from accumtune.accumulation.noise_scale import NoiseMeter, Norms, noise_scale

# Over 64 windows of 512 samples the estimate has a standard error of about 6 %.
DIMENSIONS, NOISE = 40, 1.0
SAMPLES = 64 * 512


def closed_form():
    """y = x·w + noise, x normal, squared loss, weights off by d: each gradient is 2 (d·x - noise) x, its mean 2 d.

    E|g|² = 4 ((D + 2)|d|² + D noise²), so tr(Σ) / |G|² = D + 1 + D noise² / |d|². Here |d| = 1.
    """
    return DIMENSIONS + 1 + DIMENSIONS * NOISE**2


def linear_problem():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(SAMPLES, DIMENSIONS))
    truth = np.ones(DIMENSIONS) / math.sqrt(DIMENSIONS)
    return x, (x @ truth + NOISE * generator.normal(size=SAMPLES))[:, None]


def measured(micro_batch_size=32, effective=512, loss="mse", **fit):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((DIMENSIONS,)), keras.layers.Dense(1, "linear", False, "zeros")])
    model.compile(keras.optimizers.SGD(0.0), loss)
    callback = GradientNoiseScale()
    x, y = linear_problem()
    accumulate(model, micro_batch_size).fit(x, y, batch_size=effective, verbose=0, callbacks=[callback], **fit)
    return callback.value


@pytest.mark.parametrize("micro_batch_size, effective", [(32, 512), (64, 512)])
def test_it_is_the_closed_form(micro_batch_size, effective):
    assert measured(micro_batch_size, effective) == pytest.approx(closed_form(), rel=0.2)


def test_a_sum_over_samples_has_the_same_noise():
    assert measured(loss=keras.losses.MeanSquaredError(reduction="sum")) == pytest.approx(closed_form(), rel=0.2)


@pytest.mark.skipif(equality.BACKEND != "tensorflow", reason="float16 on a CPU")
def test_a_loss_scale_cancels_and_windows_that_overflow_are_left_out():
    set_precision("float32")
    keras.config.set_dtype_policy("mixed_float16")
    assert measured(loss=keras.losses.MeanSquaredError()) == pytest.approx(closed_form(), rel=0.2)


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_training_is_the_same_to_the_last_bit(precision):
    set_precision(precision)
    results = []
    for callbacks in ([], [GradientNoiseScale()]):
        keras.utils.set_random_seed(3)
        layers = [keras.layers.BatchNormalization(), keras.layers.Dropout(0.3)]
        model = accumulate(equality.dense(layers=layers, optimizer=lambda: keras.optimizers.Adam(0.01))(), 2)
        data = equality.regression(samples=64)
        history = model.fit(**data, batch_size=8, epochs=3, shuffle=False, verbose=0, callbacks=callbacks)
        results.append((equality.Trained(model, {}).weights(), history.history))
    (plain, plain_history), (watched, watched_history) = results
    assert all(np.array_equal(one, other) for one, other in zip(plain, watched, strict=True))
    assert len(watched_history.pop("gradient_noise_scale")) == 3
    assert watched_history == plain_history


def test_windows_of_one_and_uneven_windows_are_not_measured():
    for samples in (14, 4):  # windows of 8 + 6 in micro-batches of 5, and of 4 in one
        model = accumulate(equality.dense()(), 5)
        data = equality.regression(samples=samples)
        history = model.fit(**data, batch_size=8, verbose=0, callbacks=[GradientNoiseScale()])
        assert math.isnan(history.history["gradient_noise_scale"][0])


def test_nobody_listens_after_fit():
    model = accumulate(equality.dense()(), 4)
    model.fit(**equality.regression(), batch_size=8, verbose=0, callbacks=[GradientNoiseScale()])
    assert model._accumtune_noise_meter is None


# The arithmetic


def test_two_batch_sizes_give_both_unknowns():
    variance, squared_gradient = 30.0, 2.0
    micro, window = squared_gradient + variance / 4, squared_gradient + variance / 16
    estimates = Norms(4, 16, micro / 4**2, window).estimates()  # a quarter of the window
    assert estimates == pytest.approx((variance, squared_gradient))
    assert noise_scale([estimates]) == pytest.approx(15)


def test_averages_come_before_the_ratio():
    """The mean of the ratios, 1.25 here, is biased."""
    assert noise_scale([(2.0, 1.0), (1.0, 2.0)]) == 1.0
    assert math.isnan(noise_scale([])) and math.isnan(noise_scale([(1.0, -0.5)]))
    assert noise_scale([(-1.0, 1.0)]) == 0.0


def test_windows_that_are_not_finite_are_left_out():
    meter = NoiseMeter()
    meter.add(Norms(4, 8, math.inf, 1.0))
    meter.add(Norms(4, 8, 1.0, math.nan))
    assert math.isnan(meter.end_epoch())
    meter.add(Norms(4, 8, (1 + 3 / 4) / 4, 1 + 3 / 8))
    assert meter.end_epoch() == pytest.approx(3)


@pytest.mark.parametrize("steps, expected", [(2, 8), (8, 2), (16, 1), (64, 1)])
def test_two_norms_in_sixteen_micro_steps_at_most(steps, expected):
    meter = NoiseMeter()
    wanted = [meter.wants([4] * steps) for _ in range(33)]
    assert wanted[0] and [i for i, is_wanted in enumerate(wanted) if is_wanted][:3] == [0, expected, 2 * expected]
    assert not meter.wants([4]) and not meter.wants([4, 3]) and not meter.wants([0, 0])
