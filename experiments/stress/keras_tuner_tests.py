"""Runs Keras Tuner's own tests with its tuners and with accumtune's, and compares the outcomes.

FOLDER holds Keras Tuner's unpacked tests. The wheel of version 1.3.5 is the last that ships them; they run against the
installed version, whose modules get their old names back:

    pip download --no-deps keras-tuner==1.3.5 && unzip -d keras-tuner-1.3.5 keras_tuner-1.3.5-py3-none-any.whl
    python experiments/stress/keras_tuner_tests.py keras-tuner-1.3.5 [--only engine/tuner_test]

Exits with 1 if a test passes only with Keras Tuner's tuners and no reason is documented below. A test can pass although
none of its trials completed: such tests are listed as notes.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import suites
from common import keep, parser

ONLY = ("engine/tuner_test.py", "engine/base_tuner_test.py")
# Each is refused with a message that names the way out, or differs in what a script does not depend on.
_NO_MODEL = (
    "hypermodel=None is refused: what needs no model has no memory to keep to and no batch to accumulate; a run_trial "
    "that builds one itself would train it in the search's process"
)
_NO_TRAINING = (
    "a HyperModel.fit that trains nothing is refused, without data by the probes that measure a micro-batch; stock "
    "takes its number, and tells of a wrong type by another exception"
)
_UNCOMPILED = "the model is not compiled, and refused when the tuner is made: nothing could accumulate"
_ONE_MORE = "effective_batch_size is one hyperparameter more than the test counts"
_OTHER_CLASS = "tuner.hypermodel is accumtune's, around the user's, whose attributes and methods it has"
_OWN_TRAINING = (
    "a run_trial that trains without super().run_trial is refused: it would train in the search's process, outside the "
    "budget; here the model is not compiled either"
)
DOCUMENTED: dict[str, str] = {
    "test_basic_tuner_attributes": f"{_OTHER_CLASS}; {_ONE_MORE}",
    "test_hypermodel_with_dynamic_space": _OTHER_CLASS,
    "test_no_hypermodel_": _NO_MODEL,
    "test_run_trial_return_string": _NO_MODEL,
    "test_no_objective_run_trial_return_not_float": _NO_MODEL,
    "test_no_objective_with_hypermodel": _NO_TRAINING,
    "test_fit_return_string": _NO_TRAINING,
    "test_no_objective_fit_return_not_float": _NO_TRAINING,
    "test_callbacks_in_fit_kwargs": "it looks into a private method of Keras Tuner's, which trials in processes of "
    "their own do not pass through",
    "test_callbacks_run_each_execution": "its callback counts in a set of this process; trials have copies of both",
    "test_override_compile": "its trials fail with stock too (it looks for Keras 2's metrics within a fit); a search "
    "whose trials all failed raises here",
    "test_restricted_space": _ONE_MORE,
    "test_reparameterized_space": _ONE_MORE,
    "test_tunable_false_hypermodel": "batch_size= of search() is refused: the effective batch is what the search finds",
    "test_reloading_error_message": "the same refusal is a SearchDirectoryError, which names the tuner that has begun",
    "test_run_trial_return_": _OWN_TRAINING,
    "test_build_and_fit_model": "an override of the private _build_and_fit_model is refused: nothing would call it",
    "test_populate_initial_space": _UNCOMPILED,
    "test_callback_cannot_be_deep_copied": _UNCOMPILED,
    "test_build_did_not_return_keras_model": "the same refusal is a BuildError, when the tuner is made",
}


def main() -> int:
    made = parser(__doc__)
    made.add_argument("folder", type=Path, help="Keras Tuner's unpacked wheel")
    made.add_argument("--only", nargs="+", default=ONLY, help="parts of the paths of the test files to run")
    made.add_argument("--timeout-seconds", type=float, default=3600, help="of each run")
    options = made.parse_args()

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
    keep(options.json, result)
    return 1 if result["undocumented"] else 0


if __name__ == "__main__":
    sys.exit(main())
