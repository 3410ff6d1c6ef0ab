"""The conclusions of the scripts in experiments/stress; the scripts themselves take minutes and need other projects."""

import importlib.util
import sys

import forked
import pytest
from running import EXPERIMENTS

STRESS = EXPERIMENTS / "stress"


def load(name):
    spec = importlib.util.spec_from_file_location(name, STRESS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(outcome, reason="", note=""):
    return {"outcome": outcome, "reason": reason, "note": note}


def test_a_difference_is_what_passes_only_untouched(capsys):
    suites = load("suites")
    untouched = {
        "a.py::one": row("passed"),
        "a.py::two": row("passed"),
        "a.py::three": row("failed"),
        "a.py::four": row("passed"),
    }
    changed = {
        "a.py::one": row("failed", "ValueError: no"),
        "a.py::two": row("passed", note="hollow"),
        "a.py::three": row("failed"),
    }
    result = suites.report(untouched, {"ours": changed}, {"four": "it is slow"})
    lost = {found["test"]: (found["outcome"], found["documented"]) for found in result["lost"]}
    assert lost == {"a.py::one": ("failed", None), "a.py::four": ("missing", "it is slow")}
    assert result["undocumented"] == 1 and result["notes"] == {"a.py::two": "hollow"}
    printed = capsys.readouterr().out
    assert "ValueError: no" in printed and "it is slow" in printed


def test_a_suite_is_run_twice_and_what_a_plugin_breaks_is_seen(tmp_path):
    suites = load("suites")
    (tmp_path / "number_test.py").write_text(
        "import number_plugin\ndef test_number():\n    assert number_plugin.NUMBER == 1\n"
    )
    (tmp_path / "number_plugin.py").write_text(
        "import os, suites\nNUMBER = 2 if os.environ[suites.VARIANT] else 1\n"
        "def pytest_configure(config):\n    config.pluginmanager.register(suites.Recorder())\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        files = suites.test_files(tmp_path, ["number"])
        runs = [
            suites.run(files, "number_plugin", variant, tmp_path, 60)["number_test.py::test_number"]
            for variant in ("", "ours")
        ]
    assert [run["outcome"] for run in runs] == ["passed", "failed"]
    assert runs[1]["reason"].startswith("assert 2 == 1")


def test_nothing_but_the_tuner_is_exchanged():
    theirs = "import keras_tuner as kt\ntuner = kt.Hyperband(build, kt.Objective('val_loss', 'min'))\n"
    ours = "import accumtune\n" + theirs.replace("kt.Hyperband", "accumtune.Hyperband")
    assert load("ordinary_scripts").with_our_tuner(theirs) == ours


@pytest.mark.parametrize("script", ["keras_tests", "keras_tuner_tests", "ordinary_scripts"])
def test_each_says_what_it_needs(script):
    done = forked.run(
        [sys.executable, STRESS / f"{script}.py", "--help"], capture_output=True, text=True, check=True
    )
    assert "python experiments/stress/" in done.stdout
