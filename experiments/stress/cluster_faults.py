"""Breaks a Ray cluster while searches run on it, and checks whether a trial was lost, run twice or left running.

The cluster has several nodes on this machine (`ray.cluster_utils.Cluster`), each with one core and a GPU that exists
only for Ray. Searches run in processes of their own; their trials train a tiny model and wait in each epoch. Faults at
random moments:

    node killed     a node that runs a trial, by SIGKILL; another one takes its place
    worker killed   the Ray worker that runs a trial
    search killed   the search itself, which is then started again
    node lost       a node, for good
    node added

After each fault the processes of its trials must be gone. After each search every trial must have ended exactly once,
with each of its epochs once, and have exactly one run in MLflow, none of which is RUNNING; and every GPU of the cluster
must be free.

    python experiments/stress/cluster_faults.py [--faults 30] [--seed 0] [--quick]
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from common import Table, keep, parser
from ray_cluster import Cluster, ancestors, is_alive, wait_for

TRIALS, EPOCHS, EPOCH_SECONDS, NODES = 20, 6, 1.0, 3
KINDS = ("node killed", "worker killed", "search killed", "node lost", "node added")
FAULTS_PER_SEARCH = 15
PATIENCE_SECONDS = 180.0


@dataclass
class Fault:
    """One thing that was broken, and what came of it."""

    number: int
    search: int
    kind: str
    ended_before: int
    hit: list[str]
    problems: list[str] = field(default_factory=list)
    gone_after_seconds: float = 0.0


# The user's script, in a process of its own


def build_model(hp: Any) -> Any:
    import keras

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(hp.Float("learning_rate", 1e-3, 1e-1, sampling="log")), loss="mse")
    return model


def search(folder: str, address: str) -> None:
    import keras
    import numpy as np

    import accumtune

    class Waiting(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            time.sleep(EPOCH_SECONDS)

    os.chdir(folder)
    x = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
    accumtune.RandomSearch(
        build_model, objective="val_loss", max_trials=TRIALS, seed=1, memory_budget="16MiB", micro_batch_sizes=(8,),
        accumulation_steps=(1, 2), workers=NODES, executor=address, directory="searches", project_name="faults",
    ).search(x, x[:, :1], validation_data=(x, x[:, :1]), epochs=EPOCHS, callbacks=[Waiting()], verbose=2)  # fmt: skip


# What breaks it


class Round:
    """One search, broken and mended until it has finished."""

    def __init__(self, root: Path, number: int, cluster: Cluster, chance: random.Random) -> None:
        self.base = root / f"search_{number}"
        self.base.mkdir()
        self.folder = self.base / "searches" / "faults"
        self.number, self.cluster, self.chance = number, cluster, chance
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        log = open(self.base / "log.txt", "ab")
        command = [sys.executable, __file__, "--search", str(self.base), self.cluster.address]
        with log:
            return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)

    def running(self) -> dict[str, int]:
        """Trials that train, and their processes."""
        from accumtune.tracking.journal import read_search

        trials = read_search(self.folder).with_status("running")
        return {t.trial_id: t.pid for t in trials if t.pid and t.epochs and is_alive(t.pid)}

    def ended(self) -> int:
        from accumtune.tracking.journal import read_search

        return sum(trial.is_ended for trial in read_search(self.folder).trials)

    def strike(self, number: int, kind: str) -> Fault | None:
        """Breaks something while a trial trains; None where the search was over before."""
        before: dict[str, int] = {}
        while not before:  # between two trials there may be none for a moment
            wait_for(lambda: self.running() or self.process.poll() is not None, PATIENCE_SECONDS)
            time.sleep(self.chance.uniform(0.0, 2 * EPOCH_SECONDS))
            before = self.running()
            if self.process.poll() is not None:
                return None
        fault = Fault(number, self.number, kind, self.ended(), [])
        began = time.monotonic()
        victims = self.break_something(kind, before)
        fault.hit = sorted(victims)
        left = lambda: [pid for pid in victims.values() if is_alive(pid)]  # noqa: E731
        if not wait_for(lambda: not left(), 30):
            fault.problems.append(f"processes {left()} are left")
        fault.gone_after_seconds = time.monotonic() - began
        if kind == "search killed":
            self.process.wait()
            self.process = self.start()
        elif kind == "node killed":
            self.cluster.add()
        return fault

    def break_something(self, kind: str, running: dict[str, int]) -> dict[str, int]:
        """Returns the trials that it hits."""
        if kind == "search killed":
            self.process.kill()
            return running
        if kind == "worker killed":
            name = self.chance.choice(sorted(running))
            worker = ancestors(running[name])[1]  # the fork server's parent
            os.kill(worker, 9)
            return {name: running[name]}
        if kind == "node added":
            self.cluster.add()
            return {}
        node = self.cluster.busy_node(self.chance, list(running.values()))
        raylet = node.all_processes["raylet"][0].process.pid
        hit = {name: pid for name, pid in running.items() if raylet in ancestors(pid)}
        self.cluster.remove(node)
        return hit

    def finish(self) -> None:
        if not wait_for(lambda: self.process.poll() is not None, 3 * PATIENCE_SECONDS):
            self.process.kill()
            self.process.wait()

    def look(self) -> list[str]:
        """What is wrong after the end."""
        from search_checks import look

        from accumtune.tracking.journal import Journal, read_search

        record, problems = read_search(self.folder), []
        if self.process.returncode or record.status != "finished":
            problems.append(f"the search is {record.status} (exit code {self.process.returncode})")
        if [trial.status for trial in record.trials] != ["completed"] * TRIALS:
            problems.append(f"trials ended {dict(Counter(trial.status for trial in record.trials))}")
        for trial in record.trials:
            events = Journal(trial.folder / "journal.jsonl").events()
            if sum(event["event"] == "ended" for event in events) != 1:
                problems.append(f"trial {trial.trial_id} did not end exactly once")
            if [epoch.epoch for epoch in trial.epochs] != list(range(EPOCHS)):
                problems.append(f"trial {trial.trial_id} has epochs {[epoch.epoch for epoch in trial.epochs]}")
            if (trial.folder / "continue.pkl").exists():
                problems.append(f"trial {trial.trial_id} has left its checkpoint")
            if trial.pid and is_alive(trial.pid):
                problems.append(f"the process of trial {trial.trial_id} is left")
        problems += look(self.folder, f"sqlite:///{self.base}/mlruns/mlflow.db")[0]
        if not wait_for(lambda: len(set(self.cluster.free_gpus())) == 1, 30):
            problems.append(f"GPUs free and in all: {self.cluster.free_gpus()}")
        return problems

    def continued(self) -> int:
        """How often a trial went on from a checkpoint."""
        from accumtune.tracking.journal import Journal, trial_folders

        journals = (Journal(folder / "journal.jsonl") for folder in trial_folders(self.folder))
        return sum(event["event"] == "continued" for journal in journals for event in journal.events())


def play(root: Path, number: int, cluster: Cluster, chance: random.Random, first: int, count: int) -> tuple[Any, ...]:
    """One search and its faults."""
    while len(cluster.nodes) < NODES:
        cluster.add()
    one = Round(root, number, cluster, chance)
    faults: list[Fault] = []
    while len(faults) < count:
        kind = KINDS[(first + len(faults)) % len(KINDS)]
        if kind == "node lost" and len(cluster.nodes) == 1:
            kind = "node killed"
        fault = one.strike(first + len(faults) + 1, kind)
        if fault is None:
            break
        faults.append(fault)
        show(fault)
    one.finish()
    problems = one.look()
    return faults, problems, one.continued()


TABLE = Table({
    "fault": ">5", "search": ">6", "kind": "<13", "ended": ">5", "hits trials": "<12", "gone after s": ">12.1f",
    "problems": "<8",
})  # fmt: skip


def show(fault: Fault) -> None:
    TABLE.print_row(
        fault.number, fault.search, fault.kind, fault.ended_before, ", ".join(fault.hit) or "none",
        fault.gone_after_seconds, "; ".join(fault.problems) or "none",
    )  # fmt: skip


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--faults", type=int, default=30)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--quick", action="store_true", help="five faults in one search")
    made.add_argument("--search", nargs=2, metavar=("FOLDER", "ADDRESS"), help=argparse.SUPPRESS)
    options = made.parse_args()
    if options.search:
        search(*options.search)
        return 0
    wanted = 5 if options.quick else options.faults
    chance = random.Random(options.seed)
    faults: list[Fault] = []
    ends: list[dict[str, Any]] = []
    cluster = Cluster(NODES)
    try:
        with tempfile.TemporaryDirectory(prefix="accumtune-faults-") as root:
            print(f"{NODES} nodes; searches of {TRIALS} trials of {EPOCHS} epochs of {EPOCH_SECONDS:g} s\n")
            TABLE.print_header()
            while len(faults) < wanted:
                count = min(FAULTS_PER_SEARCH, wanted - len(faults))
                found, problems, continued = play(Path(root), len(ends) + 1, cluster, chance, len(faults), count)
                faults += found
                ends.append({"faults": len(found), "problems": problems, "continued": continued})
                print(
                    f"search {len(ends)} after {len(found)} faults: {TRIALS} trials, {continued} times one went on "
                    f"from a checkpoint; problems: {'; '.join(problems) or 'none'}",
                    flush=True,
                )
                if problems:
                    print((Path(root) / f"search_{len(ends)}" / "log.txt").read_text(errors="replace")[-3000:])
    finally:
        cluster.close()
    counts = Counter(fault.kind for fault in faults)
    bad = sum(len(fault.problems) for fault in faults) + sum(len(end["problems"]) for end in ends)
    print(f"\n{len(faults)} faults: " + ", ".join(f"{counts[kind]} × {kind}" for kind in KINDS))
    print(f"{bad} problems")
    keep(options.json, {"faults": [asdict(fault) for fault in faults], "searches": ends, "kinds": counts})
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
