"""Verifying a configuration on this machine: its peak and speed compared with the configuration's."""

from types import SimpleNamespace

import pytest
from made_config import MIB, build_model, config_of, data, hyperparameters

from accumtune.config import verification
from accumtune.errors import BuildError, VerificationError


def measured(peak=19 * MIB, device="CPU", speed=1000.0):
    return {"peak_memory_bytes": peak, "device": device, "throughput_samples_per_second": speed}


def test_what_holds_is_told_with_its_differences():
    config = config_of(
        peak_memory_bytes=19 * MIB, versions={"keras": "1.0", "unheard": "1"}, backend="jax", device="GPU",
        precision_policy="mixed_float16",
    )  # fmt: skip
    told = verification.compared(config, measured(20 * MIB), "tensorflow", 0.1)
    assert told.peak_memory_bytes == 20 * MIB and told.throughput_samples_per_second == 1000
    assert [line.split(":")[0] for line in told.differences] == ["backend", "device", "precision policy", "keras"]
    for text in ("promised 19.0 MiB (+5.3 %)", "promised 1,234 samples/s (-19.0 %)", "64.0 MiB: kept",
                 "jax in the search, tensorflow here"):  # fmt: skip
        assert text in str(told)


@pytest.mark.parametrize(("peak", "word"), [(19 * MIB, "more"), (11 * MIB, "less")])
def test_a_peak_that_is_not_the_promised_one_is_an_error(peak, word):
    config = config_of(peak_memory_bytes=15 * MIB, backend="jax")
    with pytest.raises(VerificationError, match=f"27 % {word} than promised.*backend: jax") as error:
        verification.compared(config, measured(peak), "tensorflow", 0.1)
    assert "at most 10 % more or less than the 15.0 MiB" in error.value.expected
    assert ("for_budget('64.0 MiB'" in error.value.fix) == (word == "more")
    assert "peak_tolerance=0.28" in error.value.fix
    assert verification.compared(config, measured(peak), "tensorflow", 0.28)


def test_what_does_not_fit_is_an_error():
    tight = config_of(memory_budget_bytes=16 * MIB, peak_memory_bytes=15 * MIB)
    with pytest.raises(VerificationError, match="does not fit in 16.0 MiB on CPU"):  # a backend without a limit
        verification.compared(tight, measured(17 * MIB), "tensorflow", 0.5)
    with pytest.raises(VerificationError, match="does not fit in 16.0 MiB"):
        verification.compared(tight, None, "tensorflow", 0.1)
    with pytest.raises(VerificationError, match="does not fit in its memory"):
        verification.compared(config_of(memory_budget_bytes=None), None, "tensorflow", 0.1)


def test_the_ghost_batch_is_kept_where_a_configuration_is_tried(monkeypatch):
    from accumtune.execution import standalone_training

    tried = []

    def train_isolated(hypermodel, *args, **kwargs):
        model = hypermodel.build(hyperparameters(config))
        tried.append(model._accumtune_accumulation.ghost_batch_size)
        return SimpleNamespace(ran_out_of_memory=True)

    monkeypatch.setattr(standalone_training, "train_isolated", train_isolated)
    config = config_of(ghost_batch_size=4, seed=1)
    for attempt in (config.verify, config.reproduce):
        with pytest.raises(VerificationError):
            attempt(build_model, *data())
    assert tried == [4, 4]


WIDE = {"width": 2048, "learning_rate": 0.01}


def test_real_updates_are_measured_under_the_budget():
    config = config_of(hyperparameters=WIDE, peak_memory_bytes=None, memory_budget_bytes=64 * MIB)
    told = config.verify(build_model, *data())
    assert "nothing was promised" in str(told) and told.throughput_samples_per_second > 0
    # Parameters, accumulators and gradients of 64 x 2048 + 2048 + 2048 + 1 numbers.
    assert told.peak_memory_bytes > 3 * 4 * 135_169
    promise = config_of(hyperparameters=WIDE, peak_memory_bytes=told.peak_memory_bytes, memory_budget_bytes=64 * MIB)
    again = promise.verify(build_model, *data())
    assert again.peak_memory_bytes == pytest.approx(told.peak_memory_bytes, rel=0.1)


@pytest.mark.slow
def test_a_real_lack_of_memory_is_an_error():
    config = config_of(hyperparameters={"width": 65536}, peak_memory_bytes=4 * MIB, memory_budget_bytes=8 * MIB)
    with pytest.raises(VerificationError, match="does not fit in 8.0 MiB"):
        config.verify(build_model_too_wide, *data(64))


def test_a_model_that_does_not_train_is_no_lack_of_memory():
    x, y = data(64)
    with pytest.raises(BuildError):
        config_of(hyperparameters={"width": 8}).verify(build_model, x[:, :3], y)


def build_model_too_wide(hp):
    import keras

    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(hp.Int("width", 4, 2**17)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model
