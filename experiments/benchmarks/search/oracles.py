"""Compares how soon oracles find the best effective batch: real oracles, a synthetic objective, no training.

    python experiments/benchmarks/search/oracles.py --seeds 8

The space has 10 effective batches, 5 learning rates and 4 widths; the objective is smooth, and its best effective
batch is small, in the middle, or the largest. A search meets the target with a trial within 1 % of the best of all 200,
in at most 45 trials.

"stock" is Keras Tuner's Bayesian optimization over the pairs of micro-batch size and accumulation steps. Half of the
pairs do not fit and fail; an effective batch that needs more steps than are listed cannot be reached. All others search
the effective batch, of which every one can run.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# More threads make the small matrices of a Gaussian process slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import keras_tuner
from common import keep, parser
from keras_tuner.engine.trial import TrialStatus

from accumtune.oracles.optuna_oracle import OptunaOracle

MICRO_BATCH_SIZES = (4, 8, 16, 32, 64, 128)
ACCUMULATION_STEPS = (1, 2, 4, 8, 16)
LARGEST_FITTING = 16
EFFECTIVE_BATCH_SIZES = sorted({micro * steps for micro in MICRO_BATCH_SIZES for steps in ACCUMULATION_STEPS})
LEARNING_RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
WIDTHS = [32, 64, 128, 256]
BEST_BATCHES = (32, 256, 2048)


def loss(best_batch: int, effective_batch_size: int, learning_rate: float, width: int) -> float:
    """A bowl in the logarithms; the best learning rate grows with the root of the batch."""
    batch = math.log2(effective_batch_size / best_batch)
    rate = math.log10(learning_rate / (1e-3 * math.sqrt(effective_batch_size / 256)))
    return 0.3 * (1 + 0.02 * batch**2 + 0.25 * rate**2 + 0.03 * math.log2(256 / width))


def target(best_batch: int) -> float:
    grid = itertools.product(EFFECTIVE_BATCH_SIZES, LEARNING_RATES, WIDTHS)
    return 1.01 * min(loss(best_batch, *point) for point in grid)


def space(over_pairs: bool) -> keras_tuner.HyperParameters:
    hp = keras_tuner.HyperParameters()
    if over_pairs:
        hp.Choice("micro_batch_size", list(MICRO_BATCH_SIZES), ordered=True)
        hp.Choice("accumulation_steps", list(ACCUMULATION_STEPS), ordered=True)
    else:
        hp.Choice("effective_batch_size", EFFECTIVE_BATCH_SIZES, ordered=True)
    hp.Choice("learning_rate", LEARNING_RATES, ordered=True)
    hp.Choice("width", WIDTHS, ordered=True)
    return hp


def sampler_of(name: str, seed: int):
    import optuna

    kinds = {
        "TPE": lambda: optuna.samplers.TPESampler(multivariate=True, n_startup_trials=8, seed=seed),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
    }
    return kinds[name]()


def oracle_of(name: str, seed: int, trials: int):
    arguments = {
        "objective": keras_tuner.Objective("val_loss", "min"), "max_trials": trials, "seed": seed,
        "hyperparameters": space(name == "stock"), "max_consecutive_failed_trials": trials + 1,
    }  # fmt: skip
    if name == "OptunaSearch":
        return OptunaOracle(**arguments)
    if name.startswith("OptunaSearch "):
        return OptunaOracle(sampler_of(name.split()[1], seed), **arguments)
    kind = "BayesianOptimization" if name == "stock" else name
    return getattr(keras_tuner.oracles, f"{kind}Oracle")(**arguments)


def search(name: str, best_batch: int, seed: int, trials: int) -> dict[str, object]:
    """One search: which trial met the target (None: none did), how many failed, and the time for a proposal."""
    oracle, goal = oracle_of(name, seed, trials), target(best_batch)
    oracle.verbose = 0
    met, failed, started = None, 0, time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        oracle._set_project_dir(folder, "oracle")
        for number in range(1, trials + 1):
            trial = oracle.create_trial("tuner0")
            if trial.status != TrialStatus.RUNNING:
                break
            values = dict(trial.hyperparameters.values)
            micro, steps = values.pop("micro_batch_size", 0), values.pop("accumulation_steps", 0)
            if micro > LARGEST_FITTING:
                failed += 1
                trial.status = TrialStatus.FAILED
            else:
                value = loss(best_batch, **{"effective_batch_size": micro * steps, **values})
                met = number if met is None and value <= goal else met
                oracle.update_trial(trial.trial_id, {"val_loss": value})
                trial.status = TrialStatus.COMPLETED
            oracle.end_trial(trial)
    seconds = (time.process_time() - started) / trials
    return {
        "oracle": name, "best_batch": best_batch, "seed": seed, "met_at": met, "failed": failed,
        "cpu_seconds_per_trial": seconds,
    }  # fmt: skip


def row(name: str, runs: list[dict[str, object]]) -> str:
    cells = []
    for batch in BEST_BATCHES:
        at = [run["met_at"] for run in runs if run["best_batch"] == batch]
        hits = [number for number in at if number is not None]
        median = f", {statistics.median(hits):.0f}" if hits else ""
        cells.append(f"{len(hits)} of {len(at)}{median}")
    failed = statistics.mean(run["failed"] for run in runs)
    seconds = statistics.mean(run["cpu_seconds_per_trial"] for run in runs)
    return f"| {name:26} | " + " | ".join(f"{cell:12}" for cell in cells) + f" | {failed:6.1f} | {seconds:7.2f} |"


ORACLES = ("stock", "RandomSearch", "BayesianOptimization", "OptunaSearch random", "OptunaSearch TPE", "OptunaSearch")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=8)
    options.add_argument("--trials", type=int, default=45)
    options.add_argument("--oracles", nargs="+", default=ORACLES, choices=ORACLES)
    arguments = options.parse_args()
    found: list[dict[str, object]] = []
    titles = [f"best {batch}" for batch in BEST_BATCHES]
    print(f"searches that met the target in {arguments.trials} trials, and the median trial that did\n")
    print(f"| {'oracle':26} | " + " | ".join(f"{title:12}" for title in titles) + " | failed | CPU s/trial |")
    print(f"|{'-' * 28}|" + f"{'-' * 14}|" * len(titles) + "--------|-------------|")
    for name in arguments.oracles:
        runs = [
            search(name, batch, seed, arguments.trials)
            for batch in BEST_BATCHES
            for seed in range(1, arguments.seeds + 1)
        ]
        found += runs
        print(row(name, runs), flush=True)
    keep(arguments.json, {"trials": arguments.trials, "runs": found})


if __name__ == "__main__":
    main()
