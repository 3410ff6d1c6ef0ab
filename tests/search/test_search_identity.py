"""Changes with which a session may resume a search, and changes that are refused."""

import json
import linecache
import subprocess
import sys
import types
from pathlib import Path

import keras
import keras_tuner
import numpy as np
import pytest
from made_tuner import X, Y, make
from models import dense

from accumtune.errors import SearchDirectoryError
from accumtune.memory.prediction.profile import Measurement, Profile
from accumtune.search import search_space
from accumtune.search.results import search_results as results
from accumtune.search.results.selection import select
from accumtune.search.results.winner_verification import predicted_choice
from accumtune.search.session import search_identity
from accumtune.tracking.journal import Journal, read_search
from accumtune.tracking.small_files import write_atomically
from accumtune.worker.identity.data_identity import content_digest, describe_arrays
from accumtune.worker.identity.training_identity import describe_training, exact, text_of, text_of_method
from accumtune.worker.transport.task_directory import SearchDirectory

# Digests


def test_an_array_is_its_content_in_any_order_and_at_any_place():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(300, 7)).astype("float32"), generator.integers(0, 3, 300)
    order = generator.permutation(300)
    same = content_digest((x, y), is_ordered=False)
    assert content_digest((x[order], y[order]), is_ordered=False) == same
    assert content_digest((np.asfortranarray(x), y), is_ordered=False) == same
    ordered = content_digest((x, y), is_ordered=True)
    assert content_digest((x[order], y[order]), is_ordered=True) != ordered
    others = [(x, y[order]), (x[:, ::-1], y), (x[:299], y[:299]), (x.astype("float64"), y), (x, np.roll(y, 1))]
    changed = x.copy()
    changed[17, 3] += 1e-3
    assert len({content_digest(tree, is_ordered=False) for tree in [(x, y), *others, (changed, y)]}) == 7
    objects = np.array([{"a": 1}, "b"], object)
    assert content_digest(objects, is_ordered=True) != content_digest(objects[::-1], is_ordered=True)
    long = np.empty(2, object)
    long[:] = [np.zeros(2000), np.zeros(2000)]
    before = content_digest(long, is_ordered=True)
    long[0][1000] = 1.0  # what repr leaves out
    assert content_digest(long, is_ordered=True) != before


def test_sparse_and_ragged_data_are_their_content():
    sparse = pytest.importorskip("scipy.sparse")
    one, other = sparse.eye(4, format="csr"), 2 * sparse.eye(4, format="coo")
    texts = [describe_arrays((data, Y[:4], None), is_ordered=False)["content"] for data in (one, one.copy(), other)]
    assert texts[0] == texts[1] != texts[2]


ALPHA = 0.25


def make_loss(gamma, modes=("a", "b")):
    def loss(y, z):
        """The same with another docstring."""
        return ALPHA * keras.ops.mean(abs(y - z) ** gamma) if "sum" not in {"x", "y", *modes} else 0.0

    return loss


class Halving(keras.callbacks.Callback):
    def __init__(self, factor=0.5, path="/tmp/2026-01-01"):
        super().__init__()
        self.factor, self.path, self.started = factor, path, 1.8e9

    def on_epoch_end(self, epoch, logs=None):
        self.model.optimizer.learning_rate *= self.factor


OBJECTS = {
    "loss": lambda: make_loss(2), "gamma": lambda: make_loss(3), "callback": Halving, "factor": lambda: Halving(0.25),
    "stopping": lambda: keras.callbacks.EarlyStopping(patience=3),
    "patience": lambda: keras.callbacks.EarlyStopping(patience=4),
    "schedule": lambda: keras.optimizers.schedules.CosineDecay(0.1, 10),
    "rate": lambda: keras.optimizers.schedules.CosineDecay(0.2, 10), "sets": lambda: {"b", "a", "c"},
    "keras": lambda: keras.losses.binary_crossentropy, "weights": lambda: {0: 1.0, 1: 2.5},
}  # fmt: skip


def texts():
    return {name: text_of(made()) for name, made in OBJECTS.items()}


def test_texts_differ_with_what_decides_and_are_the_same_in_another_process(monkeypatch):
    here = texts()
    assert len(set(here.values())) == len(here)
    assert text_of(Halving(path="/tmp/other")) == here["callback"], "where it writes decides nothing"
    script = f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent)!r}); " \
             "import test_search_identity as t; " \
             "print(json.dumps(t.texts()))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == here
    monkeypatch.setattr(f"{__name__}.ALPHA", 0.5)
    assert text_of(make_loss(2)) != here["loss"]


def tuned_fit(values, extra=""):
    namespace = {}
    source = f"def fit(self, hp, model, **kwargs):\n    {extra}\n    return hp.Choice('e', {values})\n"
    name = f"<cell {values} {extra}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    exec(compile(source, name, "exec"), namespace)
    return namespace["fit"]


class Margin(keras.losses.Loss):
    """As most are written: without a get_config."""

    def __init__(self, margin):
        super().__init__(name="margin")
        self.margin = margin

    def call(self, y_true, y_pred):
        return keras.ops.mean(keras.ops.relu(self.margin - y_true * y_pred), axis=-1)


class Above(keras.metrics.Mean):
    def __init__(self, threshold):
        super().__init__(name="above")
        self.threshold = threshold


def test_the_arguments_of_a_loss_or_metric_count_without_a_get_config():
    for kind in (Margin, Above):
        used = kind(0.5)
        used(np.ones((2, 1)), np.ones((2, 1)))
        assert text_of(kind(0.5)) == text_of(used) != text_of(kind(0.2))


def test_a_value_more_is_no_edit_of_a_fit():
    assert text_of(tuned_fit([1, 2]), by_source=True) == text_of(tuned_fit([1, 2, 3]), by_source=True)
    assert text_of(tuned_fit([1]), by_source=True) != text_of(tuned_fit([1], "self.x = 1"), by_source=True)


def described(rate=0.1, drop=0.1, loss=None, alpha=1.0):
    model = dense(learning_rate=rate, layers=(keras.layers.Dropout(drop), keras.layers.LeakyReLU(alpha)))
    if loss is not None:
        model.compile(model.optimizer, loss)
    return describe_training(model, {"effective_batch_size": 8})


def test_models_that_train_differently_are_told_apart_part_by_part():
    one = described()
    assert described() == one, "although Keras has counted on"
    changes = {
        "layers": described(drop=0.2), "optimizer's learning_rate": described(rate=0.2),
        "loss": described(loss=make_loss(2)),
    }  # fmt: skip
    for part, other in changes.items():
        (line,) = search_identity.differences(one, other)
        assert line.startswith(part)
    assert search_identity.differences(one, described(alpha=2.0))
    assert exact(1.0) != exact(2.0)


STRENGTH, MODE, SETTINGS = 1.0, "l1", types.ModuleType("settings_of_the_user")
SETTINGS.__file__, SETTINGS.gamma = __file__, 1.0
SETTINGS.unused = 1.0


def helper(values):
    return STRENGTH * values


class Options:
    alpha = 1.0

    def __init__(self):
        self.beta = 1.0


OPTIONS = Options()


class Own(keras.Model):
    """Its config knows none of what its methods use."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1)

    def call(self, x):
        return self.dense(x)

    def train_step(self, data):
        return {"loss": helper(1.0), "mode": MODE, "gamma": SETTINGS.gamma, "beta": OPTIONS.beta, "one": self.one()}

    @staticmethod
    def one():
        return Options.alpha


def scaled(values):
    return keras.ops.sum(values) * STRENGTH


class Descent(keras.optimizers.SGD):
    def update_step(self, gradient, variable, learning_rate):
        super().update_step(helper(gradient), variable, learning_rate)


class Slower(keras.optimizers.schedules.LearningRateSchedule):
    def __call__(self, step):
        return 0.1 / helper(step + 1.0)

    def get_config(self):
        return {}


def own_model():
    model = Own()
    model.compile("sgd", "mse")
    return model


def regularized():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_regularizer=scaled, activation=helper)])
    model.compile("sgd", "mse")
    return model


def optimized(optimizer):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer, "mse", weighted_metrics=[scaled])
    return model


class FitWith(keras_tuner.HyperModel):
    def __init__(self, patience=2):
        super().__init__()
        self.patience, self.width = patience, 3

    def build(self, hp):
        return hp.Choice("width", [self.width])

    def stopping(self):
        return keras.callbacks.EarlyStopping(patience=self.patience, min_delta=STRENGTH)

    def fit(self, hp, model, *args, **kwargs):
        return model.fit(*args, callbacks=[self.stopping()], **kwargs)


@pytest.mark.parametrize(
    "name, value, parts",
    [
        (f"{__name__}.STRENGTH", 2.0, {"own", "regularized", "descent", "slower", "fit"}),
        (f"{__name__}.MODE", "l2", {"own"}),
        (f"{__name__}.SETTINGS.gamma", 2.0, {"own"}),
        (f"{__name__}.OPTIONS.beta", 2.0, {"own"}),
        (f"{__name__}.Options.alpha", 2.0, {"own"}),
        (f"{__name__}.SETTINGS.unused", 2.0, set()),
    ],
)
def test_what_the_user_s_code_uses_counts_wherever_it_is_kept(monkeypatch, name, value, parts):
    """A global of a train_step, a setting of a regularizer, of an optimizer or of what a HyperModel's fit calls."""

    def described():
        models = {"own": own_model(), "regularized": regularized(), "descent": optimized(Descent(0.1)),
                  "slower": optimized(keras.optimizers.SGD(Slower()))}  # fmt: skip
        return {**{name: describe_training(model, {}) for name, model in models.items()},
                "fit": {"fit": text_of_method(FitWith(), "fit")}}  # fmt: skip

    before = described()
    assert described() == before
    monkeypatch.setattr(name, value)
    assert {part for part, texts in described().items() if texts != before[part]} == parts


LAMBDAS = """
import keras
model = keras.Sequential([
    keras.Input((4,)), keras.layers.Lambda(lambda x: x * 2.0), keras.layers.Dense(1, activation=lambda x: x - 1.0)
])
model.compile("sgd", "mse")
"""


@pytest.mark.filterwarnings("ignore:.*lambda")
def test_a_line_above_a_lambda_is_no_other_model():
    """Keras's config has its code with the line numbers."""

    def described(script):
        namespace = {"__name__": "__main__"}
        exec(compile(script, "script.py", "exec"), namespace)
        return describe_training(namespace["model"], {})

    one = described(LAMBDAS)
    assert described("# a comment\n" + LAMBDAS) == one
    assert described(LAMBDAS.replace("2.0", "3.0")) != one != described(LAMBDAS.replace("1.0", "3.0"))


def test_of_a_hypermodel_only_what_its_fit_uses_counts():
    one, other = FitWith(), FitWith()
    other.width = 4
    assert text_of_method(one, "fit") == text_of_method(other, "fit") != text_of_method(FitWith(3), "fit")


def test_a_schedule_in_a_callback_counts():
    schedules = [keras.optimizers.schedules.CosineDecay(rate, 9) for rate in (0.1, 0.1, 0.2)]
    one, same, other = (text_of(keras.callbacks.LearningRateScheduler(schedule)) for schedule in schedules)
    assert one == same != other


# Spaces


def choice(values, kind="Choice", **config):
    return {"class_name": kind, "config": {"name": "a", "conditions": [], "values": values, **config}}


def number(low, high, step=1):
    config = {"name": "a", "conditions": [], "min_value": low, "max_value": high, "step": step, "sampling": "linear"}
    return {"class_name": "Int", "config": config}


@pytest.mark.parametrize(
    "before, now, is_grown",
    [
        (choice([1, 2]), choice([1, 2, 3]), True), (choice([1, 2]), choice([0, 2, 1]), True),
        (choice([1, 2]), choice([1]), False), (number(1, 5), number(0, 9), True), (number(1, 5), number(2, 5), False),
        (number(1, 5), number(1, 5, 2), False), (choice([1, 2]), number(1, 2), False),
    ],
)  # fmt: skip
def test_a_space_may_grow(before, now, is_grown):
    assert (search_space.grown_space([before], [now]) == []) is is_grown
    if is_grown:
        assert search_space.with_space([before], [now]) == [now]


# Searches

MIB = 2**20
OBJECTIVE = {"name": "val_loss", "direction": "min"}


def build(rates=(0.1, 0.3), drop=0.0):
    return lambda hp: dense(learning_rate=hp.Choice("learning_rate", rates), layers=(keras.layers.Dropout(drop),))


def batches():
    """Returns data that a generator without a seed draws again each time."""
    x = np.random.default_rng().normal(size=(64, 16)).astype("float32")
    return x, (x.sum(axis=1, keepdims=True) > 0).astype("float32")


def run(tmp_path, *, epochs=1, x=X, y=Y, validation_data=(X, Y), fit=None, **kwargs):
    tuner = make(tmp_path, **{"max_trials": 2, "build": build(), **kwargs})
    tuner.search(x, y, validation_data=validation_data, epochs=epochs, verbose=0, **(fit or {}))
    return tuner


def test_what_makes_trials_incomparable_is_named(tmp_path, monkeypatch):
    first = run(tmp_path)
    trained = [trial.trial_id for trial in first.record().with_status("completed")]
    assert len(trained) == 2
    first.search(X, Y, validation_data=(X, Y), epochs=1, verbose=0)
    assert len(first.record().with_status("completed")) == 2, "max_trials is what it was"
    session = Journal(tmp_path / "search" / "search.jsonl").events()
    refused = {
        r"epochs: 1 → 4": {"epochs": 4},
        r"data: content: code or values have changed": {"x": X + 1},
        r"data: shapes: \(64, 16\) float32, .* → \(32, 16\)": {"x": X[:32], "y": Y[:32]},
        r"validation data: content": {"validation_data": (X, 1 - Y)},
        r"objective: val_loss \(min\) → loss \(min\)": {"objective": "loss"},
        r"learning_rate_scaling: None → linear": {"learning_rate_scaling": "linear"},
        r"executions_per_trial: 1 → 2": {"executions_per_trial": 2},
        r"seed: 1 → 2": {"seed": 2},
        r'class_weight: None → \{"0": "1.0", "1": "2.0"\}': {"fit": {"class_weight": {0: 1.0, 1: 2.0}}},
        r"shuffle: None → false": {"fit": {"shuffle": False}},
        r"callbacks\[0\]: None → EarlyStopping": {"fit": {"callbacks": [keras.callbacks.EarlyStopping()]}},
        r"tuner's loss: None → mse": {"loss": "mse"},
        r"search_over: effective_batch_size → pairs": {"search_over": "pairs"},
    }
    for message, changed in refused.items():
        with pytest.raises(SearchDirectoryError, match=message) as caught:
            run(tmp_path, **changed)
        assert "another project_name" in str(caught.value) and "overwrite=True" in str(caught.value)
        assert ("random_state=" in caught.value.fix) == ("data: " in caught.value.received)
    monkeypatch.setattr(keras.config, "dtype_policy", lambda: keras.DTypePolicy("mixed_float16"))
    with pytest.raises(SearchDirectoryError, match="dtype policy: float32 → mixed_float16"):
        run(tmp_path)
    assert Journal(tmp_path / "search" / "search.jsonl").events() == session, "a session that is refused is none"


def test_what_is_found_out_by_building(tmp_path):
    """Data in another order, one more rate, one more trial, a callback that writes and a larger budget are allowed."""
    run(tmp_path, max_trials=1)
    with pytest.raises(SearchDirectoryError, match=r"hyperparameter effective_batch_size: \[4, 8, 16\] → \[4, 8\]"):
        run(tmp_path, micro_batch_sizes=(4,))
    with pytest.raises(SearchDirectoryError, match="the model of trial 0, layers"):
        run(tmp_path, build=build(drop=0.5))
    order = np.random.default_rng().permutation(len(X))
    fit = {"callbacks": [keras.callbacks.CSVLogger(tmp_path / "log.csv")], "shuffle": True}
    more = run(tmp_path, x=X[order], y=Y[order], fit=fit, build=build((0.1, 0.2, 0.3)), memory_budget="32MiB")
    record = more.record()
    assert len(record.with_status("completed")) == 2 and record.max_trials == 2
    assert more.get_best_config().memory_budget_bytes == 32 * 2**20
    (rates,) = [hp.values for hp in more.oracle.hyperparameters.space if hp.name == "learning_rate"]
    assert rates == [0.1, 0.2, 0.3]


@pytest.mark.slow
def test_data_that_a_function_draws_anew_are_no_other_data(tmp_path):
    for trials in (1, 2):
        tuner = run(tmp_path, x=batches, y=None, validation_data=batches, max_trials=trials)
    assert len(tuner.record().with_status("completed")) == 2
    with pytest.raises(SearchDirectoryError, match="data: shapes"):
        run(tmp_path, x=lambda: (X[:32], Y[:32]), y=None, validation_data=batches)


def test_a_smaller_budget_takes_another_micro_batch_of_what_was_trained(tmp_path):
    """And a configuration says what its own session had: never a budget or versions of another one."""
    files = SearchDirectory(tmp_path)
    sizes = {"micro_batch_sizes": (1, 2, 4, 8), "accumulation_steps": (1, 2, 4, 8), "objective": OBJECTIVE}
    journal, trial = Journal(files.journal_file), Journal(files.trial("0").journal_file)
    journal.append("search_started", search_id="0", memory_budget_bytes=1000 * MIB, versions={"keras": "3.1"}, **sizes)
    values = {"effective_batch_size": 8, "micro_batch_size": 8, "accumulation_steps": 1}
    trial.append("proposed", trial_id="0", hyperparameters=values, signature="s", versions={"keras": "3.1"})
    report = {"objective_value": 0.5, "peak_memory_bytes": 800 * MIB, "throughput_samples_per_second": 200.0}
    trial.append("ended", status="completed", **report)
    sizes_and_steps = [(size, steps) for size in (1, 2, 4, 8) for steps in (1, 2)]
    points = [Measurement(size, steps, 100 * MIB * size, 0.01 * size, "made") for size, steps in sizes_and_steps]
    profile = Profile(tuple(points), "CPU", "made", signature="s")
    write_atomically(files.profiles_folder / "s.json", json.dumps(profile.to_dict()))

    def best():
        record = read_search(tmp_path)
        found = results.candidates(record, files.profiles_folder)
        choice = predicted_choice(select(found, "quality", 0.01, "min", objective_name="val_loss"))
        return results.training_config(record, choice)

    assert best().memory_budget_bytes == 1000 * MIB
    journal.append("search_resumed", memory_budget_bytes=500 * MIB, versions={"keras": "3.2"}, **sizes)
    config = best()
    assert config.micro_batch_size < 8 and config.effective_batch_size == 8
    assert config.peak_memory_bytes <= config.memory_budget_bytes == 500 * MIB
    assert config.versions == {"keras": "3.1"}
