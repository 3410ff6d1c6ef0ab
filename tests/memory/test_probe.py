"""Probes run real updates in real processes; sizes that are predicted to fit run under the limit."""

import os

import pytest

from accumtune.memory.machine import device_memory
from accumtune.memory.prediction.exploration import next_probe_size
from accumtune.memory.prediction.profile import Measurement, Profile

MIB = 2**20
BACKEND = os.environ["KERAS_BACKEND"]


def make_probe_task():
    """As a closure, so that it travels by value."""

    def probe_task(kind, micro_batch_size, accumulation_steps, budget_bytes):
        import keras
        import numpy as np

        from accumtune.memory.device import open_device
        from accumtune.memory.probe import probe

        layers = keras.layers
        device = open_device(budget_bytes=budget_bytes)

        class Workspace(layers.Layer):
            """Needs 40 MiB whatever the batch."""

            def call(self, x):
                noise = keras.random.uniform((40, 512, 512), 0.9, 1.1)
                return x * keras.ops.mean(noise)

        if kind == "attention":  # quadratic in the sequence, so that activations are nearly all there is
            inputs = layers.Input((256, 8))
            hidden = layers.MultiHeadAttention(2, 4)(inputs, inputs)
            outputs, shape = layers.Dense(1)(layers.GlobalAveragePooling1D()(hidden)), (256, 8)
        elif kind == "workspace":
            inputs = layers.Input((64,))
            outputs, shape = layers.Dense(1)(Workspace()(layers.Dense(2048, activation="relu")(inputs))), (64,)
        else:
            inputs = layers.Input((256,))
            outputs, shape = layers.Dense(1)(layers.Dense(2048, activation="relu")(inputs)), (256,)
        model = keras.Model(inputs, outputs)
        model.compile("adam", "mse")

        def batches(count):
            return np.zeros((count, *shape), "float32"), np.zeros((count, 1), "float32"), None

        measurements = probe(
            model, batches, micro_batch_size=micro_batch_size, accumulation_steps=accumulation_steps, device=device
        )
        return [measurement.to_dict() for measurement in measurements]

    return probe_task


@pytest.fixture
def probed(in_child):
    """Measurements of one probe; a process that died of its limit counts as out of memory."""

    def run(kind, micro_batch_size, accumulation_steps=(1, 2, 4), budget_bytes=None):
        arguments = (kind, micro_batch_size, accumulation_steps, budget_bytes)
        outcome = in_child(make_probe_task(), *arguments, budget_bytes=budget_bytes)
        if outcome.status == "killed" and "SIGSEGV" in outcome.reason:
            return [Measurement(micro_batch_size, accumulation_steps[0], None, None, "", budget_bytes)]
        assert outcome.is_completed, f"{outcome.reason}\n{outcome.traceback}"
        return [Measurement.from_dict(values) for values in outcome.result["value"]]

    return run


def test_a_probe_measures_each_number_of_steps(probed):
    one, two, four = probed("dense", 16)
    assert [m.accumulation_steps for m in (one, two, four)] == [1, 2, 4]
    assert all(m.is_feasible and m.seconds_per_update > 0 and m.memory_limit_bytes is None for m in (one, two, four))
    parameters = 4 * (256 * 2048 + 2048 + 2048 + 1)
    if BACKEND == "tensorflow":
        # Parameters, two slots and gradients; with more steps, accumulators.
        assert one.peak_memory_bytes >= 4 * parameters
        assert two.peak_memory_bytes >= one.peak_memory_bytes


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow limits a CPU's memory")
def test_a_probe_that_runs_out_of_memory_says_so(probed):
    measurements = probed("attention", 64, (1, 2), 24 * MIB)
    assert not measurements[-1].is_feasible and measurements[-1].peak_memory_bytes is None
    assert measurements[-1].memory_limit_bytes == 24 * MIB


@pytest.mark.skipif(
    BACKEND == "tensorflow" or device_memory().is_gpu, reason="backends that cannot limit a CPU's memory"
)
def test_a_backend_without_limits_ends_as_one_with_them(probed):
    (over,) = probed("dense", 16, (1, 2), MIB)  # the parameters alone take 2 MiB
    assert not over.is_feasible and over.memory_limit_bytes == MIB
    # The negative control: with room enough it is measured.
    one, two = probed("dense", 16, (1, 2), 1024 * MIB)
    assert one.is_feasible and two.is_feasible and two.memory_limit_bytes == 1024 * MIB


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow limits a CPU's memory")
@pytest.mark.parametrize(
    ("kind", "budget_mib"), [("attention", 96), pytest.param("workspace", 120, marks=pytest.mark.slow)]
)
def test_what_is_promised_runs_under_the_limit(probed, kind, budget_mib):
    budget = budget_mib * MIB
    profile = Profile((), "CPU:0", "tensorflow allocator", memory_budget_bytes=budget)
    while (size := next_probe_size(profile, budget, [1, 8, 64, 512])) is not None:
        for measurement in probed(kind, size, (1, 2), budget):
            profile = profile.with_measurement(measurement)
    largest = profile.largest_micro_batch_size(accumulation_steps=2)
    assert largest is not None
    (picked,) = probed(kind, largest, (2,), budget)
    assert picked.is_feasible and picked.peak_memory_bytes <= budget
