"""The documentation promises what the tests hold, no more and no less, and shows what the benchmark recorded."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "accumtune/docs/pages/concepts/exactness.md"
BENCHMARKS = ROOT / "accumtune/docs/pages/benchmarks.md"


def promised(text):
    """The lines of the lists in the section "The lists"."""
    section = text.partition("\n## The lists\n")[2].partition("\n## ")[0]
    items = re.findall(r"^- (.*(?:\n  .*)*)", section, flags=re.MULTILINE)
    return {" ".join(item.split()).rstrip(";.") for item in items}


def held():
    """What tests of this folder are marked with."""
    promises = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        try:
            module = importlib.import_module(path.stem)
        except pytest.skip.Exception:  # its tests are for another backend, and marked with nothing
            continue
        for test in vars(module).values():
            promises |= set(getattr(test, "promises", []))
    return promises


def test_the_page_promises_what_tests_hold():
    assert promised(PAGE.read_text()) == held()


@pytest.mark.parametrize("change", [("- sample weights", "- unicorns"), ("\n- ", "\n- unicorns;\n- ")])
def test_another_list_would_be_noticed(change):
    assert promised(PAGE.read_text().replace(*change)) != held()


# The figures of the benchmark


def benchmark():
    """experiments/benchmarks/engine/accumulation.py, which imports no framework by itself."""
    path = ROOT / "experiments/benchmarks/engine/accumulation.py"
    spec = importlib.util.spec_from_file_location("accumulation_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, module.recorded(module.RECORDS)


def test_the_page_shows_what_the_benchmark_recorded():
    module, rows = benchmark()
    assert len(rows) > 10
    text = BENCHMARKS.read_text()
    assert module.markdown(rows) in text
    all_of_them = len(module.BACKENDS) * len(module.WORKLOADS)
    assert f"{len(rows)} of its {all_of_them} configurations" in " ".join(text.split())
    over_all = module.summary(rows)
    speed, peak = over_all["speed to Keras's own, geometric mean"], over_all["peak to Keras's own, median"]
    least = over_all["speed to Keras's own, least"]
    readme = (ROOT / "README.md").read_text()
    for figure in (f"{speed:.2f} times the speed", f"least {least:.2f})", f"{peak:.2f} of its"):
        assert figure in readme
    rows[0]["peak_to"]["keras"] += 0.01  # the negative control
    assert module.markdown(rows) not in text


def test_the_page_shows_what_losses_over_the_whole_batch_were_recorded_to_cost(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments/benchmarks/engine")
    module = importlib.import_module("whole_batch_loss")
    table = module.markdown(module.RECORDS)
    assert table.count("\n") > 10 and table in BENCHMARKS.read_text()
    assert table.replace("0", "9") not in BENCHMARKS.read_text()  # the negative control
