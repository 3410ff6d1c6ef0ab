"""Trials on a Ray cluster of several nodes, all of them on this machine. `.ci/run` installs Ray and runs this file."""

import os
import re
from pathlib import Path

import numpy as np
import pytest

ray = pytest.importorskip("ray", reason="pip install -e '.[ray]' brings it")

from ray.cluster_utils import Cluster  # noqa: E402
from test_executors import wait_until_gone  # noqa: E402
from test_pool_executor import pid_in, wait, written  # noqa: E402

import accumtune  # noqa: E402
from accumtune.execution import pool_executor as pools  # noqa: E402
from accumtune.execution.placement import Place, at_place  # noqa: E402
from accumtune.execution.pool_executor import PoolExecutor  # noqa: E402
from accumtune.execution.ray_executor import RayPool  # noqa: E402

STORE = {"object_store_memory": 80 * 2**20, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster():
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **STORE})
    for kind in ("H100", "T4"):
        cluster.add_node(num_cpus=1, num_gpus=1, resources={f"accelerator_type:{kind}": 1}, **STORE)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def pool(cluster):
    pool = RayPool(cluster.address)
    yield pool
    pool.close_connection()


def node_of(kind):
    return next(n for n in ray.nodes() if f"accelerator_type:{kind}" in n["Resources"] and n["Alive"])["NodeID"]


def parent_of(pid):
    with open(f"/proc/{pid}/status") as file:
        return int(next(line for line in file if line.startswith("PPid")).split()[1])


def where(name):
    return [os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ[name]]


def test_each_trial_has_a_process_a_gpu_and_a_type_of_device(pool, tmp_path):
    places = pool.places(2)
    assert {place.kind for place in places} == {"H100", "T4"}
    executor = PoolExecutor(pool, "tensorflow")
    pids = set()
    for place in places:
        with at_place(Place(place.kind, {"LIMIT": "7"})):
            outcome = executor.submit(written(tmp_path, where, "LIMIT")).result(timeout=200)
        pid, device, limit = outcome.result["value"]
        assert (device, limit) == ("0", "7")
        pids.add(pid)
    assert len(pids) == 2


def test_a_worker_and_a_node_that_are_killed_lose_their_task_and_leave_no_process(pool, cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(pools, "_MAX_LOSSES", 1)  # as a training, which is not just sent again
    executor = PoolExecutor(pool, "tensorflow")
    for victim in ("worker", "node"):
        pid_file = tmp_path / victim
        with at_place(Place("T4")):
            future = executor.submit(written(tmp_path, wait, str(pid_file)))
        pid = pid_in(pid_file)
        if victim == "worker":
            os.kill(parent_of(parent_of(pid)), 9)  # the task's parent is the fork server, whose parent is the worker
        else:
            node = next(node for node in cluster.list_all_nodes() if node.node_id == node_of("T4"))
            cluster.remove_node(node, allow_graceful=False)
        outcome = future.result(timeout=120)
        assert outcome.status == "lost", outcome
        assert wait_until_gone(pid)
    cluster.add_node(num_cpus=1, num_gpus=1, resources={"accelerator_type:T4": 1}, **STORE)


def build(hp):
    import keras

    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(hp.Float("learning_rate", 0.01, 0.1)), loss="mse")
    return model


def test_a_search_on_a_cluster(cluster, tmp_path):
    x = np.ones((32, 6), "float32")
    tuner = accumtune.RandomSearch(
        build, objective="val_loss", max_trials=4, seed=1, memory_budget="16MiB", micro_batch_sizes=(4, 8),
        accumulation_steps=(1,), workers=2, executor=cluster.address, tracking_uri=False, directory=tmp_path,
        project_name="search",
    )  # fmt: skip
    tuner.search(x, x[:, :1], validation_data=(x, x[:, :1]), epochs=2, verbose=0)
    trials = tuner.record().trials
    assert [trial.status for trial in trials] == ["completed"] * 4
    assert all(len(trial.epochs) == 2 and trial.peak_memory_bytes < 16 * 2**20 for trial in trials)
    assert not ray.is_initialized()  # what the search has joined it has left


def test_the_lines_of_the_readme_for_several_machines(cluster, tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (lines,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if 'executor="ray"' in block]
    for there, here in (("/shared/searches", str(tmp_path)), ("max_trials=60", "max_trials=3"), ("16GiB", "16MiB")):
        assert there in lines
        lines = lines.replace(there, here)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)  # as on a machine of the cluster
    monkeypatch.chdir(tmp_path)
    names = {"accumtune": accumtune, "build_model": build}
    exec(lines, names)
    x = np.ones((64, 6), "float32")
    names["tuner"].search(x, x[:, :1], validation_data=(x, x[:, :1]), epochs=2, verbose=0)
    assert [trial.status for trial in names["tuner"].record().trials] == ["completed"] * 3


def test_a_cluster_without_a_shared_disk_keeps_checkpoints_at_its_url(cluster, tmp_path):
    pool = RayPool(cluster.address, storage=f"file://{tmp_path}/store")
    assert PoolExecutor(pool, "tensorflow")._storage == pool.storage
    assert (tmp_path / "store").is_dir()
    pool.close_connection()


def test_an_address_without_a_cluster_says_so():
    with pytest.raises(accumtune.errors.SearchError, match="ray start"):
        RayPool("127.0.0.1:1")
