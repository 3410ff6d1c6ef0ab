"""Tasks on executors of other makes: threads, processes, Dask; with and without storage that all can see."""

import dataclasses
import multiprocessing
import os
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor

import forked
import keras
import keras_tuner
import numpy as np
import pytest
from small_training import EPOCHS, X, Y, build
from test_executors import wait_until_gone

from accumtune.errors import SearchError, WorkerError
from accumtune.execution import pool_executor as pools
from accumtune.execution.placement import Place, at_place
from accumtune.execution.pool_executor import PoolExecutor
from accumtune.execution.shared_storage import TaskStorage
from accumtune.hypermodel import AccumulationHyperModel
from accumtune.tracking.journal import Journal, read_trial
from accumtune.tracking.small_files import write_atomically
from accumtune.worker.transport.payload import dump_payload
from accumtune.worker.transport.task_directory import TaskDirectory


def written(folder, function, *arguments):
    """The directory of a task that calls a function."""
    directory = TaskDirectory(folder / f"{function.__name__}_{len(list(folder.iterdir()))}")
    payload = folder / f"data_{directory.path.name}" / "payload.pkl"
    dump_payload({"function": function, "arguments": arguments}, payload)
    directory.write_task("call", {"payload": str(payload)})
    return directory


def look(array):
    return [os.getpid(), os.environ.get("COLOUR"), type(array).__name__, float(array.sum())]


def wait(path):
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(600)


def pid_in(path):
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return int(path.read_text())


def process_pool():
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=context, initializer=forked.fork_the_fork_servers)


@pytest.fixture(scope="module")
def threads():
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def processes():
    with process_pool() as pool:
        yield pool


@pytest.fixture(scope="module")
def dask():
    distributed = pytest.importorskip("distributed", reason="pip install 'dask[distributed]'")
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster:
        with distributed.Client(cluster) as client:
            client.run(forked.fork_the_fork_servers)
            yield client.get_executor()


class Elsewhere:
    """Workers that do not see the search's storage."""

    def __init__(self, pool):
        self.pool = pool

    def submit(self, function, request, *arguments):
        return self.pool.submit(function, dataclasses.replace(request, directory="/nowhere/trial_7"), *arguments)


@pytest.mark.parametrize("kind", ["threads", "processes", "dask"])
def test_a_task_runs_in_a_process_of_its_own_with_its_environment(kind, request, tmp_path):
    executor = PoolExecutor(request.getfixturevalue(kind), "tensorflow")
    with at_place(Place(environment={"COLOUR": "blue"})):
        directories = [written(tmp_path, look, np.ones((100, 1000))) for _ in range(2)]
        outcomes = [executor.submit(directory).result(timeout=120) for directory in directories]
    values = [outcome.result["value"] for outcome in outcomes]
    assert [value[1:] for value in values] == [["blue", "memmap", 100_000.0]] * 2
    assert len({os.getpid(), values[0][0], values[1][0]}) == 3
    executor.close()


def test_close_ends_a_task_wherever_it_runs(threads, tmp_path):
    executor = PoolExecutor(threads, "tensorflow")
    future = executor.submit(written(tmp_path, wait, str(tmp_path / "pid")))
    pid = pid_in(tmp_path / "pid")
    executor.close()
    assert future.result(timeout=10).status == "killed"
    assert wait_until_gone(pid)


def test_time_outs_and_crashes_are_outcomes_there_too(threads, tmp_path):
    executor = PoolExecutor(threads, "tensorflow")
    outcome = executor.submit(written(tmp_path, wait, str(tmp_path / "pid")), timeout_seconds=1.0).result(timeout=60)
    assert outcome.status == "timed_out"

    def die():
        os.kill(os.getpid(), 9)

    assert executor.submit(written(tmp_path, die)).result(timeout=60).status == "killed"


def test_a_worker_that_is_gone_loses_its_task_and_takes_it_along(tmp_path, monkeypatch):
    monkeypatch.setattr(pools, "_MAX_LOSSES", 1)  # as a training, which is not just sent again
    with process_pool() as pool:
        executor = PoolExecutor(pool, "tensorflow")
        future = executor.submit(written(tmp_path, wait, str(tmp_path / "pid")))
        pid = pid_in(tmp_path / "pid")
        (worker,) = pool._processes.values()
        worker.kill()
        outcome = future.result(timeout=60)
        assert outcome.status == "lost" and "BrokenProcessPool" in outcome.reason
        assert wait_until_gone(pid)
        with pytest.raises(WorkerError, match="accepts no more trials"):  # Python's pool is broken for good
            executor.submit(written(tmp_path, wait, str(tmp_path / "pid")))


def test_a_worker_without_accumtune_is_no_lost_machine(tmp_path):
    class Bare:
        def submit(self, function, *arguments):
            future = Future()
            future.set_exception(ModuleNotFoundError("No module named 'accumtune'"))
            return future

    with pytest.raises(WorkerError, match="install the same packages"):
        PoolExecutor(Bare(), "tensorflow").submit(written(tmp_path, look, 1)).result(timeout=10)


@pytest.mark.slow
def test_without_shared_storage_files_travel_with_the_task_and_back(threads, tmp_path):
    directory, payload = TaskDirectory(tmp_path / "trial_7"), tmp_path / "data" / "payload.pkl"
    content = {
        "hypermodel": AccumulationHyperModel(build), "objective": keras_tuner.Objective("val_loss", "min"),
        "fit_args": (np.repeat(X, 100, axis=0), np.repeat(Y, 100, axis=0)),
        "fit_kwargs": {"epochs": EPOCHS, "validation_data": (X, Y)},
    }  # fmt: skip
    dump_payload(content, payload)
    values = {"effective_batch_size": 8, "micro_batch_size": 4, "accumulation_steps": 2}
    arguments = {
        "payload": str(payload), "hyperparameters": {"space": [], "values": values}, "memory_budget_bytes": None,
        "seed": 5, "attempt": 1,
    }  # fmt: skip
    directory.write_task("train", arguments)
    Journal(directory.journal_file).append("proposed", trial_id="7", hyperparameters=values)
    outcome = PoolExecutor(Elsewhere(threads), "tensorflow").submit(directory).result(timeout=120)
    assert outcome.is_completed, outcome.traceback
    record = read_trial(directory.path)
    assert record.hyperparameters == values and [epoch.epoch for epoch in record.epochs] == list(range(EPOCHS))
    names = [event["event"] for event in Journal(directory.journal_file).events()]
    assert names == ["proposed", "started", *["epoch"] * EPOCHS]
    assert directory.weights_file.stat().st_size and directory.build_config_file.exists()
    assert str(tmp_path) in directory.read_task()[1]["payload"]


def test_a_probe_that_is_lost_is_sent_again(threads, tmp_path):
    class Unlucky:
        losses = 3

        def submit(self, function, *arguments):
            if not self.losses:
                return threads.submit(function, *arguments)
            self.losses -= 1
            future = Future()
            future.set_exception(ConnectionError("the machine is gone"))
            return future

    outcome = PoolExecutor(Unlucky(), "tensorflow").submit(written(tmp_path, look, np.ones(3))).result(timeout=60)
    assert outcome.is_completed and outcome.result["value"][3] == 3.0


class Waits(keras.callbacks.Callback):
    """Each epoch takes a while, and signals its start."""

    def __init__(self, path, seconds):
        super().__init__()
        self.path, self.seconds = path, seconds

    def on_epoch_begin(self, epoch, logs=None):
        with open(self.path, "a") as file:
            file.write(f"{os.getpid()} {epoch}\n")
        time.sleep(self.seconds)


def training_in(folder, seen, seconds):
    """The directory of a training, and what writes its task."""
    directory, payload = TaskDirectory(folder / "search" / "trial_7"), folder / "search" / "data" / "payload.pkl"
    content = {
        "hypermodel": AccumulationHyperModel(build), "objective": keras_tuner.Objective("val_loss", "min"),
        "fit_args": (X, Y),
        "fit_kwargs": {"epochs": EPOCHS, "validation_data": (X, Y), "callbacks": [Waits(str(seen), seconds)]},
    }  # fmt: skip
    dump_payload(content, payload)
    values = {"effective_batch_size": 8, "micro_batch_size": 4, "accumulation_steps": 2}
    arguments = {
        "payload": str(payload), "memory_budget_bytes": None, "seed": 5,
        "hyperparameters": {"space": [], "values": values},
    }  # fmt: skip
    return directory, lambda attempt: directory.write_task("train", {**arguments, "attempt": attempt})


def trained_twice(folder, seen, threads, storage=None):
    """A training on a worker that dies in its fourth epoch, then on another; neither sees the search's folder."""
    directory, write = training_in(folder, seen, 1.1)
    write(1)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        elsewhere = Elsewhere(pool)
        elsewhere.storage = storage
        future = PoolExecutor(elsewhere, "tensorflow").submit(directory)
        deadline = time.monotonic() + 120
        while not (seen.exists() and seen.read_text().count("\n") > 3) and time.monotonic() < deadline:
            time.sleep(0.05)
        (worker,) = pool._processes.values()
        worker.kill()
        assert future.result(timeout=60).status == "lost"
    write(2)
    other = Elsewhere(threads)
    other.storage = storage
    outcome = PoolExecutor(other, "tensorflow").submit(directory).result(timeout=120)
    assert outcome.is_completed, outcome
    begun = [line.split() for line in seen.read_text().splitlines()]
    return directory, outcome, [int(epoch) for pid, epoch in begun if pid == begun[-1][0]]


@pytest.mark.slow
def test_with_a_storage_url_a_trial_goes_on_where_the_lost_machine_was(tmp_path, threads):
    whole, write = training_in(tmp_path / "whole", tmp_path / "seen_whole", 0)
    write(1)
    undisturbed = PoolExecutor(Elsewhere(threads), "tensorflow").submit(whole).result(timeout=120)
    store = tmp_path / "store"
    directory, outcome, again = trained_twice(tmp_path / "broken", tmp_path / "seen", threads, f"file://{store}")
    assert again[0] > 0 and again[-1] == EPOCHS - 1
    assert outcome.result["metrics"] == pytest.approx(undisturbed.result["metrics"], rel=1e-6)
    losses = [[epoch.logs["val_loss"] for epoch in read_trial(task.path).epochs] for task in (directory, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and len(losses[0]) == EPOCHS
    assert directory.weights_file.stat().st_size
    assert not [path for path in store.rglob("*") if path.is_file()]  # nothing is left there


@pytest.mark.slow
def test_without_a_storage_url_it_begins_anew(tmp_path, threads):
    *_, again = trained_twice(tmp_path / "broken", tmp_path / "seen", threads)
    assert again == list(range(EPOCHS))


def test_a_storage_that_cannot_be_used_is_named_at_once(tmp_path, threads):
    (tmp_path / "file").write_text("no folder")
    for url, error in ((f"file://{tmp_path}/file/x", SearchError), ("nonsense://bucket", WorkerError)):
        elsewhere = Elsewhere(threads)
        elsewhere.storage = url
        with pytest.raises(error, match="storage="):
            PoolExecutor(elsewhere, "tensorflow")


def test_storage_of_any_kind_of_fsspec(tmp_path):
    storage = TaskStorage("memory://bucket/search/trial_1")
    directory, other = TaskDirectory(tmp_path / "here"), TaskDirectory(tmp_path / "there")
    storage.fetch(other)  # nothing there
    assert not other.checkpoint_file.exists()
    write_atomically(directory.checkpoint_file, b"first")
    storage.keep(directory)
    write_atomically(directory.checkpoint_file, b"second")
    write_atomically(directory.weights_file, b"weights")
    storage.keep(directory)
    storage.fetch(other)
    assert (other.checkpoint_file.read_bytes(), other.weights_file.read_bytes()) == (b"second", b"weights")
    storage.forget()
    storage.forget()
    third = TaskDirectory(tmp_path / "third")
    storage.fetch(third)
    assert not third.path.exists()
