"""Runs scripts of Keras Tuner users with Keras Tuner's tuner and with accumtune's.

Only the tuner's name changes in a script: `kt.RandomSearch(` becomes `accumtune.RandomSearch(`.

    python experiments/stress/ordinary_scripts.py [--only NAME ...] [--ours-only]

Prints how each ended; exits with 1 if one works only with Keras Tuner's. A script that raises an `AccumtuneError`
counts as refused, and its message is printed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from common import keep, parser

SCRIPTS = Path(__file__).parent / "scripts"
_TUNER = re.compile(r"\bkt\.(Tuner|RandomSearch|BayesianOptimization|Hyperband|GridSearch)\b")


def with_our_tuner(source: str) -> str:
    """The script with accumtune's tuner."""
    return _TUNER.sub(r"accumtune.\1", source).replace(
        "import keras_tuner as kt", "import accumtune\nimport keras_tuner as kt"
    )


def run(source: str, timeout_seconds: float = 900) -> tuple[str, str]:
    """Runs a script in an empty folder; returns how it ended, and the last line of its errors."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "script.py"
        script.write_text(source)
        try:
            done = subprocess.run(
                [sys.executable, script], cwd=folder, capture_output=True, text=True, timeout=timeout_seconds
            )
        except subprocess.TimeoutExpired:
            return "timed out", f"after {timeout_seconds:.0f} s"
    if not done.returncode:
        return "passed", ""
    errors = done.stderr[done.stderr.rfind("Traceback") :].strip().splitlines()
    told = [line for line in errors if line and not line.startswith((" ", "Traceback"))]
    is_refused = any(line.startswith("accumtune.errors.") for line in told)
    return ("refused" if is_refused else "failed"), " ".join(told)[:600]


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--only", nargs="+", help="names of scripts")
    made.add_argument("--ours-only", action="store_true", help="do not run with stock Keras Tuner")
    options = made.parse_args()

    rows = []
    for path in sorted(SCRIPTS.glob("*.py")):
        if options.only and path.stem not in options.only:
            continue
        source = path.read_text()
        stock = ("not run", "") if options.ours_only else run(source)
        ours = run(with_our_tuner(source))
        rows.append({"script": path.stem, "stock": stock[0], "accumtune": ours[0], "message": ours[1] or stock[1]})
        print(f"{path.stem:28} stock: {stock[0]:8} accumtune: {ours[0]:8} {rows[-1]['message']}", flush=True)
    keep(options.json, rows)
    return int(any(row["stock"] != "failed" and row["accumtune"] not in ("passed", "refused") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
