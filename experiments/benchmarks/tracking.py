"""What tracking costs: how fast the replay is, what a search waits for it, and what a server that is down changes.

- replay: journals of several shapes brought into an empty SQLite store; epochs per second of wall time and of CPU time.
- sustained: a writer appends so many epochs a second for a while, the tracker brings them meanwhile; how far it is
  behind when the writer ends, and whether each value is there once.
- searches: the same small search (digits, real trials) without tracking, with SQLite, with a server that is dead (no
  one listens) and one that is silent (takes connections, never answers), all at once, several rounds. An epoch waits
  rather than computes: the wall time of computing trials differs by a fifth from one time to the next, and of 1 %
  nothing could be said. What the tracker computes, which would slow down trials that compute, stands beside it.

    python experiments/benchmarks/tracking.py [--parts replay sustained searches] [--rounds 2] [--quick] [--json PATH]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shutil
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

# Imported once: each search is a fork of this process, and starts its own trials' processes.
import keras  # noqa: E402
import mlflow  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

import accumtune  # noqa: E402
from accumtune.tracking.journal import Journal, read_search  # noqa: E402
from accumtune.tracking.mlflow import Tracker  # noqa: E402

METRICS = ("loss", "accuracy", "val_loss", "val_accuracy")
SHAPES = ((1, 10_000), (10, 1_000), (100, 100))
SUSTAINED_EPOCHS_PER_SECOND = 1_000
MODES = ("none", "sqlite", "dead", "silent")


class Made:
    """Journals as a search writes them, without a search."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._search = Journal(folder / "search.jsonl")
        self._search.append("search_started", search_id="b" * 32, name="benchmark", max_trials=1)

    def trial(self, number: int, epochs: int = 0) -> Journal:
        """A trial, begun, that has reported so many epochs: written at once."""
        journal = Journal(self.folder / f"trial_{number:04d}" / "journal.jsonl")
        values = {"effective_batch_size": 64, "micro_batch_size": 32, "accumulation_steps": 2, "learning_rate": 0.01}
        journal.append("proposed", trial_id=f"{number:04d}", number=number, hyperparameters=values)
        journal.append("started", attempt=1, pid=0, device="CPU", memory_source="made")
        if epochs:
            lines = (json.dumps({"event": "epoch", "time": time.time(), **epoch(index)}) for index in range(epochs))
            with open(journal.path, "a") as file:
                file.write("\n".join(lines) + "\n")
        return journal

    def end(self, journal: Journal) -> None:
        journal.append("ended", status="completed", objective_value=0.5, best_epoch=0, peak_memory_bytes=2**20)

    def finish(self) -> None:
        self._search.append("search_ended", status="finished")


def epoch(index: int) -> dict[str, Any]:
    return {"attempt": 1, "execution": 0, "epoch": index, "logs": {name: 1.0 / (index + 1) for name in METRICS}}


def new_store(root: Path, name: str) -> str:
    """An SQLite store that MLflow has made: what is measured is the replay, not forty migrations."""
    root.mkdir(parents=True, exist_ok=True)
    empty = root / "empty.db"
    if not empty.exists():
        mlflow.MlflowClient(f"sqlite:///{empty}").search_experiments()
    shutil.copy(empty, root / f"{name}.db")
    return f"sqlite:///{root / name}.db"


def replay(root: Path, trials: int, epochs: int) -> dict[str, float]:
    """One shape."""
    made = Made(root / f"made_{trials}")
    for number in range(trials):
        made.end(made.trial(number, epochs))
    made.finish()
    tracker = Tracker(made.folder, new_store(root, f"replay_{trials}"))
    wall, cpu = time.perf_counter(), time.process_time()
    tracker.sync()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    total = trials * epochs
    return {
        "trials": trials, "epochs_each": epochs, "seconds": wall, "cpu_seconds": cpu,
        "epochs_per_second": total / wall, "epochs_per_cpu_second": total / cpu,
    }  # fmt: skip


def sustained(root: Path, seconds: float, rate: int, trials: int = 4) -> dict[str, Any]:
    """A writer at a steady rate, and the tracker behind it."""
    made = Made(root / "sustained")
    uri = new_store(root, "sustained")
    journals = [made.trial(number) for number in range(trials)]
    tracker = Tracker(made.folder, uri)
    tracker.start()
    began, written = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < seconds:
        while written < passed * rate:
            journals[written % trials].append("epoch", **epoch(written // trials))
            written += 1
        time.sleep(0.005)
    took = time.perf_counter() - began
    for journal in journals:
        made.end(journal)
    made.finish()
    behind = time.perf_counter()
    message = tracker.stop()
    behind = time.perf_counter() - behind
    client = mlflow.MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("benchmark").experiment_id], max_results=1000)
    steps = [
        metric.step
        for run in runs
        if "mlflow.parentRunId" in run.data.tags
        for metric in client.get_metric_history(run.info.run_id, "val_loss")
    ]
    return {
        "seconds": took, "epochs": written, "epochs_per_second": written / took, "behind_seconds": behind,
        "arrived": len(steps), "message": message,
    }  # fmt: skip


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
    print(f"{'tracking':<9}  {'seconds':>8}  {'of none':>8}  {'waited s':>8}  {'share':>7}  {'CPU s':>6}  {'share':>7}")
    base = {item["round"]: item["seconds"] for item in found if item["mode"] == "none"}
    cores = os.cpu_count() or 1
    for mode in MODES:
        items = [item for item in found if item["mode"] == mode]
        seconds, waited, cpu = (
            statistics.median(item[name] for item in items)
            for name in ("seconds", "waited_seconds", "tracker_cpu_seconds")
        )
        ratio = statistics.median(item["seconds"] / base[item["round"]] for item in items)
        print(
            f"{mode:<9}  {seconds:>8.1f}  {ratio:>8.3f}  {waited:>8.2f}  {waited / seconds:>7.2%}  {cpu:>6.2f}  "
            f"{cpu / (seconds * cores):>7.2%}"
        )
    print(
        "seconds: median wall time of a search; of none: median of the ratios to the same round's search without\n"
        "tracking; waited: what the search itself waited for the tracker; CPU: what the tracker's thread computed,\n"
        f"and its share of the {cores} cores."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("replay", "sustained", "searches")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--rounds", type=int, default=2, help="of searches")
    parser.add_argument("--trials", type=int, default=4, help="of each search")
    parser.add_argument("--epochs", type=int, default=60, help="of each trial")
    parser.add_argument("--epoch-seconds", type=float, default=1.0, help="that an epoch waits")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    parser.add_argument("--json", metavar="PATH", default=None)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.trials, options.epochs, options.epoch_seconds = 1, 2, 2, 0.1
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="accumtune-tracking-") as name:
        root = Path(name)
        if "searches" in options.parts:  # first: a fork must not take over another part's threads
            results["searches"] = searches(root, options.rounds, options.trials, options.epochs, options.epoch_seconds)
            print_searches(results["searches"])
        if "replay" in options.parts:
            shapes = [(trials, max(1, epochs // (100 if options.quick else 1))) for trials, epochs in SHAPES]
            replay(root / "first", 1, 1)  # MLflow's imports
            print(f"\n{'trials':>6}  {'epochs each':>11}  {'seconds':>8}  {'epochs/s':>9}  {'epochs/CPU s':>12}")
            results["replay"] = []
            for trials, epochs in shapes:
                row = replay(root, trials, epochs)
                results["replay"].append(row)
                print(
                    f"{trials:>6}  {epochs:>11,}  {row['seconds']:>8.2f}  {row['epochs_per_second']:>9,.0f}  "
                    f"{row['epochs_per_cpu_second']:>12,.0f}",
                    flush=True,
                )
            print(f"each epoch has {len(METRICS)} values")
        if "sustained" in options.parts:
            row = sustained(root, 2.0 if options.quick else 20.0, SUSTAINED_EPOCHS_PER_SECOND)
            results["sustained"] = row
            print(
                f"\n{row['epochs']:,} epochs written in {row['seconds']:.1f} s ({row['epochs_per_second']:,.0f}/s); "
                f"{row['arrived']:,} arrived, the last {row['behind_seconds']:.1f} s after the writer's end"
            )
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2))
    complete = "sustained" not in results or results["sustained"]["arrived"] == results["sustained"]["epochs"]
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
