"""Compares the cost of a search: stock Keras Tuner on (micro-batch, accumulation steps), and accumtune.

    python experiments/benchmarks/search/search_cost.py [--seeds 8] [--tasks fashion text made] [--json PATH]
        [--known PATH] [--ours RandomSearch BayesianOptimization OptunaSearch]

Both sides have the same space (pairs of micro-batch and accumulation steps, learning rate, width), `max_trials`,
seeds and allocator limit. Stock accumulates with Keras's own `gradient_accumulation_steps`, and a trial that runs out
of memory fails. Three failures in a row would end its search with an error; here they are only counted. Real training
of hundreds of searches would take weeks, so the exhaustive grid of each task is trained once (`cost_record.py`;
synthetic tasks are formulas), and the real tuners then search the record (`cost_replay.py`): proposals, profiles, reuse
and journals are the products' own, only training is looked up.

A search meets the target with a trial within 1 % of the best of the exhaustive grid, that is of all listed pairs under
the budget (accumtune may take more steps than are listed, and reach a better result). Its cost is what it has spent by
then: samples presented (probes included), and wall time, which is recorded seconds of training, starts, probes, and of
waiting for memory (TensorFlow's allocator waits ten seconds before it gives up; "no wait" omits these). A search that
does not meet the target counts with all that it spent. Ratios are stock's cost to ours, for the same seed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# More threads make the small matrices of a Gaussian process slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from common import keep, parser
from cost_tasks import MADE, OURS, STOCK, TRAINED, Record, record_of

TOLERANCE = 0.01
# Stock's tuner, and ours beside it.
PAIRINGS = (
    ("RandomSearch", "RandomSearch"),
    ("BayesianOptimization", "BayesianOptimization"),
    ("BayesianOptimization", "OptunaSearch"),
)
# What is compared, and where `Run.to_reach` says it.
RATIOS = {"presentations": 1, "seconds": 2, "seconds_without_waits": 3}


def known_searches(path: Path | None) -> dict[tuple[str, str, str, int], dict[str, Any]]:
    """Stock's searches of an earlier run: accumtune can change, they do not."""
    from cost_replay import Run

    found = [] if path is None else json.loads(path.read_text())["searches"]
    return {
        (it["task"], it["side"], it["tuner"], it["seed"]): it | {"run": Run(**it["run"])}
        for it in found
        if it["side"] == STOCK
    }


def job(task: str, side: str, tuner: str, seed: int) -> dict[str, Any]:
    from cost_replay import search

    started = time.monotonic()
    run = search(record_of(task), side, tuner, seed)
    return {"task": task, "side": side, "tuner": tuner, "seed": seed, "run": run, "took": time.monotonic() - started}


def all_jobs(
    tasks: list[str], seeds: list[int], pairings: list[tuple[str, str]]
) -> list[tuple[str, str, str, int]]:
    sides = dict.fromkeys((side, name) for pair in pairings for side, name in zip((STOCK, OURS), pair, strict=True))
    return [(task, *side, seed) for task in tasks for side in sides for seed in seeds]


def ratios(record: Record, stock: list[Any], ours: list[Any]) -> dict[str, Any]:
    """What stock needs for what ours does, seed by seed."""
    target = record.best * (1 + TOLERANCE)
    needed = [(one.to_reach(target), other.to_reach(target)) for one, other in zip(stock, ours, strict=True)]
    found: dict[str, Any] = {
        name: [one[column] / other[column] for one, other in needed] for name, column in RATIOS.items()
    }
    for side, runs in ((STOCK, stock), (OURS, ours)):
        reached = [run.to_reach(target) for run in runs]
        found[side] = {
            "met": sum(met for met, *_ in reached),
            "failed_trials": statistics.mean(sum(run.failures) for run in runs),
            "would_have_ended": sum(run.would_have_ended() for run in runs),
            "pick_above_best": [run.pick / record.best - 1 for run in runs],
            "seconds": statistics.median(run.seconds for run in runs),
            "presentations": statistics.median(run.presentations for run in runs),
        }
    return found


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):5.1f} [{min(values):.1f}, {max(values):.1f}]"


def printed(task: str, names: tuple[str, str], row: dict[str, Any], seeds: int) -> str:
    stock, ours = row[STOCK], row[OURS]
    picks = "  ".join(f"{100 * max(side['pick_above_best']):5.1f} %" for side in (stock, ours))
    spreads = "".join(f"{spread(row[name]):>20}" for name in RATIOS)
    return (
        f"{task:<20}{names[0][:8]:<9}{names[1][:8]:<9}{stock['met']:>3}/{seeds} {ours['met']:>3}/{seeds}"
        f"{stock['failed_trials']:>7.1f} {ours['failed_trials']:>4.1f}{stock['would_have_ended']:>5}/{seeds}"
        f"{spreads}  {picks}"
    )


HEADER = (
    f"{'':20}{'':18}{'met target':^10}{'failed trials':^13}{'ended':>5}"
    f"{'stock / ours to the target: median [min, max]':^62}"
    f"{'worst pick':>14}\n"
    f"{'task':<20}{'stock':<9}{'ours':<9}{'stock':>5} {'ours':>5}{'stock':>7} {'ours':>4}{'':7}"
    f"{'presentations':>20}{'wall time':>20}{'no wait':>20}  {'stock':>7}  {'ours':>7}"
)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tasks", nargs="*", default=[*TRAINED, *MADE])
    options.add_argument("--seeds", type=int, default=8)
    options.add_argument("--processes", type=int, default=1)
    options.add_argument("--ours", nargs="*", default=[ours for _, ours in PAIRINGS], help="which tuners of accumtune")
    options.add_argument("--known", type=Path, help="a --json of an earlier run: stock's searches are taken from there")
    arguments = options.parse_args()
    tasks = [name for task in arguments.tasks for name in (MADE if task == "made" else [task])]
    seeds = list(range(1, arguments.seeds + 1))  # Keras Tuner takes 0 for "any"
    found: dict[str, list[Any]] = {"rows": [], "searches": []}
    pairings = [names for names in PAIRINGS if names[1] in arguments.ours]
    known = known_searches(arguments.known)
    print(HEADER)
    with ProcessPoolExecutor(arguments.processes) as pool:
        for task in tasks:
            search_task(task, seeds, pairings, pool, found, known)
            keep(arguments.json, found)  # after each task: hours of searches are not lost with the last one
    print_summary(found["rows"], pairings, len(seeds), {task: record_of(task).infeasible_share() for task in tasks})


def search_task(
    task: str,
    seeds: list[int],
    pairings: list[tuple[str, str]],
    pool: ProcessPoolExecutor,
    found: dict[str, list[Any]],
    known: dict[Any, Any],
) -> None:
    """Runs the searches of one task, prints its rows and adds them to what was found."""
    jobs = all_jobs([task], seeds, pairings)
    futures = {key: pool.submit(job, *key) for key in jobs if key not in known}
    runs = {}
    for key in jobs:
        result = known[key] if key in known else futures[key].result()
        runs[key[1:]] = result["run"]
        found["searches"].append(result | {"run": dataclasses.asdict(result["run"])})
        print(f"{' '.join(map(str, key))}: {result['took']:.0f} s", file=sys.stderr, flush=True)
    record = record_of(task)
    for names in pairings:
        stock = [runs[STOCK, names[0], seed] for seed in seeds]
        ours = [runs[OURS, names[1], seed] for seed in seeds]
        row = ratios(record, stock, ours)
        found["rows"].append({"task": task, "stock": names[0], "ours": names[1], **row})
        print(printed(task, names, row, len(seeds)), flush=True)


def print_summary(
    rows: list[Any], pairings: list[tuple[str, str]], seeds: int, infeasible: dict[str, float]
) -> None:
    shares = ", ".join(f"{task} {100 * share:.0f} %" for task, share in infeasible.items())
    print(f"\nPairs that do not fit: {shares}")
    for names in pairings:
        mine = [row for row in rows if (row["stock"], row["ours"]) == names]
        met = {side: sum(row[side]["met"] for row in mine) / (seeds * len(mine)) for side in (STOCK, OURS)}
        medians = {name: [statistics.median(row[name]) for row in mine] for name in RATIOS}
        presentations, wall, no_wait = (statistics.median(values) for values in medians.values())
        slower = sum(ratio < 1 for row in mine for ratio in row["seconds"])
        picks = sum(pick <= TOLERANCE for row in mine for pick in row[OURS]["pick_above_best"])
        print(
            f"{names[0]} → {names[1]}: target met {met[STOCK]:.2f} → {met[OURS]:.2f}; stock / ours, median over tasks: "
            f"presentations {presentations:.1f}, wall time {wall:.1f} (without waits {no_wait:.1f}), least of a task "
            f"{min(medians['seconds']):.1f}; stock was sooner in {slower} of {seeds * len(mine)} searches; "
            f"pick within 1 % in {picks} of {seeds * len(mine)}"
        )


if __name__ == "__main__":
    main()
