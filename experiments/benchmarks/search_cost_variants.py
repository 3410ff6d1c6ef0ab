"""What goes beyond training nothing twice: measured on the records of `search_cost.py`, against our best tuner.

    python experiments/benchmarks/search_cost_variants.py [--tasks made fashion text] [--seeds 8]

- `rate`: the learning rate is searched in coordinates that move with the batch (`learning_rate_scaling="sqrt"`, meant
  for the effective batch in the middle of the list). Rates between those of a trained grid are interpolated in the
  logarithms, rates outside it are taken for the nearest.
- `median`, `percentile`: hopeless trials are stopped by Optuna's `MedianPruner` or `PercentilePruner(25)`, after at
  least six trials.
- `forecast`: they are stopped by what is forecast from their epochs (`accumtune.search.pruning.forecast`).
- `both`: `rate` and `median`.
- `start 5`, `start 8`: more trials, spread evenly, before the Gaussian process begins (with three dimensions: after 3).

The table has what `OptunaSearch` needs to come within 1 % of the grid's best, over what the variant needs (more than 1:
the variant is better), the median over seeds, and how many of them met the target.

What led to the defaults, as mean numbers of trials until the target was met, over the five tasks, with the oracle alone
and 16 seeds (those with * 8):

    Gaussian process, after 8 random trials         9.0*     after 3 spread evenly        7.1
    the same, after 4 random trials                 7.7*     after 4, 5, 6                7.6, 7.7, 8.1
    a quadratic mean, a copula, EI over all points, in rates that move with the batch     7.2 to 8.1*
    TPE, after 5, 8, 10 spread evenly               17.9 (4 of 80 missed), 15.4, 15.0

Pruning, after 4 whole trials and in whole trainings (the median over 8 seeds, then the mean over tasks): none 7.6,
median 9.8 (with searches that miss), median with the pruned trial's objective extrapolated 7.3, the best quarter 7.5 to
9.0 and less than that 8.2 to 8.4, with searches that miss. Where curves cross, what is stopped early is what would have
been best, and the model learns that it was bad: that is why no pruner is on by default. `search_cost_development.py`
has the figures of `forecast`, on other tasks.
"""

from __future__ import annotations

import argparse
import bisect
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

from search_cost_tasks import MADE, TRAINED, Record, record_of

TOLERANCE = 0.01
STARTUP_TRIALS = 6


def interpolated(record: Record) -> Record:
    """The same record, which also knows learning rates between those of its grid."""
    if record.loss_of is not None:
        return record
    known = [math.log(rate) for rate in record.space.learning_rates]

    def loss_of(effective: int, rate: float, width: int) -> tuple[float, ...]:
        where = min(max(math.log(rate), known[0]), known[-1])
        upper = min(max(bisect.bisect_left(known, where), 1), len(known) - 1)
        part = (where - known[upper - 1]) / (known[upper] - known[upper - 1])
        low, high = (record.losses[effective, record.space.learning_rates[i], width] for i in (upper - 1, upper))
        return tuple(math.exp((1 - part) * math.log(a) + part * math.log(b)) for a, b in zip(low, high, strict=True))

    return replace(record, loss_of=loss_of)


def variant(name: str, record: Record) -> dict[str, Any]:
    import optuna

    sizes = record.space.effective_batch_sizes
    base = sizes[len(sizes) // 2]

    def scaled(rate: float, effective: int) -> float:
        return rate * math.sqrt(effective / base)

    pruners: dict[str, Callable[[], Any]] = {
        "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS),
        "percentile": lambda: optuna.pruners.PercentilePruner(25.0, n_startup_trials=STARTUP_TRIALS),
        "forecast": lambda: "forecast",
    }
    pruners["both"] = pruners["median"]
    arguments: dict[str, Any] = {"pruner": pruners[name]()} if name in pruners else {}
    return arguments | ({"rate_of": scaled} if name in ("rate", "both") else {})


PLAIN = "plain"
STARTS = {"start 5": 5, "start 8": 8}
VARIANTS = ("rate", "median", "percentile", "forecast", "both", *STARTS)


def needed(task: str, name: str, seed: int) -> tuple[bool, float, float, float]:
    from search_cost_replay import ours

    import accumtune
    from accumtune.oracles import optuna_oracle

    record = interpolated(record_of(task))
    fewest = STARTS.get(name, optuna_oracle._FEWEST_STARTUP_TRIALS)
    with patch.object(optuna_oracle, "_FEWEST_STARTUP_TRIALS", fewest):
        run = ours(record, accumtune.OptunaSearch, seed, **variant(name, record))
    return run.to_reach(record.best * (1 + TOLERANCE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="*", default=[*TRAINED, *MADE])
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    tasks = [name for task in options.tasks for name in (MADE if task == "made" else [task])]
    names = [PLAIN, *options.variants]
    jobs = [(task, name, seed) for task in tasks for name in names for seed in range(1, options.seeds + 1)]
    with ProcessPoolExecutor(options.processes) as pool:
        found = dict(zip(jobs, pool.map(needed, *zip(*jobs, strict=True)), strict=True))
    rows = []
    print(f"{'task':<20}{'variant':<12}{'met':>6}{'presentations':>15}{'wall time':>11}   OptunaSearch / variant")
    for task in tasks:
        for name in names:
            runs = [found[task, name, seed] for seed in range(1, options.seeds + 1)]
            plain = [found[task, PLAIN, seed] for seed in range(1, options.seeds + 1)]
            gains = [
                statistics.median(one[column] / other[column] for one, other in zip(plain, runs, strict=True))
                for column in (1, 2)
            ]
            met = sum(reached for reached, *_ in runs)
            rows.append({"task": task, "variant": name, "met": met, "presentations": gains[0], "seconds": gains[1]})
            print(f"{task:<20}{name:<12}{met:>4}/{options.seeds}{gains[0]:>13.2f}{gains[1]:>11.2f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
