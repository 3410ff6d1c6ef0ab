"""One task of `search_cost.py` searched for real on both sides, beside what the replay of its record says.

    KERAS_HOME=... python experiments/benchmarks/search_cost_real.py [--task fashion] [--trials 8] [--seed 0]

Each side is a process of its own: stock Keras Tuner with Keras's own accumulation, its allocator limited as a whole;
accumtune with its trials in processes of their own. Both build their models from the same seed, so that a trial's loss
can be compared with the record's to the last digits that summation order leaves. oneDNN's kernels use a buffer that
they did not get, and take the whole of stock's search with them; that is counted, and it is run again without oneDNN.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parent))

from search_cost_tasks import MIB, OURS, STOCK, TRAINED, Record, record_of


def stock(record: Record, tuner: str, trials: int, seed: int, folder: str) -> list[dict[str, Any]]:
    import keras
    import keras_tuner

    task, space = TRAINED[record.name], record.space

    class Model(keras_tuner.HyperModel):
        def build(self, hp: Any) -> Any:
            keras.utils.set_random_seed(0)
            hp.Choice("micro_batch_size", list(space.micro_batch_sizes), ordered=True)
            steps = hp.Choice("accumulation_steps", list(space.accumulation_steps), ordered=True)
            return task.build(*space.declare(hp), steps if steps > 1 else None)

        def fit(self, hp: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            return model.fit(*args, batch_size=hp.get("micro_batch_size"), **kwargs)

    search = getattr(keras_tuner, tuner)(
        Model(), "val_loss", max_trials=trials, seed=seed, directory=folder, max_consecutive_failed_trials=10**6
    )
    x, y, x_val, y_val = task.load()
    search.search(x, y, validation_data=(x_val, y_val), epochs=task.epochs, verbose=0)
    return [
        dict(trial.hyperparameters.values) | {"objective": trial.score if trial.status == "COMPLETED" else None}
        for _, trial in sorted(search.oracle.trials.items())
    ]


def ours(record: Record, tuner: str, trials: int, seed: int, folder: str) -> list[dict[str, Any]]:
    import accumtune

    task = TRAINED[record.name]

    def build(hp: Any) -> Any:
        return task.build(*record.space.declare(hp), None)

    search = getattr(accumtune, tuner)(
        build, objective="val_loss", max_trials=trials, seed=seed, directory=folder,
        memory_budget=record.memory_budget_bytes, micro_batch_sizes=record.space.micro_batch_sizes,
        accumulation_steps=record.space.accumulation_steps, tracking_uri=f"sqlite:///{folder}/mlflow.db",
    )  # fmt: skip
    x, y, x_val, y_val = task.load()
    search.search(x, y, validation_data=(x_val, y_val), epochs=task.epochs, verbose=0)
    return [
        dict(trial.hyperparameters)
        | {
            "objective": trial.objective_value, "training_seconds": trial.training_seconds,
            "started": trial.proposed_at, "ended": trial.ended_at,
        }  # fmt: skip
        for trial in search.record().trials
    ]


def run_side(side: str, options: argparse.Namespace, record: Record) -> dict[str, Any]:
    """In a process of its own; the trials and the wall time of the search."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TF_CPU_ALLOCATOR_USE_BFC": "true"}
    if side == STOCK:
        environment["TF_CPU_BFC_MEM_LIMIT_IN_MB"] = str(record.memory_budget_bytes // MIB)
    command = [sys.executable, __file__, "--side", side, "--task", options.task, "--tuner", options.tuner]
    command += ["--trials", str(options.trials), "--seed", str(options.seed)]
    crashes = 0
    while True:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL)
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1]) | {"crashes": crashes}
        crashes += 1
        if done.returncode > 0 or crashes > 1:
            raise SystemExit(f"{side} ended with {done.returncode}.")
        print(f"{side}: the process of the search ended by {signal.Signals(-done.returncode).name}", flush=True)
        environment["TF_ENABLE_ONEDNN_OPTS"] = "0"


def one_side(options: argparse.Namespace, record: Record) -> None:
    import keras  # noqa: F401  importing takes as long as a few trials and is not the search

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        search = {STOCK: stock, OURS: ours}[options.side]
        trials = search(record, options.tuner, options.trials, options.seed, folder)
    print(json.dumps({"trials": trials, "seconds": time.monotonic() - started}))


def compared(record: Record, side: str, trials: list[dict[str, Any]]) -> dict[str, Any]:
    """How far real losses are from recorded ones, and whether the same trials failed."""
    differences, same_outcome = [], 0
    for trial in trials:
        micro, steps, width = (trial[name] for name in ("micro_batch_size", "accumulation_steps", "width"))
        fits = record.fits(side, width, micro, steps)
        same_outcome += fits == (trial["objective"] is not None)
        if fits and trial["objective"] is not None:
            known = record.best_of(micro * steps, trial["learning_rate"], width)
            differences.append(abs(trial["objective"] / known - 1))
    return {
        "trials": len(trials), "failed": sum(trial["objective"] is None for trial in trials),
        "as_recorded": same_outcome, "median_difference": statistics.median(differences), "most": max(differences),
    }  # fmt: skip


def overheads(trials: list[dict[str, Any]]) -> list[float]:
    """What each trial after the first took beside training."""
    trials = sorted(trials, key=lambda trial: trial["ended"])
    return [
        later["ended"] - earlier["ended"] - later["training_seconds"]
        for earlier, later in zip(trials, trials[1:], strict=False)
        if later["training_seconds"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="fashion", choices=list(TRAINED))
    parser.add_argument("--tuner", default="RandomSearch")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--side", choices=(STOCK, OURS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    record = record_of(options.task)
    if options.side:
        one_side(options, record)
        return
    from search_cost_replay import search

    found = {}
    for side in (STOCK, OURS):
        real = run_side(side, options, record)
        replayed = search(record, side, options.tuner, options.seed, max_trials=options.trials)
        found[side] = compared(record, side, real["trials"]) | {
            "seconds": real["seconds"], "replayed_seconds": replayed.seconds, "replayed_failed": sum(replayed.failures),
            "crashes": real["crashes"],
        }  # fmt: skip
        print(side, json.dumps(found[side]), flush=True)
    beside = overheads(real["trials"])
    found["seconds_beside_training"] = beside
    print(f"accumtune, seconds of a trial beside training, after the first: median {statistics.median(beside):.2f}, "
          f"most {max(beside):.2f} (probes of models not seen before included)")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
