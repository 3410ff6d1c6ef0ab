"""`accumtune.profile`: probes in processes of their own, under the budget, predict what fits."""

from concurrent.futures import Future
from dataclasses import replace

import keras
import numpy as np
import pytest

import accumtune
from accumtune import errors
from accumtune.execution.profiling import Profiler, out_of_memory
from accumtune.memory.prediction.profile import Measurement, Profile
from accumtune.memory.prediction.similar_profile import SimilarProfile
from accumtune.worker.transport.outcome import Outcome

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


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() == "torch", reason="on a CPU torch counts the pages of the process")
def test_the_matrix_of_an_in_batch_loss_is_predicted_from_small_windows(monkeypatch):
    """A window of 2,048 samples, where at most 32 were probed; and what the prediction would be without."""
    pairs = np.random.default_rng(0).normal(size=(2048, 2, 64)).astype("float32"), np.zeros((2048, 1), "float32")
    profile = accumtune.profile(build_two_towers, *pairs, micro_batch_sizes=(4, 16))
    monkeypatch.setattr(Profiler._probe, "__defaults__", ((128,), None))
    *_, measured = accumtune.profile(build_two_towers, *pairs, micro_batch_sizes=(16,)).measurements
    assert (measured.micro_batch_size, measured.accumulation_steps) == (16, 128)
    predicted = profile.predict_peak_memory(16, 128)
    assert predicted == pytest.approx(measured.peak_memory_bytes, rel=0.15)
    assert replace(profile, loss_bytes=(0, 0, 0)).predict_peak_memory(16, 128) < 0.7 * measured.peak_memory_bytes


class Widths:
    """Models of which parameters, slots and gradients, and activations, grow with their width at rates of their own."""

    backend = "tensorflow"

    def __init__(self):
        self.probed = []
        self.optimizer = "Adam"

    @staticmethod
    def peak_bytes(width, size, steps):
        return 1000 * (width**2 * (4 if steps == 1 else 5) + 30 * width * size)

    def submit(self, directory, environment=None, timeout_seconds=None, is_memory_limited=False):
        task, arguments = directory.read_task()
        width, size = arguments["hyperparameters"]["values"]["width"], arguments.get("micro_batch_size")
        result = {
            "signature": f"width_{width}", "device": "CPU", "static_bytes": 1000 * width**2, "sample_bytes": 0,
            "activation_bytes": 1000 * width, "batch_coupled_layers": [], "precision_policy": "float32",
            "sample_shapes": None, "identity": {"optimizer": self.optimizer},
        }  # fmt: skip
        if task == "probe":
            self.probed.append((width, size))
            limit, measured = arguments["memory_budget_bytes"], []
            for steps in arguments["accumulation_steps"]:
                peak = self.peak_bytes(width, size, steps)
                peak = peak if peak <= limit else None
                measured.append(Measurement(size, steps, peak, 1e-3 * (3 + size) * steps, "made", limit).to_dict())
            result = {"measurements": measured}
        future = Future()
        future.set_result(Outcome("completed", result))
        return future


def profiler_of(widths, folder, budget_bytes, only_listed=True):
    return Profiler(
        widths, folder / "payload", folder / "scratch", folder / "profiles", memory_budget_bytes=budget_bytes,
        micro_batch_sizes=(8, 32, 128, 512), only_listed=only_listed,
    )  # fmt: skip


@pytest.mark.parametrize("budget_bytes, most", [(2**34, 1), (2**30, 2)])
def test_a_new_width_takes_one_probe_where_all_fits_and_two_where_not(tmp_path, budget_bytes, most):
    widths, controls = Widths(), Widths()
    profiler = profiler_of(widths, tmp_path / "search", budget_bytes)
    control = profiler_of(controls, tmp_path / "control", budget_bytes, only_listed=False)
    for width in (100, 70, 130, 60, 200):
        space = {"space": [], "values": {"width": width}}
        profile, thorough = profiler.profile(space), control.profile(space)
        for size in (8, 32, 128, 512):
            for steps in (1, 4):
                truth = Widths.peak_bytes(width, size, steps)
                assert profile.predict_peak_memory(size, steps) == pytest.approx(truth, rel=0.02)
                assert profile.fits(size, steps, budget_bytes) == thorough.fits(size, steps, budget_bytes)
                seconds = size * steps / profile.predict_throughput(size, steps)
                assert seconds == pytest.approx(1e-3 * (3 + size) * steps, rel=0.05)
        assert profiler_of(widths, tmp_path / "search", budget_bytes).profile(space) == profile  # when resumed
        assert all(measurement.is_feasible for measurement in profile.measurements)
    probes = [sum(probed == width for probed, _ in widths.probed) for width in (70, 130, 60, 200)]
    assert max(probes) <= most and len(controls.probed) > len(widths.probed)


def test_layers_with_larger_outputs_begin_with_a_smaller_micro_batch():
    pairs = [(size, steps) for size in (8, 512) for steps in (1, 2)]
    points = [Measurement(*pair, Widths.peak_bytes(100, *pair), 0.1, "made") for pair in pairs]
    profile, sizes = Profile(points, device="CPU", memory_source="made"), (8, 32, 128, 512)
    budget = int(1.2 * Widths.peak_bytes(100, 512, 2))
    assert SimilarProfile(profile, growth=1.0, activation_growth=1.0).first_probe_size(budget, sizes) == 512
    assert SimilarProfile(profile, growth=0.5, activation_growth=4.0).first_probe_size(budget, sizes) == 128
    # Where nobody knows the outputs, only much room is enough.
    assert SimilarProfile(profile, growth=1.0).first_probe_size(budget, sizes) == 128
    assert SimilarProfile(profile, growth=1.0).first_probe_size(2 * budget, sizes) == 512
    assert SimilarProfile(profile, growth=1.0, activation_growth=1.0).first_probe_size(1000, sizes) == 8
    failed = profile.with_measurement(out_of_memory(512, 1, budget))
    assert SimilarProfile(failed, growth=1.0, activation_growth=1.0).first_probe_size(budget, sizes) == 128


def test_a_model_that_is_not_like_the_one_before_is_probed_as_the_first(tmp_path):
    widths = Widths()
    profiler = profiler_of(widths, tmp_path, 2**34)
    profiler.profile({"space": [], "values": {"width": 100}})
    # Its parameters alone would take more than it takes with 512 samples.
    widths.peak_bytes = lambda width, size, steps: 1000 * (width**2 + 30 * width * size) // 1000
    profile = profiler.profile({"space": [], "values": {"width": 200}})
    assert {size for width, size in widths.probed if width == 200} == {8, 512}
    assert profile.predict_peak_memory(8) == widths.peak_bytes(200, 8, 1)


def few_at_once(y_true, y_pred):
    if y_pred.shape[0] is not None and y_pred.shape[0] >= 64:
        raise ValueError("at most 63 samples")
    return in_batch_softmax(y_true, y_pred)


def build_few_at_once(hp):
    model = build_two_towers(hp)
    model.compile("adam", few_at_once)
    return model


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="on a CPU torch counts the pages of the process")
def test_a_loss_that_fails_on_made_up_outputs_is_named_and_the_rest_is_profiled():
    pairs, lines = np.zeros((8, 2, 64), "float32"), []
    profile = accumtune.profile(
        build_few_at_once, pairs, np.zeros((8, 1)), micro_batch_sizes=(2,), on_probe=lines.append
    )
    assert "ValueError: at most 63 samples" in lines[0] and "unknown" in lines[0]
    assert profile.measured_sizes() == [2] and profile.loss_bytes == (0, 0, 0)


def test_a_profile_of_another_optimizer_whose_slots_differ_is_not_similar(tmp_path):
    widths = Widths()
    profiler = profiler_of(widths, tmp_path, 2**34)
    for widths.optimizer, width, expected in (("Adam", 100, {8, 512}), ("SGD", 101, {8, 512}), ("Adam", 102, {512})):
        profiler.profile({"space": [], "values": {"width": width}})
        assert {size for probed, size in widths.probed if probed == width} == expected
