"""Every code block of the README runs: Python as one script from top to bottom, shell in other tests or in CI.

A comment before a block, `<!-- in the test: OLD → NEW; ... -->`, makes it smaller or replaces what a test does not
have; readers of the README do not see it. `BEFORE` defines what a user would have: data and a pool of machines.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import forked
import pytest
from running import DIGITS

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"(?:^<!-- in the test: ([^\n]+) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

BEFORE = """
from concurrent.futures import ThreadPoolExecutor
from sklearn.datasets import load_digits

digits = load_digits()
# As large as usual pictures: the peak of a model for 64 features would be as small as its random variation.
pictures = digits.images.repeat(4, axis=1).repeat(4, axis=2).reshape(len(digits.images), -1) / 16
x, x_val = pictures[:192], pictures[192:256]
y, y_val = digits.target[:192], digits.target[192:256]
pool = ThreadPoolExecutor(1)
"""
# Blocks that are not code, by their language.
NO_CODE = {"text": "what a search prints", "bibtex": "an entry for a list of literature"}


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    changes: tuple[tuple[str, str], ...]

    def small(self):
        code = self.code
        for old, new in self.changes:
            assert old in code, f"{old!r} is changed in a block that does not have it:\n{code}"
            code = code.replace(old, new)
        return code


def blocks(text):
    for changes, language, code in FENCE.findall(text):
        pairs = [tuple(change.split(" → ")) for change in changes.split("; ")] if changes else []
        yield Block(language, code, tuple(pairs))


BLOCKS = list(blocks((ROOT / "README.md").read_text()))


def with_language(language):
    return [block for block in BLOCKS if block.language == language]


@pytest.mark.slow
def test_the_python_blocks_run_one_after_the_other(tmp_path):
    script = tmp_path / "readme.py"
    script.write_text("\n".join([BEFORE, *(block.small() for block in with_language("python"))]))
    done = forked.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[2/2]   → val_loss" in done.stdout and (tmp_path / "best_config.json").exists()


def test_the_shell_blocks_are_run_elsewhere(digits):
    """Installing takes minutes and a network connection: `.ci/run` reads its command from the README and runs it. The
    fixture has run the script of the first block."""
    first, development = [block.code.strip() for block in with_language("sh")]
    assert first.startswith("python3 -m venv .venv && .venv/bin/pip install -e . && ")
    assert first.endswith(f" && .venv/bin/python experiments/{DIGITS[0]}")
    (command,) = re.findall(r"grep -m1 -E '(.+)' README.md", (ROOT / ".ci" / "run").read_text())
    assert re.search(command, development)
    assert [line for line in (ROOT / "README.md").read_text().splitlines() if re.search(command, line)] == [development]


def test_the_printed_example_looks_like_what_is_printed(digits):
    _, output = digits
    (printed,) = with_language("text")
    header = next(line for line in printed.code.splitlines() if "objective" in line)
    assert header.split() in [line.split() for line in output.splitlines()]
    shape = re.sub(r"\d+", "N", next(line for line in printed.code.splitlines() if "→ val_loss" in line))
    assert shape.split("/")[0].split()[0] in {re.sub(r"\d+", "N", line).split("/")[0] for line in output.splitlines()}


def test_no_block_is_left_out():
    assert {block.language for block in BLOCKS} == {"python", "sh", *NO_CODE}


@pytest.mark.parametrize("fence", ["```\ncode\n```\n", "```yaml\ncode\n```\n"])
def test_a_block_of_another_language_would_be_noticed(fence):
    (block,) = blocks(fence)
    assert block.language not in {"python", "sh", *NO_CODE}
