"""The gradient noise scale equals its closed form, and measuring it does not change the training."""

import math

import equality
import keras
import numpy as np
import pytest
from precision import set_precision

from accumtune import GradientNoiseScale
from accumtune.accumulation import accumulate
from accumtune.accumulation.noise_scale import NoiseMeter, Norms, noise_scale

SAMPLES, EFFECTIVE_BATCH = 64 * 512, 512
DIMENSIONS = 200


def normal_gradients():
    """Targets far below what a linear model without bias predicts, absolute loss: each gradient is the sample itself.

    Samples are normal with mean m and unit covariance, |m|² = 2: tr(Σ) / |G|² = D / |m|² = 100.
    """
    x = np.random.default_rng(0).normal(math.sqrt(2 / DIMENSIONS), size=(SAMPLES, DIMENSIONS))
    return x, np.full((SAMPLES, 1), -1e4), DIMENSIONS / 2


def squared_loss():
    """y = x·w + noise, x normal, weights off by d: each gradient is 2 (d·x - noise) x, its mean 2 d.

    E|g|² = 4 ((D + 2)|d|² + D noise²), so tr(Σ) / |G|² = D + 1 + D noise² / |d|². Here |d| = noise = 1.
    """
    generator = np.random.default_rng(0)
    x = generator.normal(size=(SAMPLES, 40))
    truth = np.ones(40) / math.sqrt(40)
    return x, (x @ truth + generator.normal(size=SAMPLES))[:, None], 2 * 40 + 1


def measured(x, y, loss, micro_batch_size=32, epochs=1):
    """The mean over epochs of what is logged, with weights that stay at zero."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((x.shape[1],)), keras.layers.Dense(1, "linear", False, "zeros")])
    model.compile(keras.optimizers.SGD(0.0), loss)
    arguments = {"batch_size": EFFECTIVE_BATCH, "epochs": epochs, "verbose": 0, "callbacks": [GradientNoiseScale()]}
    history = accumulate(model, micro_batch_size).fit(x, y, **arguments)
    return np.mean(history.history["gradient_noise_scale"])


@pytest.mark.parametrize("micro_batch_size", [16, 64])
def test_it_is_the_closed_form(micro_batch_size):
    x, y, expected = normal_gradients()
    assert measured(x, y, "mae", micro_batch_size) == pytest.approx(expected, rel=0.2)


def test_it_is_the_closed_form_of_a_squared_loss():
    """Gradients with heavy tails: 64 measurements have a standard error of 8 to 10 %."""
    x, y, expected = squared_loss()
    assert measured(x, y, "mse", epochs=6) == pytest.approx(expected, rel=0.2)


def test_a_sum_over_samples_has_the_same_noise():
    x, y, expected = normal_gradients()
    assert measured(x, y, keras.losses.MeanAbsoluteError(reduction="sum")) == pytest.approx(expected, rel=0.2)


@pytest.mark.skipif(equality.BACKEND != "tensorflow", reason="float16 on a CPU")
def test_a_loss_scale_cancels_and_windows_that_overflow_are_left_out():
    set_precision("float32")
    keras.config.set_dtype_policy("mixed_float16")
    x, y, expected = normal_gradients()
    assert measured(1000 * x, y, "mae") == pytest.approx(expected, rel=0.2)


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


@pytest.mark.parametrize("steps, expected", [(2, 24), (8, 6), (16, 3), (64, 1)])
def test_two_norms_in_so_many_micro_steps_at_most(steps, expected):
    meter = NoiseMeter()
    wanted = [meter.wants([4] * steps) for _ in range(50)]
    assert wanted[0] and [i for i, is_wanted in enumerate(wanted) if is_wanted][:3] == [0, expected, 2 * expected]
    assert not meter.wants([4]) and not meter.wants([4, 3]) and not meter.wants([0, 0])
