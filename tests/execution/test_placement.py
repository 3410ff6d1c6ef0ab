"""Dividing devices and cores among workers: plans, and the devices and threads of real children."""

import os
import sys
import threading
from collections import Counter
from concurrent.futures import Future
from types import SimpleNamespace

import fake_nvml
import pytest

from accumtune.errors import BudgetError, SearchError
from accumtune.execution.placement import (
    Place,
    Places,
    apply_place,
    at_place,
    current_place,
    plan_places,
    resolve_gpus,
    threads_environment,
)
from accumtune.execution.profiling import Profiler
from accumtune.memory.machine import Gpu, visible_gpus
from accumtune.memory.prediction.profile import Measurement
from accumtune.worker.transport.outcome import Outcome
from accumtune.worker.transport.payload import dump_payload
from accumtune.worker.transport.task_directory import TaskDirectory

GIB = 2**30
GPUS = [Gpu("0", "H100", 80 * GIB), Gpu("1", "H100", 80 * GIB)]


def devices_of(places):
    return [place.environment.get("CUDA_VISIBLE_DEVICES") for place in places]


def test_each_worker_gets_a_gpu_of_its_own_and_a_part_of_the_cores():
    places = plan_places(2, GPUS, cores=8)
    assert devices_of(places) == ["0", "1"]
    assert {place.environment["TF_NUM_INTRAOP_THREADS"] for place in places} == {"4"}
    assert devices_of(plan_places(1, GPUS, cores=8)) == ["0"]


def test_workers_that_share_a_gpu_must_fit_on_it_together():
    places = plan_places(4, GPUS, cores=8, memory_budget_bytes=39 * GIB)
    assert devices_of(places) == ["0", "1", "0", "1"]
    assert "shared by 2" in places[0].description
    with pytest.raises(BudgetError, match=r"2 workers with memory_budget=40.00 GiB each on GPU 0") as caught:
        plan_places(4, GPUS, cores=8, memory_budget_bytes=40 * GIB)  # nothing left for CUDA's own memory
    assert 'memory_budget="40360MiB"' in str(caught.value)
    with pytest.raises(BudgetError, match="without a memory_budget"):
        plan_places(3, GPUS, cores=8)
    # Three workers on two GPUs: the one that is alone could have more, but a budget is the same for all.
    assert len(plan_places(3, GPUS, cores=8, memory_budget_bytes=39 * GIB)) == 3


def test_workers_on_a_cpu_divide_cores_and_must_fit_in_its_memory():
    places = plan_places(4, [], cores=16, memory_bytes=64 * GIB, memory_budget_bytes=16 * GIB)
    assert {place.environment["OMP_NUM_THREADS"] for place in places} == {"4"}
    assert places[0].description == "CPU, 4 cores"
    assert plan_places(8, [], cores=2)[0].environment["TF_NUM_INTEROP_THREADS"] == "1"
    with pytest.raises(BudgetError, match="this machine"):
        plan_places(5, [], cores=16, memory_bytes=64 * GIB, memory_budget_bytes=16 * GIB)
    assert plan_places(1, [], cores=16, without_gpus=True)[0].environment["CUDA_VISIBLE_DEVICES"] == "-1"


def test_types_of_devices_are_told_apart():
    kinds = [place.kind for place in plan_places(2, [GPUS[0], Gpu("1", "T4", 16 * GIB)], cores=2)]
    assert kinds == ["H100", "T4"]


def test_what_the_environment_hides_is_not_used(monkeypatch):
    gpus = fake_nvml.gpu("H100", 81559, 1, "GPU-aa"), fake_nvml.gpu("T4", None, None, "GPU-bb")

    def seen(variable):
        fake_nvml.install(monkeypatch, *gpus, visible=variable)
        return visible_gpus()

    assert seen(None) == [Gpu("0", "H100", 81559 * 2**20), Gpu("1", "T4", None)]
    assert [gpu.index for gpu in seen("1")] == ["1"]
    assert [gpu.index for gpu in seen("GPU-bb,0")] == ["GPU-bb", "0"]
    assert seen("-1") == seen("") == []
    assert [gpu.index for gpu in seen("0,7,1")] == ["0"]


def test_devices_by_name():
    assert resolve_gpus("auto", GPUS) == GPUS
    assert resolve_gpus("cpu", GPUS) == []
    assert resolve_gpus([1], GPUS) == [GPUS[1]]
    for wrong in ([2], "gpu", []):
        with pytest.raises(SearchError, match=r"0 \(H100\), 1 \(H100\)"):
            resolve_gpus(wrong, GPUS)


def test_a_place_is_lent_to_one_at_a_time():
    places, taken = Places([Place("a"), Place("b")]), []
    ready = threading.Barrier(3)

    def use():
        with places.lease() as place:
            taken.append((place, current_place()))
            ready.wait(timeout=10)

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    ready.wait(timeout=10)
    for thread in threads:
        thread.join()
    assert {place.kind for place, _ in taken} == {"a", "b"}
    assert all(place is seen for place, seen in taken)
    assert current_place() == Place()


def look():
    import keras

    backend = keras.backend.backend()
    before = len(os.listdir("/proc/self/task"))
    keras.ops.matmul(keras.ops.ones((400, 400)), keras.ops.ones((400, 400)))
    if backend == "torch":
        import torch

        threads = torch.get_num_threads()
    else:
        threads = len(os.listdir("/proc/self/task")) - before
    return [os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["OMP_NUM_THREADS"], threads]


def test_a_child_finds_its_device_and_computes_with_its_threads(executor, tmp_path):
    """Needs no GPU: the settings for frameworks are checked, and the threads are counted."""
    found = {}
    for cores in (1, 5):
        directory = TaskDirectory(tmp_path / f"task{cores}")
        payload = tmp_path / f"data{cores}" / "payload.pkl"
        dump_payload({"function": look}, payload)
        directory.write_task("call", {"payload": str(payload)})
        environment = {"CUDA_VISIBLE_DEVICES": "1", **threads_environment(cores)}
        with at_place(Place("H100", environment)):
            outcome = executor.submit(directory).result(timeout=60)
        assert outcome.is_completed, outcome.traceback
        device, omp, found[cores] = outcome.result["value"]
        assert (device, omp) == ("1", str(cores))
    assert found[1] < found[5]


def test_a_child_from_which_gpus_are_hidden_trains_on_the_cpu(monkeypatch):
    """The server has imported Keras, which chose torch's device then, and JAX, which read its variable then."""
    chosen, updates = SimpleNamespace(DEFAULT_DEVICE="cuda"), []
    monkeypatch.setitem(sys.modules, "keras.src.backend.torch.core", chosen)
    jax = SimpleNamespace(config=SimpleNamespace(update=lambda *change: updates.append(change)))
    monkeypatch.setitem(sys.modules, "jax", jax)
    (on_a_gpu,), (on_the_cpu,) = plan_places(1, GPUS[:1], cores=2), plan_places(1, [], cores=2, without_gpus=True)
    for name, value in on_a_gpu.environment.items():
        monkeypatch.setenv(name, value)
    apply_place()
    assert (chosen.DEFAULT_DEVICE, updates) == ("cuda", [])
    for name, value in on_the_cpu.environment.items():
        monkeypatch.setenv(name, value)
    apply_place()
    assert (chosen.DEFAULT_DEVICE, updates) == ("cpu", [("jax_platforms", "cpu")])


class Cluster:
    """Machines of several types; notes what each was asked to run."""

    backend = "tensorflow"

    def __init__(self):
        self.asked = Counter()

    def submit(self, directory, environment=None, timeout_seconds=None, is_memory_limited=False):
        kind, (task, arguments) = current_place().kind, directory.read_task()
        self.asked[kind, task] += 1
        facts = {
            "signature": f"model on {kind}", "device": kind, "static_bytes": 100, "sample_bytes": 4,
            "batch_coupled_layers": [], "precision_policy": "float32", "sample_shapes": None,
        }  # fmt: skip
        size = arguments.get("micro_batch_size", 1)
        measured = [Measurement(size, steps, 1000 * size, 0.01 * size, "made").to_dict() for steps in (1, 2)]
        future = Future()
        future.set_result(Outcome("completed", facts if task == "inspect" else {"measurements": measured}))
        return future


def test_what_one_worker_has_measured_serves_all_with_the_same_type_of_device(tmp_path):
    cluster = Cluster()
    profiler = Profiler(
        cluster, tmp_path / "payload", tmp_path / "scratch", tmp_path / "profiles", memory_budget_bytes=None,
        micro_batch_sizes=(1, 2, 4),
    )  # fmt: skip
    profiles = {}
    for place in plan_places(4, [*GPUS, Gpu("2", "T4"), Gpu("3", "T4")], cores=4):
        with at_place(place):
            profiles.setdefault(place.kind, []).append(profiler.profile({"space": [], "values": {"width": 3}}))
    assert {kind: {profile.device for profile in found} for kind, found in profiles.items()} == {
        "H100": {"H100"}, "T4": {"T4"},
    }  # fmt: skip
    assert cluster.asked["H100", "inspect"] == cluster.asked["T4", "inspect"] == 1
    probes = cluster.asked["H100", "probe"]
    assert probes == cluster.asked["T4", "probe"] == len({m.micro_batch_size for m in profiles["T4"][0].measurements})
