"""How many whole trainings a search needs: `OptunaSearch` without a pruner, with "forecast", with "freeze-thaw"; stock.

    python experiments/benchmarks/search/freeze_thaw.py [--seeds 5] [--designs whole freeze-thaw …] [--json PATH]

The oracles are the products'; a table of learning curves takes the place of training, and memory plays no part. Twenty
tasks: the five of `search_cost.py`, and three of each of five made families (the number of a task is its seed), whose
curves cross in different ways. "freeze-thaw" was designed on other tasks (noisy quadratic models, bowls, ridges), and
not changed after it had seen these. In `many_pairs` the end depends on the ratio of the rate to a power of the batch,
with a flat bottom, and hardly on the batch itself.

A search has met the target at the first epoch within 1 % of the best of the table, and has 40 whole trainings for it.
Its cost is the epochs trained until then, over those of a whole training. Differences are between searches with the
same task and seed.

"random" and "bayesian" are Keras Tuner's own oracles, over micro-batch and accumulation steps instead of the effective
batch: the smaller half of the batches, and the steps up to the largest batch. Wall time is that of the trainings, for
three durations of a whole one; of the oracle's decisions, as the replay takes them; and what each process and each
architecture costs beside training: `SECONDS`, from `time_beside_training.py`.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from common import keep, parser
from cost_tasks import MADE, TRAINED, record_of
from unchecked_gaussian import unchecked

TOLERANCE, MOST_TRAININGS = 0.01, 40
OURS, STOCK = ("whole", "forecast", "freeze-thaw"), ("random", "bayesian")
BATCH, RATE = "effective_batch_size", "learning_rate"
PAIR = "micro_batch_size", "accumulation_steps"
WHOLE_SECONDS = (2, 10, 60)


@dataclass(frozen=True)
class Seconds:
    """What a search costs beside training, for each start of a process (or each trial), and each architecture."""

    start: float
    architecture: float


# A trial's duration less its training's: of a known architecture, and what a new one adds to it.
SECONDS = {"ours": Seconds(0.45, 1.15), "stock": Seconds(0.7, 0.1)}
Losses = Callable[[dict[str, float]], list[float]]


@dataclass(frozen=True)
class Task:
    name: str
    space: dict[str, tuple[float, ...]]
    curves: dict[tuple[float, ...], list[float]]

    @property
    def epochs(self) -> int:
        return len(next(iter(self.curves.values())))

    @property
    def best(self) -> float:
        return min(map(min, self.curves.values()))


def recorded(name: str) -> Task:
    record, space = record_of(name), record_of(name).space
    values = {BATCH: space.effective_batch_sizes, RATE: space.learning_rates, "width": tuple(map(float, space.widths))}
    points = itertools.product(*values.values())
    return Task(name, values, {p: list(record.curve(int(p[0]), p[1], int(p[2]))) for p in points})


def made(family: str, number: int) -> Task:
    draw = random.Random(f"fresh {family} {number}")
    low, high = draw.choice([(3, 10), (4, 11), (3, 12), (5, 12)])
    count, decades, first = draw.choice([4, 5, 7]), draw.choice([1.5, 2.0, 3.0]), 10 ** draw.uniform(-4, -3)
    space: dict[str, tuple[float, ...]] = {
        BATCH: tuple(2**power for power in range(low, high + 1)),
        RATE: tuple(first * 10 ** (decades * step / (count - 1)) for step in range(count)),
    }
    extra = draw.choice(["width", "width", "decay", "both"])
    if extra != "decay":
        space["width"] = (16.0, 32.0, 64.0, 128.0)[: draw.choice([2, 3, 4])]
    if extra != "width":
        space["decay"] = (1e-5, 1e-4, 1e-3, 1e-2)[: draw.choice([3, 4])]
    epochs, noise = draw.choice([3, 4, 5, 6, 8, 10]), draw.uniform(0.0005, 0.006)
    losses = FAMILIES[family](draw, space, epochs)
    points = list(itertools.product(*space.values()))
    table = np.array([losses(dict(zip(space, point, strict=True))) for point in points])
    table *= np.exp(noise * np.random.default_rng(number + 7700).standard_normal(table.shape))
    return Task(f"{family} {number}", space, dict(zip(points, table.tolist(), strict=True)))


def others(draw: random.Random, space: dict[str, tuple[float, ...]]) -> Callable[[dict[str, float]], float]:
    """What width and weight decay add to the end."""
    places = draw.random(), draw.random()
    weights = draw.uniform(0.01, 0.08), draw.uniform(0.01, 0.08)
    power = draw.choice([1.0, 2.0])

    def added(values: dict[str, float]) -> float:
        parts = zip(("width", "decay"), places, weights, strict=True)
        found = [(space[name], values[name], *rest) for name, *rest in parts if name in values]
        return sum(w * abs(of.index(v) / max(len(of) - 1, 1) - place) ** power for of, v, place, w in found)

    return added


def apart(values: dict[str, float], batch: float, rate: float, power: float) -> tuple[float, float]:
    """How far the batch is from the best one, and the rate from the best one for the batch."""
    doublings = math.log2(values[BATCH] / batch)
    return doublings, math.log10(values[RATE] / rate) - power * doublings * math.log10(2)


def scaling_law(draw: random.Random, space: dict[str, Any], epochs: int) -> Losses:
    """A power law in the steps, which count less in small batches; noise from the rate over the batch; an edge."""
    samples, noise_scale = draw.choice([4096, 16384, 50000]), 2 ** draw.uniform(3, 10)
    floor, gain, power = draw.uniform(0.1, 1.0), draw.uniform(1, 3), draw.uniform(0.2, 0.6)
    edge, noise, more = 10 ** draw.uniform(-2.5, -1.3), 10 ** draw.uniform(-1.0, 0.3), others(draw, space)

    def losses(values: dict[str, float]) -> list[float]:
        batch, speed = values[BATCH], values[RATE] / edge
        each = samples / batch / (1 + noise_scale / batch) * speed / (1 + speed * speed) * 8
        ends = [(floor + gain * (1 + each * epoch) ** -power) * (1 + more(values)) for epoch in range(1, epochs + 1)]
        return [min(it + noise * speed * 16 / batch * 0.3 + 0.2 * max(speed - 1, 0) ** 2, 5.0) for it in ends]

    return losses


def annealed(draw: random.Random, space: dict[str, Any], epochs: int) -> Losses:
    """The rate falls as a cosine: large ones look worse until the end."""
    batch, rate, power = draw.choice(space[BATCH]), draw.choice(space[RATE]), draw.uniform(0.3, 0.9)
    in_batch, in_rate, more = draw.uniform(0.005, 0.02), draw.uniform(0.1, 0.35), others(draw, space)
    scale, noise, first = draw.uniform(0.3, 2), draw.uniform(0.1, 0.5), draw.uniform(1.5, 4)

    def losses(values: dict[str, float]) -> list[float]:
        b, s = apart(values, batch, rate, power)
        end = 1 + in_batch * b * b + in_rate * s * s * (1 if s < 0 else 1.6) + more(values)
        speed = first * 10 ** (0.4 * s)
        found = []
        for part in (epoch / epochs for epoch in range(1, epochs + 1)):
            done = part + 0.5 * math.sin(2 * math.pi * part) / (2 * math.pi)
            now = 0.6 * (math.exp(-speed * done) - math.exp(-speed))
            now += noise * 0.5 * (1 + math.cos(math.pi * part)) * 10 ** (0.6 * min(s, 1.2)) * 0.3
            found.append(scale * (end + now))
        return found

    return losses


def weibull(draw: random.Random, space: dict[str, Any], epochs: int) -> Losses:
    """Curves of different shapes; after 60 % of the time all drop, those of large rates most."""
    batch, rate, power = draw.choice(space[BATCH]), draw.choice(space[RATE]), draw.uniform(0.2, 1.1)
    in_batch, in_rate, cross = draw.uniform(0.005, 0.03), draw.uniform(0.1, 0.4), draw.uniform(-0.05, 0.05)
    more, scale, drop, first = others(draw, space), draw.uniform(0.05, 3), draw.uniform(0, 0.25), draw.uniform(1, 4)

    def losses(values: dict[str, float]) -> list[float]:
        b, s = apart(values, batch, rate, power)
        end = 1 + in_batch * b * b + in_rate * s * s + cross * b * s + more(values)
        speed, shape = first * 10 ** (0.35 * s) * 2 ** (-0.05 * b), 0.6 + 0.5 / (1 + math.exp(2 * s))
        left = [math.exp(-((speed * 2 * epoch / epochs) ** shape)) for epoch in range(1, epochs + 1)]
        late = [drop * 10 ** (0.3 * s) * 0.3 * (epoch / epochs < 0.6) for epoch in range(1, epochs + 1)]
        return [scale * (end * (1 + 0.8 * (it - left[-1])) + add) for it, add in zip(left, late, strict=True)]

    return losses


def overfit(draw: random.Random, space: dict[str, Any], epochs: int) -> Losses:
    """A hyperbola that rises again where the rate is large."""
    batch, rate, power = draw.choice(space[BATCH]), draw.choice(space[RATE]), draw.uniform(0.3, 1.0)
    in_batch, in_rate, more = draw.uniform(0.003, 0.02), draw.uniform(0.1, 0.3), others(draw, space)
    scale, half, rise = draw.uniform(0.3, 2), draw.uniform(0.05, 0.3), draw.uniform(0.05, 0.4)

    def losses(values: dict[str, float]) -> list[float]:
        b, s = apart(values, batch, rate, power)
        end = 1 + in_batch * b * b + in_rate * s * s + more(values)
        times = [10 ** (0.5 * s) * epoch / epochs for epoch in range(1, epochs + 1)]
        return [scale * (end + 0.9 * half / (half + it) + rise * 0.3 * max(0.0, it - 0.8) ** 2) for it in times]

    return losses


def many_pairs(draw: random.Random, space: dict[str, Any], epochs: int) -> Losses:
    place, power, tilt = draw.uniform(0.25, 0.75), draw.uniform(0.4, 1.0), draw.uniform(-0.004, 0.004)
    more, scale, in_rate = others(draw, space), draw.uniform(0.3, 2), draw.uniform(0.15, 0.5)
    flat = draw.uniform(0.05, 0.3)
    ratios = [math.log10(rate) - power * math.log10(batch) for rate in space[RATE] for batch in space[BATCH]]
    middle = min(ratios) + place * (max(ratios) - min(ratios))
    curved, slow = draw.uniform(1, 5), draw.uniform(0.1, 0.5)

    def losses(values: dict[str, float]) -> list[float]:
        s = math.log10(values[RATE]) - power * math.log10(values[BATCH]) - middle
        number = space[BATCH].index(values[BATCH])
        end = 1 + in_rate * max(0.0, abs(s) - flat) ** 2 + tilt * number + more(values)
        late = min(10 ** (-slow * s) * (1 + 0.03 * number), 10.0)
        left = [1 / (1 + curved * epoch / epochs / late) for epoch in range(1, epochs + 1)]
        return [scale * end * (1 + 0.7 * (it - left[-1])) for it in left]

    return losses


FAMILIES = {it.__name__: it for it in (scaling_law, annealed, weibull, overfit, many_pairs)}


def tasks() -> Iterator[Task]:
    yield from map(recorded, (*TRAINED, *MADE))
    yield from (made(family, number) for family in FAMILIES for number in range(3))


def oracle_of(task: Task, seed: int, design: str) -> Any:
    """The oracle of a design; all but training is its own."""
    import keras_tuner
    from keras_tuner.oracles import BayesianOptimizationOracle, RandomSearchOracle

    from accumtune.oracles.freeze_thaw_oracle import FreezeThawOracle
    from accumtune.oracles.optuna_oracle import OptunaOracle

    space = dict(task.space)
    if design in STOCK:
        batches = space.pop(BATCH)
        micro = batches[: (len(batches) + 1) // 2]
        steps = [2**power for power in range(int(math.log2(batches[-1] / micro[-1])) + 1)]
        space |= dict(zip(PAIR, (micro, steps), strict=True))
    hp = keras_tuner.HyperParameters()
    for name, values in space.items():
        hp.Choice(name, [int(it) if name in (BATCH, *PAIR) else it for it in values], ordered=True)
    objective = keras_tuner.Objective("val_loss", "min")
    given: dict[str, Any] = {"objective": objective, "seed": seed, "hyperparameters": hp}
    if design == "freeze-thaw":
        oracle: Any = FreezeThawOracle(**given, max_trials=MOST_TRAININGS)
    elif design in STOCK:
        oracle_class = BayesianOptimizationOracle if design == "bayesian" else RandomSearchOracle
        oracle = oracle_class(**given, max_trials=MOST_TRAININGS)
    else:
        oracle = OptunaOracle(**given)
    oracle.verbose, oracle._save_trial, oracle.save = 0, lambda trial: None, lambda: None
    oracle.epochs = task.epochs
    return oracle


def values_of(trial: Any, task: Task) -> tuple[float, ...]:
    """The point of the table that a trial trains."""
    values = dict(trial.hyperparameters.values)
    if PAIR[0] in values:
        values[BATCH] = math.prod(values[name] for name in PAIR)
    return tuple(float(values[name]) for name in task.space)


def needed(task: Task, seed: int, design: str) -> dict[str, Any]:
    """One search: whether it met the target, the whole trainings until then, and what else they took."""
    from keras_tuner.engine.trial import TrialStatus

    from accumtune.oracles import keras_tuner_adapter
    from accumtune.oracles.freeze_thaw_oracle import Curve
    from accumtune.search.pruning.pruner import PruningMonitor

    oracle = oracle_of(task, seed, design)
    is_freezing = design == "freeze-thaw"
    monitor = PruningMonitor("forecast", oracle.objective) if design == "forecast" else None
    curves: dict[str, Curve] = {}
    oracle.curve_of = lambda trial_id: curves.get(trial_id, Curve())
    if monitor is not None:
        oracle.forecast = monitor.forecast
    target, trained, deciding = task.best * (1 + TOLERANCE), 0, 0.0
    points: list[tuple[float, ...]] = []

    def result(is_met: bool) -> dict[str, Any]:
        costs = SECONDS["stock" if design in STOCK else "ours"]
        widths = {point[2:3] for point in points} if "width" in task.space else {()}
        beside = deciding + costs.start * len(points) + costs.architecture * len(widths)
        wall = [trained / task.epochs * seconds + beside for seconds in WHOLE_SECONDS]
        return {"met": is_met, "trainings": trained / task.epochs, "starts": len(points), "wall": wall}

    while trained < MOST_TRAININGS * task.epochs:
        began = time.process_time()
        trial = oracle.create_trial("tuner0")
        deciding += time.process_time() - began
        if trial.status != TrialStatus.RUNNING:
            break
        last = trial.trial_id
        points.append(values_of(trial, task))
        curve = task.curves[points[-1]]
        end = (oracle.pause_after(last) if is_freezing else None) or task.epochs
        for epoch in range(len(oracle.curve_of(last).values), end):
            trained += 1
            if curve[epoch] <= target:
                return result(is_met=True)
            if monitor is not None and monitor.is_hopeless(last, epoch, {"val_loss": curve[epoch]}) and epoch + 1 < end:
                end = epoch + 1
                break
        if monitor is not None:
            monitor.end(last, "pruned" if end < task.epochs else "completed")
        curves[last] = Curve(curve[:end], is_freezing and end < task.epochs, end)
        keras_tuner_adapter.end_completed(oracle, trial, {"val_loss": min(curve[:end])}, 0)
    return result(is_met=False)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--designs", nargs="*", default=[*OURS, *STOCK], choices=[*OURS, *STOCK])
    arguments = options.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    walls = "".join(f" {seconds} s each |" for seconds in WHOLE_SECONDS)
    print(f"| design | whole trainings | starts | met the target | fewer than the first |{walls}")
    print("|---|---|---|---|---|" + "---|" * len(WHOLE_SECONDS))
    for design in arguments.designs:
        with unchecked():
            runs = found[design] = [
                {"task": task.name, "seed": seed, **needed(task, seed, design)}
                for task in tasks()
                for seed in range(1, arguments.seeds + 1)
            ]
        first = found[arguments.designs[0]]
        fewer = [one["trainings"] - other["trainings"] for one, other in zip(first, runs, strict=True)]
        error = statistics.stdev(fewer) / math.sqrt(len(fewer))
        trainings, starts = (statistics.mean(run[name] for run in runs) for name in ("trainings", "starts"))
        met = f"{sum(run['met'] for run in runs)} of {len(runs)}"
        walls = "".join(f" {statistics.mean(it):.0f} s |" for it in zip(*(run["wall"] for run in runs), strict=True))
        gain = f"{statistics.mean(fewer):.2f} ± {error:.2f}"
        print(f"| {design} | {trainings:.2f} | {starts:.1f} | {met} | {gain} |{walls}", flush=True)
        keep(arguments.json, found)


if __name__ == "__main__":
    main()
