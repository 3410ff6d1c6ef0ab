"""What it takes to stop, and to be ready for it: Ctrl-C, and the checkpoints that trials go on from.

Two tables. In the first a search gets Ctrl-C while its trials run, with short epochs and with epochs that nobody waits
for, once and twice: how long until its children are gone, until it says how to go on, and until its own process has
ended. The last is a report and what MLflow lacks (the second time neither), and then Python taking down TensorFlow. In
the second the state of a training is written at the end of its epochs as in a trial: its size (the parameters and
Adam's two slots), what writing takes, at how many ends of an epoch it is written, and the share of the training's time.

    python experiments/benchmarks/stopping.py [--workers 4] [--only ctrl_c|checkpoints] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

MOST_SECONDS = 10.0
# A twentieth is what `accumtune.worker.checkpoint.trial_checkpoint` promises.
MOST_SHARE = 0.05
# Name (by its parameters in float32), units of its hidden layers, seconds of an epoch.
MODELS = (("small", (16,), 0.5), ("small", (16,), 5.0), ("50 MB", (4096, 2560), 5.0), ("50 MB", (4096, 2560), 30.0))


def build_model(hp: Any) -> Any:
    import keras

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(hp.Float("learning_rate", 1e-3, 1e-1)), loss="mse")
    return model


def search(folder: str, seconds: float, workers: int) -> None:
    """The user's script, in a process of its own."""
    import keras
    import numpy as np

    import accumtune

    class Waiting(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            time.sleep(seconds if epoch else 0.1)

    x = np.zeros((32, 8), "float32")
    accumtune.RandomSearch(
        build_model, objective="val_loss", max_trials=100, seed=1, micro_batch_sizes=(8,), accumulation_steps=(1,),
        workers=workers, tracking_uri=f"sqlite:///{folder}/mlflow.db", directory=folder, project_name="search",
    ).search(x, x[:, :1], validation_data=(x, x[:, :1]), epochs=1000, callbacks=[Waiting()], verbose=2)  # fmt: skip


def ctrl_c(root: Path, seconds: float, times: int, workers: int) -> dict[str, Any]:
    """Starts a search, stops it, and looks when its last process is gone."""
    from accumtune.tracking.journal import read_search

    folder = root / f"{seconds}_{times}"
    folder.mkdir()
    log = folder / "log.txt"
    command = [sys.executable, __file__, "--search", str(folder), str(seconds), str(workers)]
    with open(log, "w") as file:
        # A shell's job in the background ignores Ctrl-C, and so would what it starts.
        restore = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
        process = subprocess.Popen(command, stdout=file, stderr=file, preexec_fn=restore)
    while len(running := [t for t in read_search(folder / "search").trials if t.pid and len(t.epochs) > 0]) < workers:
        if process.poll() is not None:
            raise RuntimeError(log.read_text()[-3000:])
        time.sleep(0.1)
    time.sleep(min(seconds, 3.0))
    pids = family(process.pid)
    for number in range(times):
        if number:
            time.sleep(0.5)
        process.send_signal(signal.SIGINT)
    last = time.monotonic()
    seen: dict[str, float] = {}
    while "ended" not in seen:
        now = {
            "children": not any(map(is_alive, pids[1:])),
            "told": "to go on: " in log.read_text(),
            "ended": process.poll() is not None,
        }
        seen |= {name: time.monotonic() - last for name, is_so in now.items() if is_so and name not in seen}
        time.sleep(0.02)
    saved = sum((trial.folder / "continue.pkl").exists() for trial in running)
    return {
        "epoch_seconds": seconds, "times": times, "children": len(pids) - 1, "saved": saved, "trials": len(running),
        **{f"{name}_seconds": seen.get(name) for name in ("children", "told", "ended")},
    }  # fmt: skip


def family(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(member for child in children for member in family(int(child)))]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def checkpoints(folder: Path, units: tuple[int, ...], epoch_seconds: float, epochs: int) -> dict[str, Any]:
    """What writing the state takes of a training whose epochs last so long; the clock is turned, not waited for."""
    import keras

    from accumtune.worker.checkpoint import trial_checkpoint as checkpoint
    from accumtune.worker.transport.task_directory import TaskDirectory

    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(count) for count in (*units, 1)]
    model = keras.Sequential([keras.Input((512,)), *layers])
    model.compile(keras.optimizers.Adam(), loss="mse")
    directory = TaskDirectory(folder)
    directory.write_task("train", {})
    clock = Clock()
    checkpoint.time = clock  # type: ignore[assignment]
    continuation = checkpoint.Continuation(directory, 1, {})
    spent, written = 0.0, 0
    for epoch in range(epochs):
        clock.ahead += epoch_seconds
        began, before = time.monotonic(), continuation._last_saved
        continuation.epoch_ended(epoch, model, [])
        spent += time.monotonic() - began
        written += continuation._last_saved != before
    return {
        "state_mb": directory.checkpoint_file.stat().st_size / 1e6, "epoch_seconds": epoch_seconds,
        "written": written, "epochs": epochs, "seconds": spent / written, "share": spent / (epochs * epoch_seconds),
    }  # fmt: skip


class Clock:
    """The real one, set forward by the epochs that are not waited for."""

    ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--only", choices=("ctrl_c", "checkpoints"), default=None)
    parser.add_argument("--json", metavar="PATH", default=None)
    parser.add_argument("--search", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.search:
        folder, seconds, workers = options.search
        search(folder, float(seconds), int(workers))
        return 0
    stops: list[dict[str, Any]] = []
    states: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="accumtune-stopping-") as root:
        if options.only != "checkpoints":
            print("  epoch  Ctrl-C  children  gone after  says how to go on after  ended after  states saved")
            for seconds, times in ((1.0, 1), (600.0, 1), (1.0, 2), (600.0, 2)):
                row = ctrl_c(Path(root), seconds, times, options.workers)
                stops.append(row)
                print(
                    f"{seconds:>5.0f} s  {'once' if times == 1 else 'twice':>6}  {row['children']:>8}  "
                    f"{row['children_seconds']:>8.1f} s  {row['told_seconds']:>21.1f} s  "
                    f"{row['ended_seconds']:>9.1f} s  {row['saved']:>7} of {row['trials']}",
                    flush=True,
                )
        if options.only != "ctrl_c":
            print("\n  model    epoch      state  writing takes         written  share of the time")
            for number, (name, units, seconds) in enumerate(MODELS):
                row = checkpoints(Path(root) / f"state_{number}", units, seconds, epochs=60)
                states.append(row)
                print(
                    f"{name:>7}  {seconds:>5.1f} s  {row['state_mb']:>6.1f} MB  {1000 * row['seconds']:>10.0f} ms  "
                    f"{row['written']:>3} of {row['epochs']:>2} ends  {100 * row['share']:.2f} %",
                    flush=True,
                )
    if options.json:
        Path(options.json).write_text(json.dumps({"ctrl_c": stops, "checkpoints": states}, indent=2))
    good = all(max(row["children_seconds"], row["told_seconds"]) <= MOST_SECONDS for row in stops)
    return 0 if good and all(row["share"] <= MOST_SHARE for row in states) else 1


if __name__ == "__main__":
    sys.exit(main())
