"""The documentation builds without a warning, its code runs, and its lists are complete."""

import ast
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import forked
import keras
import keras_tuner
import pytest

import accumtune
from accumtune.tracking.mlflow import run_content
from accumtune.tracking.records import SearchRecord, TrialRecord

DOCS = Path(accumtune.__file__).parent / "docs"
ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(code, id=f"{page.relative_to(DOCS / 'pages')}-{number}")
    for page in sorted(DOCS.rglob("*.md"))
    for number, code in enumerate(BLOCK.findall(page.read_text()))
]


@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None,
    reason="pip install -e '.[docs]' brings mkdocs-material and mkdocstrings",
)
def test_the_documentation_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(DOCS / "mkdocs.yml"), "-d", str(tmp_path)],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "WARNING" not in done.stdout + done.stderr, done.stdout + done.stderr
    assert "micro_batch_sizes" in (tmp_path / "api" / "search" / "index.html").read_text()
    command_line = (tmp_path / "api" / "command-line" / "index.html").read_text()
    assert "accumtune best" in command_line and "--tolerance" in command_line  # from the parser
    gallery = (tmp_path / "gallery" / "index.html").read_text()  # from experiments/README.md
    pictures = re.findall(r'src="\.\./(pictures/[^"]+)"', gallery)
    assert len(pictures) >= 5 and all((tmp_path / picture).is_file() for picture in pictures)


SMALLER = "epochs=8 → epochs=1; max_trials=8 → max_trials=2; epochs=20 → epochs=1"


@pytest.mark.slow
def test_the_tutorial_runs_from_top_to_bottom(tmp_path):
    """Each block is a file or a script of its own where the text says so; the searches are small."""
    text = (DOCS / "pages" / "tutorial.md").read_text()
    for change in SMALLER.split("; "):
        old, new = change.split(" → ")
        assert old in text
        text = text.replace(old, new)
    module, *search, training = BLOCK.findall(text)
    (tmp_path / "train.py").write_text(module)
    (probe,) = re.findall(r"^```sh\n(.*?)\n```", text, re.MULTILINE | re.DOTALL)
    first = f"import sys; from accumtune.cli import main; sys.exit(main({probe.split()[1:]}))"
    for script in (first, "\n".join(search), training):
        done = forked.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "best_config.json").exists() and (tmp_path / "digits.keras").exists()


# The blocks of a page run from top to bottom as one script, after names that a reader is assumed to have

NAMES = """
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import accumtune
import keras
import keras_tuner
import numpy as np
import tensorflow as tf

x, x_val = np.random.default_rng(0).normal(size=(320, 16)).astype("float32")[:256], np.ones((64, 16), "float32")
y, y_val = x.sum(axis=1, keepdims=True), x_val.sum(axis=1, keepdims=True)
dataset = tf.data.Dataset.from_tensor_slices((x, y))
hp = keras_tuner.HyperParameters()
pool = ThreadPoolExecutor(1)


def make_network(hp):
    return keras.Sequential([keras.layers.Dense(hp.Choice("width", [4, 8])), keras.layers.Dense(1)])


def build_model(hp):
    model = make_network(hp)
    model.compile(keras.optimizers.Adam(hp.Choice("learning_rate", [1e-3, 1e-2])), loss="mse")
    return model


model = build_model(hp)
"""
OWN_STEP = """
class MyModel(keras.Sequential):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = keras.ops.mean(keras.ops.square(self(x, training=True) - y))
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        return {"loss": loss}


model = MyModel([keras.layers.Dense(1)])
model.compile("sgd")
"""
NORMALIZED = """
my_layer = keras.layers.Dense(4)
model = keras.Sequential([my_layer, keras.layers.BatchNormalization(), keras.layers.Dense(1)])
model.compile("sgd", "mse")
"""
RECORDS = """
def parse(record):
    values = tf.io.parse_tensor(record, tf.float32)
    return tf.ensure_shape(values[:16], (16,)), tf.ensure_shape(values[16:], (1,))


os.makedirs("data")
for file in ("data/train-0.tfrecord", "data/validation.tfrecord"):
    with tf.io.TFRecordWriter(file) as writer:
        for row in np.concatenate([x, y], axis=1):
            writer.write(tf.io.serialize_tensor(row).numpy())
tuner = accumtune.RandomSearch(build_model, objective="val_loss", max_trials=2, memory_budget="64MiB")
"""
SEARCHED = """
import mlflow

tuner = accumtune.RandomSearch(
    build_model, objective="val_loss", max_trials=2, memory_budget="64MiB", project_name="my_search",
    register_as="digits",
)
tuner.search(x, y, validation_data=(x_val, y_val), epochs=1)
tuner.get_best_config().save("best_config.json")
mlflow.set_tracking_uri("sqlite:///mlruns/mlflow.db")
(search_run,) = mlflow.search_runs(search_all_experiments=True, filter_string="tags.`accumtune.kind` = 'search'").run_id
"""
SHORT = {"epochs=5": "epochs=1"}
FEW = {**SHORT, "max_trials=20": "max_trials=2"}
SMALL = {**FEW, "2GiB": "64MiB"}
# page: what is defined before it, and what is smaller than on the page
SHORT_PAGES = {
    "concepts/exactness.md": (NORMALIZED, {}),
    "concepts/noise-scale.md": ("", {}),
    "concepts/own-train-step.md": (OWN_STEP, {}),
    "how-to/mixed-precision.md": ("", {}),
}
LONG_PAGES = {
    "how-to/cluster.md": ("", {'executor="ray"': "executor=pool", '"/shared/searches"': '"searches"'}),
    "how-to/keras-tuner.md": ("", SMALL),
    "how-to/migrate.md": ("", {**FEW, "8GiB": "64MiB"}),
    "how-to/production.md": (
        SEARCHED,
        {'"runs:/0123456789abcdef/best_config.json"': 'f"runs:/{search_run}/best_config.json"', "1GiB": "32MiB",
         "verify(build_model, x, y)": "verify(build_model, x, y, peak_tolerance=0.5)", "epochs=100": "epochs=1"},
    ),
    "how-to/several-gpus.md": (
        "", {"20GiB": "64MiB", "MirroredStrategy()": 'MirroredStrategy(["CPU:0", "CPU:1"])'},
    ),
    "how-to/shared-gpu.md": ("", {}),
    "how-to/tf-data.md": (RECORDS, SHORT),
    "index.md": ("", SMALL),
}  # fmt: skip
TWO_DEVICES = """
import tensorflow as tf

(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
"""
# What has to run before anything else on a page.
FIRST = {"how-to/several-gpus.md": TWO_DEVICES}
# Pages whose code runs elsewhere: the tutorial above.
OTHER_PAGES = {"tutorial.md"}


def script_of(page, before, changes):
    code = "\n".join(BLOCK.findall((DOCS / "pages" / page).read_text()))
    for old, new in changes.items():
        assert old in code, f"{page} does not have {old!r}"
        code = code.replace(old, new)
    return "\n".join([NAMES, before, code])


@pytest.mark.skipif(os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow", reason="the pages use tf.data")
@pytest.mark.parametrize("page", SHORT_PAGES)
def test_the_blocks_of_a_short_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    policy = keras.mixed_precision.global_policy()
    try:
        exec(compile(script_of(page, *SHORT_PAGES[page]), page, "exec"), {"__name__": "page"})
    finally:
        keras.mixed_precision.set_global_policy(policy)


@pytest.mark.slow
@pytest.mark.parametrize("page", LONG_PAGES)
def test_the_blocks_of_a_long_page_run(page, tmp_path):
    """Those that make a tuner, which starts processes. Each page is a process of its own."""
    (tmp_path / "page.py").write_text(FIRST.get(page, "") + script_of(page, *LONG_PAGES[page]))
    done = forked.run([sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_code_of_every_page_runs():
    pages = {str(page.relative_to(DOCS / "pages")) for page in DOCS.rglob("*.md") if BLOCK.search(page.read_text())}
    assert pages == {*SHORT_PAGES, *LONG_PAGES, *OTHER_PAGES}


def accepted(function):
    """Returns the keyword arguments that a public name takes, those of the tuners' `**kwargs` included."""
    names = set(inspect.signature(function).parameters)
    if isinstance(function, type) and issubclass(function, keras_tuner.Tuner):
        for taken_too in (accumtune.Tuner, keras_tuner.Tuner, keras_tuner.Oracle):
            names |= set(inspect.signature(taken_too).parameters)
    return names


def unknown_names(code):
    """Yields names and keyword arguments that a block uses and accumtune does not have."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "accumtune":
            if node.attr not in accumtune.__all__:
                yield node.attr
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("accumtune."):
            function = getattr(accumtune, ast.unparse(node.func).removeprefix("accumtune."), None)
            if function is not None:
                keywords = {keyword.arg for keyword in node.keywords if keyword.arg}
                yield from sorted(keywords - accepted(function))


@pytest.mark.parametrize("code", BLOCKS)
def test_code_in_the_documentation_uses_what_there_is(code):
    assert not set(unknown_names(code))


def test_the_rule_would_notice_a_name_that_is_gone():
    code = "accumtune.RandomSearch(build_model, memory_limit=1)\naccumtune.no_such_name"
    assert sorted(unknown_names(code)) == ["memory_limit", "no_such_name"]


# What pages list is complete


def missing_names(page, names):
    text = (DOCS / "pages" / page).read_text()
    return {name for name in names if f"`{name}`" not in text}


def error_names():
    found = vars(accumtune.errors).values()
    return {it.__name__ for it in found if isinstance(it, type) and it.__module__ == "accumtune.errors"}


def test_every_error_has_its_line():
    assert missing_names("troubleshooting.md", error_names() - {"AccumtuneError"}) == set()
    assert missing_names("troubleshooting.md", {"UnicornError"})  # the negative control


def test_every_tag_param_and_metric_of_a_run_has_its_line():
    """Those of a made-up search with one trial; names that end in a user's name are described in words."""
    trial = TrialRecord(
        Path(), "0", status="failed", reason="r", reused_from="1", memory_source="s", device="d", objective_value=1.0,
        hyperparameters={"effective_batch_size": 4, "micro_batch_size": 2, "accumulation_steps": 2},
        peak_memory_bytes=1, predicted_peak_memory_bytes=1, throughput_samples_per_second=1.0,
        predicted_throughput_samples_per_second=1.0, best_epoch=0, updates=1, training_seconds=1.0,
    )  # fmt: skip
    search = SearchRecord(
        Path(), search_id="i", reason="r", learning_rate_scaling="sqrt", tuner="t", backend="b", max_trials=1,
        micro_batch_sizes=(2,), accumulation_steps=(2,), search_over="pairs", whole_batch_loss=True,
    )  # fmt: skip
    parent, child = run_content.search_run(search, {}, None), run_content.trial_run(trial, search)
    names = {*parent.params, *parent.tags, *child.params, *child.tags, *(point.name for point in child.scalars)}
    told_in_words = ("mlflow.", "accumtune.trials_", "best_val_")
    named = {name for name in names if not name.startswith(told_in_words)}
    assert len(named) > 25 and missing_names("tracking.md", named) == set()


def missing_scripts(text):
    """Returns the missing scripts of `experiments/` that a text names; `README.md`'s table omits the folder."""
    named = re.findall(r"experiments/[\w/]+\.py", text)
    named += [f"experiments/benchmarks/{script}" for script in re.findall(r"\| `(\w+/\w+\.py)", text)]
    return [script for script in named if not (ROOT / script).is_file()]


def test_every_script_that_is_named_is_there():
    pages = [ROOT / "README.md", ROOT / "experiments" / "README.md", *DOCS.rglob("*.md")]
    text = "\n".join(page.read_text() for page in pages)
    assert missing_scripts(text) == [] and "`engine/accumulation.py" in text
    assert missing_scripts("| `engine/unicorn.py` |")  # the negative control
