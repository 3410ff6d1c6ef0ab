"""The device's properties from the operating system and NVIDIA's driver."""

import sys

import fake_nvml
import pytest

from accumtune.errors import BudgetError
from accumtune.memory import machine
from accumtune.memory.budget import parse_budget, parse_share

MIB = 2**20
MEMINFO = "MemTotal:       1048576 kB\nMemFree:  1 kB\nMemAvailable:    524288 kB\n"


@pytest.fixture
def host(tmp_path):
    (tmp_path / "meminfo").write_text(MEMINFO)
    (tmp_path / "cgroup").mkdir()
    return tmp_path


def test_a_machine_without_a_container(host):
    found = machine.machine_memory(host / "meminfo", host / "cgroup")
    assert (found.name, found.total_bytes, found.free_bytes) == ("CPU", 1024 * MIB, 512 * MIB)
    (host / "cgroup" / "memory.max").write_text("max\n")  # a container without a limit
    (host / "cgroup" / "memory.current").write_text("1\n")
    assert machine.machine_memory(host / "meminfo", host / "cgroup") == found


def test_a_container_has_what_its_limit_says(host):
    (host / "cgroup" / "memory.max").write_text(f"{256 * MIB}\n")
    (host / "cgroup" / "memory.current").write_text(f"{56 * MIB}\n")
    found = machine.machine_memory(host / "meminfo", host / "cgroup")
    assert (found.total_bytes, found.free_bytes) == (256 * MIB, 200 * MIB)


def h100(**more):
    return fake_nvml.gpu("NVIDIA H100 80GB HBM3", 81559, 71559, "GPU-aa", **more)


def test_a_gpu_and_who_else_is_on_it(monkeypatch):
    processes = [(4242, "/usr/bin/python3", 9000 * MIB), (17, "trainer", None)]
    fake_nvml.install(monkeypatch, h100(processes=processes))
    found = machine.device_memory()
    assert found.is_gpu and found.total_bytes == 81559 * MIB == machine.gpu_total_bytes()
    assert found.others == ("4242 python3 8.79 GiB", "17 trainer")
    text = found.describe()
    assert "NVIDIA H100" in text and "69.88 GiB free" in text and "4242 python3" in text and "context" in text
    assert parse_budget("50%") == 81559 * MIB // 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert not machine.device_memory().is_gpu and machine.gpu_total_bytes() is None


def test_the_first_visible_gpu_is_the_device(monkeypatch):
    t4 = fake_nvml.gpu("T4", 15360, 15000, "GPU-bb")
    for visible, total in (("1,0", 15360), ("GPU-b", 15360), ("0", 81559), ("7", None)):
        fake_nvml.install(monkeypatch, h100(), t4, visible=visible)
        assert machine.gpu_total_bytes() == (None if total is None else total * MIB)


def test_a_divided_gpu_is_its_instances(monkeypatch):
    instances = [fake_nvml.gpu("H100 MIG 1g.10gb", 9856, size, f"MIG-{size}") for size in (9000, 8000)]
    fake_nvml.install(monkeypatch, h100(instances=[instances[0], None, instances[1]]))
    assert [gpu.index for gpu in machine.visible_gpus()] == ["MIG-9000", "MIG-8000"]
    assert machine.gpu_total_bytes() == 9856 * MIB, "not the 80 GB of the whole"
    for visible, free in (("0", 9000), ("MIG-8000", 8000)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert machine.device_memory().free_bytes == free * MIB


def test_a_gpu_without_memory_of_its_own_is_the_machine(monkeypatch):
    fake_nvml.install(monkeypatch, fake_nvml.gpu("GB10", None, None, "GPU-aa"))
    assert not machine.device_memory().is_gpu and machine.gpu_total_bytes() is None


def test_a_driver_that_does_not_answer_is_no_gpu(monkeypatch):
    fake_nvml.install(monkeypatch, h100(), init_error="Driver Not Loaded")
    assert machine.visible_gpus() == []
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert machine.visible_gpus() == []


def test_a_share_of_the_device():
    assert parse_share("80%") == 0.8 and parse_share(" 12.5 % ") == 0.125
    assert parse_share("2GiB") is None and parse_share(80) is None
    whole = parse_budget("100%")
    assert whole == machine.device_memory().total_bytes
    assert parse_budget("25%") == whole // 4
    for wrong in ("0%", "101%"):
        with pytest.raises(BudgetError, match="100 %"):
            parse_budget(wrong)


@pytest.mark.parametrize(
    ("flags", "backend", "setting", "is_said"),
    [
        ("sse4_2 avx2 avx512f", "tensorflow", None, True),
        ("sse4_2 avx2 avx512_vnni", "tensorflow", None, False),
        ("sse4_2 avx2 avx512f", "tensorflow", "1", False),
        ("sse4_2 avx2 avx512f", "torch", None, False),
    ],
)
def test_workspace_of_convolutions_is_said_where_it_is_taken(host, monkeypatch, flags, backend, setting, is_said):
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS", raising=False)
    if setting:
        monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", setting)
    (host / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    hint = machine.budget_hint(backend, host / "cpuinfo")
    assert ("TF_ENABLE_ONEDNN_OPTS=1" in hint) == is_said
