"""Predicting the memory of a size that never ran, from the probes' requests to TensorFlow's allocator."""

import json
import os

import pytest

from accumtune.memory.cpu_simulation.allocation_trace import Lines, Trace
from accumtune.memory.cpu_simulation.rehearsal import Rehearsal
from accumtune.memory.prediction.profile import Measurement, Profile

MIB = 2**20
tensorflow_only = pytest.mark.skipif(os.environ["KERAS_BACKEND"] != "tensorflow", reason="TensorFlow's allocator")


def make_probe():
    """As a closure, so that it travels by value."""

    def traced_probe(micro_batch_size, budget_bytes):
        import keras
        import numpy as np

        from accumtune.memory.device import open_device
        from accumtune.memory.probe import probe, trace_of

        device = open_device(budget_bytes=budget_bytes)
        recorder = device.recorder()
        keras.utils.set_random_seed(0)
        layers = keras.layers
        shape = (24, 24, 3)
        hidden = [
            layers.Conv2D(64, 3, activation="relu"), layers.Conv2D(96, 3, activation="relu"),
            layers.MaxPooling2D(), layers.Conv2D(64, 3, activation="relu"), layers.Flatten(),
        ]  # fmt: skip
        model = keras.Sequential([layers.Input(shape), *hidden, layers.Dense(10)])
        model.compile("adam", "mse", metrics=["mae"])

        def batches(count):
            return np.ones((count, *shape), "float32"), np.zeros((count, 10), "float32"), None

        measurements = probe(
            model, batches, micro_batch_size=micro_batch_size, accumulation_steps=(1, 2), device=device,
            recorder=recorder,
        )  # fmt: skip
        trace = trace_of(recorder, measurements)
        return [[m.to_dict() for m in measurements], trace and trace.to_dict()]

    return traced_probe


@pytest.fixture
def probed(in_child):
    """`probed(size)` gives the measurements and the trace of a probe, none where it died of its limit."""

    def run(micro_batch_size, budget_bytes=None):
        outcome = in_child(make_probe(), micro_batch_size, budget_bytes, budget_bytes=budget_bytes)
        if budget_bytes is not None and outcome.status == "killed":  # oneDNN goes on without the memory it asked for
            return [], None
        assert outcome.is_completed, f"{outcome.reason}\n{outcome.traceback}"
        measurements, trace = outcome.result["value"]
        return [Measurement.from_dict(m) for m in measurements], trace and Trace.from_dict(trace)

    return run


def peaks_of(measurements):
    return {m.accumulation_steps: m.peak_memory_bytes for m in measurements}


@pytest.mark.slow
@tensorflow_only
def test_two_small_probes_tell_the_peak_of_a_large_size(probed):
    small, large = probed(3), probed(8)
    actual = peaks_of(probed(70)[0])
    rehearsal = Rehearsal([small[1], large[1]])
    for steps in (1, 2):
        assert rehearsal.peak_bytes(70, steps) == pytest.approx(actual[steps], rel=0.025)


@tensorflow_only
def test_a_trace_that_lacks_something_is_not_believed(value_in_child):
    def probe_recorded_too_late():
        import keras
        import numpy as np
        import tensorflow as tf

        from accumtune.memory.device import open_device
        from accumtune.memory.probe import probe, trace_of

        device = open_device()
        held = tf.zeros([2**20])  # 4 MiB that nobody records
        recorder = device.recorder()
        model = keras.Sequential([keras.layers.Input((8,)), keras.layers.Dense(64)])
        model.compile("adam", "mse")
        measurements = probe(
            model, lambda count: (np.zeros((count, 8)), np.zeros((count, 64)), None), micro_batch_size=4,
            accumulation_steps=(1, 2), device=device, recorder=recorder,
        )  # fmt: skip
        return [trace_of(recorder, measurements) is None, len(held)]

    assert value_in_child(probe_recorded_too_late) == [True, 2**20]


@tensorflow_only
@pytest.mark.slow
def test_a_limit_is_rehearsed_too(probed):
    probes = [probed(size, 64 * MIB) for size in (4, 16)]
    traces = [trace for _, trace in probes]
    rehearsal = Rehearsal(traces)
    limit = next(mib for mib in range(16, 400) if rehearsal.peak_bytes(60, 2, mib * MIB) is not None)
    above, below = (probed(60, mib * MIB)[0] for mib in (round(1.06 * limit), round(0.94 * limit)))
    assert above and all(m.is_feasible for m in above)
    profile = Profile([m for some, _ in probes for m in some], "CPU:0", "tensorflow allocator", traces=traces)
    for point in above:
        predicted = profile.predict_peak_memory(60, point.accumulation_steps, point.memory_limit_bytes)
        assert predicted == pytest.approx(point.peak_memory_bytes, rel=0.025)
    assert not (below and all(m.is_feasible for m in below))


@tensorflow_only
def test_a_device_runs_one_operation_at_a_time_and_leaves_graphs_as_they_are(value_in_child):
    def is_serial(is_opened):
        import tensorflow as tf

        from accumtune.memory.device import open_device

        if is_opened:
            open_device("tensorflow")

        @tf.function
        def count(limit):
            return tf.while_loop(lambda i: i < limit, lambda i: [i + 1], [0])

        loops = [op for op in count.get_concrete_function(tf.constant(3)).graph.get_operations() if "While" in op.type]
        return [
            tf.config.threading.get_inter_op_parallelism_threads(),
            ["_lower_using_switch_merge" in op.node_def.attr for op in loops],
            tf.config.optimizer.get_experimental_options().get("disable_meta_optimizer"),
        ]

    assert value_in_child(is_serial, True) == [1, [False], True]
    # The negative control: TensorFlow's default takes loops apart and rewrites graphs.
    assert value_in_child(is_serial, False)[1:] == [[True], False]


def trace(size, *requests, phase=(1, 0)):
    """Makes the trace of a training that requests each of these (name, bytes) and frees all at its end."""
    count = len(requests)
    events = [bytes_ for _, bytes_ in requests] + [-1 - place for place in range(count)]
    return Trace(size, tuple(events), tuple(name for name, _ in requests), (phase, (2, len(events))))


def test_a_request_is_of_one_size_or_grows_along_a_line():
    small = trace(4, ("conv", 4000), ("workspace", 9000), ("padded", 1400), ("", 400), ("", 64))
    large = trace(16, ("conv", 16000), ("workspace", 9000), ("padded", 5000), ("", 64), ("", 1600))
    assert Lines.through(large, small).at(100).tolist() == [100000, 9000, 30200, 64, 10000]
    assert Lines.through(small, large).at(100).tolist() == [100000, 9000, 30200, 10000, 64]
    assert Lines.through(large, small).at(4).tolist()[:3] == [4000, 9000, 1400]


def test_what_another_algorithm_asks_for_at_small_sizes_says_nothing_of_large_ones():
    assert Lines.through(trace(4, ("workspace", 9000)), trace(1, ("workspace", 100))).at(64).tolist() == [9000]
    assert Lines.through(trace(1, ("workspace", 100)), trace(4, ("workspace", 9000))).at(64).tolist() == [9000]


def test_a_profile_with_traces_rehearses_and_survives_a_file():
    traces = [trace(size, ("activations", size * MIB), ("weights", 3 * MIB)) for size in (2, 8)]
    points = [Measurement(size, steps, (size + 3) * MIB, 0.1, "made", 100 * MIB) for size in (2, 8) for steps in (1, 2)]
    profile = Profile(points, "CPU:0", "made", memory_budget_bytes=100 * MIB, traces=traces)
    again = Profile.from_dict(json.loads(json.dumps(profile.to_dict())))
    assert again == profile and again.is_rehearsed
    assert again.predict_peak_memory(20, 1) == pytest.approx(23 * MIB, abs=1024)
    assert again.fits(20, 1, 100 * MIB) and not again.fits(20, 1, 22 * MIB)
    # Between traced sizes the prediction is off by what it was off there; dropped traces' sizes say nothing of others.
    measured = [(1, 90), (2, 7), (8, 15), (32, 47)]  # the rehearsal: 5, 11 and 35
    points = [Measurement(size, steps, mib * MIB, 0.1, "made", None) for size, mib in measured for steps in (1, 2)]
    traces.append(trace(32, ("activations", 32 * MIB), ("weights", 3 * MIB)))
    moved = Profile(points, "CPU:0", "made", traces=traces)
    assert moved.predict_peak_memory(8, 1) == 15 * MIB
    assert moved.predict_peak_memory(20, 1) == pytest.approx((23 + (4 + 12) / 2) * MIB, rel=0.001)
    assert moved.predict_peak_memory(64, 1) == pytest.approx((67 + 12) * MIB, rel=0.001)
    # One trace tells nothing of what grows.
    assert not Profile(points, "CPU:0", "made", traces=traces[:1]).is_rehearsed
