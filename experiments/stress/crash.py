"""Kills searches at random moments, resumes them, and checks whether a trial was lost, run twice or left running.

Each round is a small search with real trials and an SQLite store of its own. It gets a SIGKILL a few times, each time
at a random moment within the duration of an undisturbed search (its start, the probes, trials, the report, the upload),
and then runs to its end. After that:

- no trial that had completed at a kill has started again, and `max_trials` trials have completed;
- every run of MLflow belongs to one trial, each trial has one, all have one parent, and none is RUNNING;
- each epoch of a trial's last attempt in a journal is in MLflow once, with its value; and every line that was in a
  journal at a kill is still there;
- no process of a killed search is left.

    python experiments/stress/crash.py [--kills 50] [--seed 0] [--length SECONDS] [--quick]
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

# What a search process imports, once: each search is a fork of this process, and starts its own trials' processes.
import keras_tuner  # noqa: F401
import numpy as np
from common import Table, keep, parser
from search_checks import Snapshot, compare, left_over, look, snapshot, starts

import accumtune
from accumtune.tracking.journal import read_search, trial_folders

TRIALS, EPOCHS, KILLS_PER_SEARCH = 4, 3, 4


@dataclass
class Round:
    """One search, killed and resumed until it was finished."""

    seed: int
    kills_seconds: list[float] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    completed: int = 0
    epochs: int = 0
    restarted_trials: int = 0
    replaced_runs: int = 0
    seconds: float = 0.0


def build_model(hp: Any) -> Any:
    import keras

    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(hp.Choice("width", [2, 4, 8])), keras.layers.Dense(1)]
    )
    model.compile(keras.optimizers.SGD(hp.Float("learning_rate", 1e-3, 1e-2, sampling="log")), loss="mse")
    return model


def search(folder: Path, tuner: str) -> None:
    """The user's script."""
    os.chdir(folder)
    x = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
    y = x.sum(axis=1, keepdims=True)
    arguments: dict[str, Any] = {} if tuner == "GridSearch" else {"seed": 1}
    getattr(accumtune, tuner)(
        build_model, objective="val_loss", max_trials=TRIALS, memory_budget="16MiB", micro_batch_sizes=(4, 8),
        accumulation_steps=(1, 2), directory="searches", project_name="crash", **arguments,
    ).search(x, y, validation_data=(x, y), epochs=EPOCHS, verbose=2)  # fmt: skip


def fork(action: Callable[[], None], log: Path) -> int:
    """Runs an action in a process of its own, in its own session; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        action()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(folder: Path, tuner: str) -> float:
    """A search that nobody kills; its seconds."""
    began = time.monotonic()
    pid = fork(lambda: search(folder, tuner), folder / "log.txt")
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError((folder / "log.txt").read_text()[-3000:])
    return time.monotonic() - began


def kill_after(folder: Path, tuner: str, seconds: float) -> bool:
    """Runs the search and kills it; False where it had ended by then."""
    pid = fork(lambda: search(folder, tuner), folder / "log.txt")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def phase(folder: Path) -> str:
    """How far the search had come when it was killed."""
    record = read_search(folder)
    if not (folder / "tuner0.json").exists():
        return "starting"
    if not record.trials:
        return "before the first trial"
    if record.status == "finished":
        return "report and upload"
    if record.with_status("running"):
        return "trial training" if any(t.epochs for t in record.with_status("running")) else "trial starting"
    return "between trials"


def play(root: Path, seed: int, kills: int, length: float) -> Round:
    """One round."""
    chance, began = random.Random(seed), time.monotonic()
    result = Round(seed)
    tuner = ("RandomSearch", "BayesianOptimization", "GridSearch")[seed % 3]
    base = root / f"round_{seed}"
    base.mkdir()
    folder = base / "searches" / "crash"
    snapshots: list[Snapshot] = []
    while len(result.kills_seconds) < kills:
        done = len(read_search(folder).with_status("completed"))
        # What is left of a resumed search is shorter; a kill that comes too late for it does not count.
        seconds = chance.uniform(0, length * (1 - _SHARE_OF_TRIALS * done / TRIALS))
        if not kill_after(base, tuner, seconds):
            break
        result.kills_seconds.append(round(seconds, 3))
        result.phases.append(phase(folder))
        snapshots.append(snapshot(folder))
        alive = left_over(snapshots[-1].processes)
        if alive:
            result.faults.append(f"processes {alive} outlived the search")
    run(base, tuner)
    for before in snapshots:
        result.faults += compare(folder, before)
    record = read_search(folder)
    result.completed = len(record.with_status("completed"))
    if result.completed != TRIALS or record.status != "finished":
        result.faults.append(f"{result.completed} trials completed, the search is {record.status}")
    faults, result.epochs, result.replaced_runs = look(folder, f"sqlite:///{base}/mlruns/mlflow.db")
    result.faults += faults
    result.restarted_trials = sum(starts(trial) > 1 for trial in trial_folders(folder))
    result.seconds = round(time.monotonic() - began, 1)
    return result


def undisturbed(root: Path) -> float:
    """Seconds of a search that nobody kills; the first one of a machine takes longer."""
    lengths = []
    for name in ("cold", "undisturbed"):
        folder = root / name
        folder.mkdir()
        lengths.append(run(folder, "RandomSearch"))
    return min(lengths)


# How much of a search's time is the trials', without its start and its end.
_SHARE_OF_TRIALS = 0.6


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--kills", type=int, default=50)
    made.add_argument("--seed", type=int, default=0, help="the first search's; later ones add 1 each")
    made.add_argument("--length", type=float, default=None, help="seconds of an undisturbed search, if known")
    made.add_argument("--quick", action="store_true", help="four kills of one search")
    options = made.parse_args()
    kills = KILLS_PER_SEARCH if options.quick else options.kills
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory(prefix="accumtune-crash-") as root:
        length = options.length or undisturbed(Path(root))
        print(f"An undisturbed search takes {length:.1f} s; kills at a random moment of that.\n")
        columns = {"seed": ">4", "killed after seconds": "<22", "completed": ">9", "begun again": ">11"}
        table = Table(columns | {"epochs": ">6", "faults": "<6"})
        table.print_header()
        while kills > 0:
            result = play(Path(root), options.seed + len(rounds), min(kills, KILLS_PER_SEARCH), length)
            kills -= len(result.kills_seconds)
            rounds.append(result)
            moments = ", ".join(f"{seconds:.1f}" for seconds in result.kills_seconds)
            found = "; ".join(result.faults) or "none"
            table.print_row(result.seed, moments, result.completed, result.restarted_trials, result.epochs, found)
    phases = Counter(phase for result in rounds for phase in result.phases)
    faults = sum(len(result.faults) for result in rounds)
    print(f"\n{sum(phases.values())} kills: " + ", ".join(f"{count} {name}" for name, count in phases.most_common()))
    print(f"{faults} faults")
    content = {"undisturbed_seconds": length, "phases": phases, "rounds": [asdict(result) for result in rounds]}
    keep(options.json, content)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
