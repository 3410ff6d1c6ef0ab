"""The tasks of `search_cost.py`: two that are trained, and three synthetic ones whose best effective batch is known.

A record has the results of a task's exhaustive grid: the validation loss of every effective batch, learning rate and
width after each epoch, and the memory and time of every micro-batch, with accumulation by accumtune and by Keras.
`cost_record.py` makes the records of the trained tasks; those of the synthetic ones are formulas.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MIB = 2**20
RECORDS = Path(__file__).with_name("records")
OURS, STOCK = "accumtune", "keras"


@dataclass(frozen=True)
class Space:
    """What a search may choose from."""

    micro_batch_sizes: tuple[int, ...]
    accumulation_steps: tuple[int, ...]
    learning_rates: tuple[float, ...]
    widths: tuple[int, ...]

    @property
    def effective_batch_sizes(self) -> tuple[int, ...]:
        return tuple(sorted({m * k for m in self.micro_batch_sizes for k in self.accumulation_steps}))

    def declare(self, hp: Any) -> tuple[float, int]:
        """The user's own hyperparameters, as a build function declares them: learning rate and width."""
        rate = hp.Choice("learning_rate", list(self.learning_rates), ordered=True)
        return rate, hp.Choice("width", list(self.widths), ordered=True)


@dataclass(frozen=True)
class Cost:
    """What training with one micro-batch costs on one side.

    Args:
        peaks_bytes: peak memory with 1 accumulation step, and with more.
        seconds_per_micro_step: time of a forward and backward pass, with 1 step and with more.
        seconds_per_update: time of an update, beside its passes.
    """

    peaks_bytes: tuple[int, int]
    seconds_per_micro_step: tuple[float, float]
    seconds_per_update: float = 0.0

    def peak_bytes(self, accumulation_steps: int) -> int:
        return self.peaks_bytes[accumulation_steps > 1]

    def seconds(self, accumulation_steps: int, updates: float) -> float:
        passes = accumulation_steps * self.seconds_per_micro_step[accumulation_steps > 1]
        return updates * (passes + self.seconds_per_update)


@dataclass(frozen=True)
class Record:
    """A task and its exhaustive grid.

    Args:
        losses: of `(effective batch, learning rate, width)`: the validation loss after each epoch.
        costs: of `(side, width, micro-batch)`.
        start_seconds: of a trial beside training, by side: process, building, tracing, reporting.
        out_of_memory_seconds: what a trial takes that runs out of memory, its start included.
        probe_out_of_memory_seconds: what a probe takes that does: it is ended when it is seen to wait for memory.
        inspect_seconds: of a process that builds a model and describes it, without training.
    """

    name: str
    space: Space
    samples: int
    epochs: int
    max_trials: int
    memory_budget_bytes: int
    losses: dict[tuple[int, float, int], tuple[float, ...]] = field(repr=False)
    costs: dict[tuple[str, int, int], Cost] = field(repr=False)
    start_seconds: dict[str, float]
    out_of_memory_seconds: float
    probe_out_of_memory_seconds: float
    inspect_seconds: float
    loss_of: Callable[[int, float, int], tuple[float, ...]] | None = None

    def curve(self, effective: int, rate: float, width: int) -> tuple[float, ...]:
        if self.loss_of is not None:
            return self.loss_of(effective, rate, width)
        return self.losses[effective, rate, width]

    def best_of(self, effective: int, rate: float, width: int) -> float:
        """The objective: the best epoch's."""
        return min(self.curve(effective, rate, width))

    def fits(self, side: str, width: int, micro: int, steps: int) -> bool:
        return self.costs[side, width, micro].peak_bytes(steps) <= self.memory_budget_bytes

    def within_budget(self, side: str) -> Iterator[tuple[int, float, int]]:
        """All that the pairs of the two lists can train under the budget."""
        space = self.space
        for rate, width in itertools.product(space.learning_rates, space.widths):
            pairs = itertools.product(space.micro_batch_sizes, space.accumulation_steps)
            reached = {m * k for m, k in pairs if self.fits(side, width, m, k)}
            yield from ((effective, rate, width) for effective in sorted(reached))

    @property
    def best(self) -> float:
        """The best of the exhaustive grid under the budget."""
        return min(self.best_of(*point) for point in self.within_budget(STOCK))

    def infeasible_share(self) -> float:
        space = self.space
        pairs = list(itertools.product(space.widths, space.micro_batch_sizes, space.accumulation_steps))
        return sum(not self.fits(STOCK, *pair) for pair in pairs) / len(pairs)

    # Files

    def write(self) -> None:
        RECORDS.mkdir(exist_ok=True)
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "loss_of"}
        values["space"] = dataclasses.asdict(self.space)
        losses = [[*point, *(round(loss, 5) for loss in curve)] for point, curve in self.losses.items()]
        costs = [[*key, dataclasses.asdict(cost)] for key, cost in self.costs.items()]
        text = json.dumps(values | {"losses": losses, "costs": costs}, indent=None).replace("], [", "],\n[")
        (RECORDS / f"{self.name}.json").write_text(text + "\n")

    @classmethod
    def read(cls, name: str) -> Record:
        values = json.loads((RECORDS / f"{name}.json").read_text())
        space = Space(**{key: tuple(value) for key, value in values.pop("space").items()})
        losses = {(b, r, w): tuple(curve) for b, r, w, *curve in values.pop("losses")}
        costs = {
            (side, width, micro): Cost(**{k: tuple(v) if isinstance(v, list) else v for k, v in cost.items()})
            for side, width, micro, cost in values.pop("costs")
        }
        return cls(space=space, losses=losses, costs=costs, **values)


# Trained tasks


@dataclass(frozen=True)
class Trained:
    """A task with a model and data.

    Args:
        load: gives x, y, x_val, y_val. The samples are a multiple of every effective batch: Keras's own accumulation
            drops, or carries over, what is left at the end of an epoch.
        build: `build(learning_rate, width, gradient_accumulation_steps)` gives a compiled model.
    """

    name: str
    space: Space
    epochs: int
    max_trials: int
    load: Callable[[], tuple[Any, Any, Any, Any]]
    build: Callable[[float, int, int | None], Any]


_PAIRS = {"micro_batch_sizes": (8, 16, 32, 64, 128, 256), "accumulation_steps": (1, 2, 4, 8)}


def _fashion_data() -> tuple[Any, Any, Any, Any]:
    import keras

    (x, y), (x_val, y_val) = keras.datasets.fashion_mnist.load_data()
    return x[:2048, ..., None], y[:2048], x_val[:1024, ..., None], y_val[:1024]


def _fashion_model(rate: float, width: int, steps: int | None) -> Any:
    import keras
    from keras import layers

    model = keras.Sequential(
        [
            keras.Input((28, 28, 1), dtype="uint8"), layers.Rescaling(1 / 255),
            layers.Conv2D(width, 3, strides=2, activation="relu"), layers.Conv2D(2 * width, 3, activation="relu"),
            layers.MaxPooling2D(), layers.Flatten(), layers.Dense(10),
        ]
    )  # fmt: skip
    return _compiled(model, rate, steps)


CONTEXT_BYTES = 48


def _text_data() -> tuple[Any, Any, Any, Any]:
    """The byte that follows each of many places in the source of Python's standard library; other files validate."""
    import numpy as np

    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(files)
    generator = np.random.default_rng(0)

    def cut(files: list[Path], samples: int) -> tuple[Any, Any]:
        text = np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8) & 127
        places = generator.integers(0, len(text) - CONTEXT_BYTES - 1, samples)
        windows = np.stack([text[place : place + CONTEXT_BYTES + 1] for place in places])
        return windows[:, :-1], windows[:, -1].astype("int32")

    return *cut(files[:60], 4096), *cut(files[60:80], 1024)


def _text_model(rate: float, width: int, steps: int | None) -> Any:
    import keras
    from keras import layers

    model = keras.Sequential(
        [
            keras.Input((CONTEXT_BYTES,), dtype="uint8"), layers.Embedding(128, 32),
            layers.Conv1D(width, 4, activation="relu"), layers.Conv1D(width, 4, strides=2, activation="relu"),
            layers.Flatten(), layers.Dense(128),
        ]
    )  # fmt: skip
    return _compiled(model, rate, steps)


def _compiled(model: Any, rate: float, steps: int | None) -> Any:
    import keras

    optimizer = keras.optimizers.Adam(rate, gradient_accumulation_steps=steps)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


TRAINED = {
    "fashion": Trained(
        "fashion", Space(**_PAIRS, learning_rates=(3e-4, 1e-3, 3e-3, 1e-2), widths=(8, 24)), 3, 30,
        _fashion_data, _fashion_model,
    ),
    "text": Trained(
        "text", Space(**_PAIRS, learning_rates=(3e-4, 1e-3, 3e-3, 1e-2), widths=(24, 72)), 3, 30,
        _text_data, _text_model,
    ),
}  # fmt: skip


# Made tasks

MADE = {"made, best at 32": 32, "made, best at 256": 256, "made, best at 2048": 2048}
_MADE_SPACE = Space((8, 16, 32, 64, 128, 256), (1, 2, 4, 8, 16), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (32, 64, 128, 256))
_MADE_SAMPLES, _MADE_EPOCHS = 8192, 5


def made_record(name: str) -> Record:
    """A bowl in the logarithms of effective batch and learning rate; the best rate grows with the root of the batch.

    Large batches and small rates start slower, so that the curves of trials cross. Half of the micro-batches do not
    fit. A pass takes 2 ms and 20 to 60 µs per sample, and running out of memory the ten seconds for which TensorFlow's
    allocator waits (a probe, which is ended sooner, two).
    """
    best = MADE[name]

    def loss_of(effective: int, rate: float, width: int) -> tuple[float, ...]:
        batch = math.log2(effective / best)
        speed = math.log10(rate / (1e-3 * math.sqrt(effective / 256)))
        end = 0.3 * (1 + 0.02 * batch**2 + 0.25 * speed**2 + 0.03 * math.log2(256 / width))
        behind = (effective / 256 * 1e-3 / rate) ** 0.25
        return tuple(end * (1 + behind * 0.5 ** (epoch + 1)) for epoch in range(_MADE_EPOCHS - 1)) + (end,)

    costs = {}
    for side, width, micro in itertools.product((OURS, STOCK), _MADE_SPACE.widths, _MADE_SPACE.micro_batch_sizes):
        static = 4 * MIB + width * 16_384
        # Width 256 fits up to a micro-batch of 16, width 32 up to 128.
        peak = static + micro * width * 1470
        seconds = 0.002 + micro * 2e-5 * (width / 64) ** 0.5
        costs[side, width, micro] = Cost((peak, peak + static // 4), (seconds, seconds), 0.001)
    return Record(
        name, _MADE_SPACE, _MADE_SAMPLES, _MADE_EPOCHS, max_trials=45, memory_budget_bytes=16 * MIB, losses={},
        costs=costs, start_seconds={OURS: 1.5, STOCK: 1.0}, out_of_memory_seconds=11.0,
        probe_out_of_memory_seconds=3.7, inspect_seconds=0.5, loss_of=loss_of,
    )  # fmt: skip


def record_of(name: str) -> Record:
    return made_record(name) if name in MADE else Record.read(name)
