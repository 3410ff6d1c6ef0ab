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

DOCS = Path(accumtune.__file__).parent / "docs"
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
