"""Runs Keras Tuner's own tests of its tuners with accumtune's tuners in their place, beside the untouched ones.

FOLDER holds Keras Tuner's unpacked tests. The wheel of version 1.3.5 is the last that ships them; they run against the
installed version, whose modules get their old names back:

    pip download --no-deps keras-tuner==1.3.5 && unzip -d keras-tuner-1.3.5 keras_tuner-1.3.5-py3-none-any.whl
    python experiments/stress/keras_tuner_tests.py keras-tuner-1.3.5 [--only engine/tuner_test] [--json PATH]

Exits with 1 where a test passes only with stock and no reason is documented below. A test that passes may still be
hollow, where none of its trials completed: those are listed as notes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import suites

ONLY = ("engine/tuner_test.py", "engine/base_tuner_test.py")
DOCUMENTED: dict[str, str] = {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Keras Tuner's unpacked wheel")
    parser.add_argument("--only", nargs="+", default=ONLY, help="parts of the paths of the test files to run")
    parser.add_argument("--timeout-seconds", type=float, default=3600, help="of each run")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    files = suites.test_files(options.folder.resolve(), options.only)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Alone: beside their package's __init__.py, tests would import the version that they came with.
        files = [Path(shutil.copy(file, folder)) for file in files]
        untouched, ours = (
            suites.run(files, "keras_tuner_tests_plugin", variant, folder, options.timeout_seconds)
            for variant in ("", "accumtune")
        )
    result = suites.report(untouched, {"accumtune": ours}, DOCUMENTED)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["undocumented"] else 0


if __name__ == "__main__":
    sys.exit(main())
