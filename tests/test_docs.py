"""The documentation builds without a warning, and what its code calls is there."""

import ast
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

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
        done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "best_config.json").exists() and (tmp_path / "digits.keras").exists()


def accepted(function):
    """The keyword arguments that a public name takes, those of the tuners' `**kwargs` included."""
    names = set(inspect.signature(function).parameters)
    if isinstance(function, type) and issubclass(function, keras_tuner.Tuner):
        for taken_too in (accumtune.Tuner, keras_tuner.Tuner, keras_tuner.Oracle):
            names |= set(inspect.signature(taken_too).parameters)
    return names


def unknown_names(code):
    """What a block uses of accumtune and accumtune does not have: names and keyword arguments."""
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
    """Those of a made search with one trial; what ends in a name of the user's is told in words."""
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
    """Scripts of `experiments/` that a text names and that are not there; `README.md`'s table leaves the folder out."""
    named = re.findall(r"experiments/[\w/]+\.py", text)
    named += [f"experiments/benchmarks/{script}" for script in re.findall(r"\| `(\w+/\w+\.py)", text)]
    return [script for script in named if not (ROOT / script).is_file()]


def test_every_script_that_is_named_is_there():
    pages = [ROOT / "README.md", ROOT / "experiments" / "README.md", *DOCS.rglob("*.md")]
    text = "\n".join(page.read_text() for page in pages)
    assert missing_scripts(text) == [] and "`engine/accumulation.py" in text
    assert missing_scripts("| `engine/unicorn.py` |")  # the negative control
