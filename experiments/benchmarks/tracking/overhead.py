"""Measures the cost of tracking: a search without it, with SQLite, with a server that is down, and a silent one.

    python experiments/benchmarks/tracking/overhead.py [--rounds 2] [--quick]

The same small search (digits, real trials) runs in all four ways at once, in several rounds. An epoch waits rather than
computes: the wall time of computing trials varies by a fifth, which would hide a difference of 1 %. The CPU time of the
tracker, which would slow down computing trials, is printed too.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[1]))

# Imported once: each search is a fork of the process that imports this, and starts its own trials' processes.
import keras
from common import Table, keep, parser
from sklearn.datasets import load_digits

import accumtune
from accumtune.tracking.journal import read_search
from accumtune.tracking.mlflow.tracker import Tracker

MODES = ("none", "sqlite", "dead", "silent")


def build_model(hp: Any) -> Any:
    import keras

    width = hp.Choice("width", [16, 32])
    layers = [keras.layers.Conv2D(width, 3, activation="relu"), keras.layers.Flatten(), keras.layers.Dense(10)]
    model = keras.Sequential([keras.Input((8, 8, 1)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(hp.Float("learning_rate", 1e-3, 1e-2)), loss=loss, metrics=["accuracy"])
    return model


class Waiting(keras.callbacks.Callback):
    """A long epoch that computes nothing."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        time.sleep(self.seconds)


def search(folder: Path, uri: Any, trials: int, epochs: int, epoch_seconds: float) -> dict[str, float]:
    """The search, in a process of its own; what it took, and what of that was the tracker's."""
    os.chdir(folder)
    spent = {"waited_seconds": 0.0, "tracker_cpu_seconds": 0.0}
    _measure(spent)
    digits = load_digits()
    x = (digits.images[..., None] / 16.0).astype("float32")
    began = time.perf_counter()
    accumtune.RandomSearch(
        build_model, objective="val_loss", max_trials=trials, seed=1, memory_budget="16MiB",
        micro_batch_sizes=(16, 32), accumulation_steps=(1, 2), tracking_uri=uri, directory="searches",
        project_name="benchmark",
    ).search(x[:64], digits.target[:64], validation_data=(x[64:128], digits.target[64:128]), epochs=epochs,
             callbacks=[Waiting(epoch_seconds)], verbose=0)  # fmt: skip
    wall = time.perf_counter() - began
    record = read_search(folder / "searches" / "benchmark")
    return {"seconds": wall, "epochs": sum(len(trial.epochs) for trial in record.trials), **spent}


def _measure(spent: dict[str, float]) -> None:
    """In the process of the search: clocks around what it waits for, and in the tracker's own thread."""

    def timed(name: str) -> None:
        original = getattr(Tracker, name)

        def call(self: Tracker) -> Any:
            began = time.perf_counter()
            try:
                return original(self)
            finally:
                spent["waited_seconds"] += time.perf_counter() - began

        setattr(Tracker, name, call)

    timed("start")
    timed("stop")
    run = Tracker._run

    def counted(self: Tracker, *arguments: Any, **keywords: Any) -> None:
        began = time.thread_time()
        try:
            run(self, *arguments, **keywords)
        finally:
            spent["tracker_cpu_seconds"] += time.thread_time() - began

    Tracker._run = counted  # type: ignore[method-assign]


def begin(action: Callable[[], dict[str, float]], folder: Path) -> int:
    """Runs a function in a fork of this process, which leaves what it returns in the folder."""
    folder.mkdir(parents=True)
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.setsid()
            with open(folder / "log.txt", "w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            (folder / "result.json").write_text(json.dumps(action()))
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def end(pid: int, folder: Path) -> dict[str, float]:
    """What the fork has left."""
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError((folder / "log.txt").read_text()[-3000:])
    return dict(json.loads((folder / "result.json").read_text()))


@contextmanager
def store(mode: str, folder: Path) -> Iterator[Any]:
    """The tracking URI of a mode."""
    if mode == "none":
        yield False
    elif mode == "sqlite":
        yield f"sqlite:///{folder / 'mlflow.db'}"
    else:
        listener = socket.create_server(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if mode == "dead":
            listener.close()
        yield address
        listener.close()


def searches(root: Path, rounds: int, trials: int, epochs: int, epoch_seconds: float) -> list[dict[str, Any]]:
    """All modes at once, as often as asked."""
    found: list[dict[str, Any]] = []
    for index in range(1, rounds + 1):
        folders = {mode: root / f"search_{index}_{mode}" for mode in MODES}
        with contextlib.ExitStack() as stores:
            pids = {}
            for mode, folder in folders.items():
                uri = stores.enter_context(store(mode, folder))
                pids[mode] = begin(functools.partial(search, folder, uri, trials, epochs, epoch_seconds), folder)
            for mode, folder in folders.items():
                found.append({"mode": mode, "round": index, **end(pids[mode], folder)})
                print(f"round {index}, {mode}: {found[-1]['seconds']:.1f} s", flush=True)
    return found


def print_searches(found: list[dict[str, Any]]) -> None:
    columns = {"tracking": "<9", "seconds": ">8.1f", "of none": ">8.3f", "waited s": ">8.2f", "waited": ">7.2%"}
    table = Table(columns | {"CPU s": ">6.2f", "CPU": ">7.2%"})
    table.print_header()
    base = {item["round"]: item["seconds"] for item in found if item["mode"] == "none"}
    cores = os.cpu_count() or 1
    for mode in MODES:
        items = [item for item in found if item["mode"] == mode]
        seconds, waited, cpu = (
            statistics.median(item[name] for item in items)
            for name in ("seconds", "waited_seconds", "tracker_cpu_seconds")
        )
        ratio = statistics.median(item["seconds"] / base[item["round"]] for item in items)
        table.print_row(mode, seconds, ratio, waited, waited / seconds, cpu, cpu / (seconds * cores))
    print(
        "seconds: median wall time of a search; of none: median of the ratios to the same round's search without\n"
        "tracking; waited: what the search itself waited for the tracker; CPU: what the tracker's thread computed,\n"
        f"and its share of the {cores} cores."
    )


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=2)
    made.add_argument("--trials", type=int, default=4, help="of each search")
    made.add_argument("--epochs", type=int, default=60, help="of each trial")
    made.add_argument("--epoch-seconds", type=float, default=1.0, help="how long an epoch waits")
    made.add_argument("--quick", action="store_true", help="small sizes, to test the script")
    options = made.parse_args()
    if options.quick:
        options.rounds, options.trials, options.epochs, options.epoch_seconds = 1, 2, 2, 0.1
    with tempfile.TemporaryDirectory(prefix="accumtune-tracking-") as name:
        found = searches(Path(name), options.rounds, options.trials, options.epochs, options.epoch_seconds)
    print_searches(found)
    keep(options.json, found)


if __name__ == "__main__":
    main()
