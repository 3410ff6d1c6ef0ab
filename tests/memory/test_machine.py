"""What the operating system and NVIDIA's driver say of the device."""

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


def fake_driver(folder, monkeypatch):
    """An `nvidia-smi` that answers as the real one does."""
    script = folder / "nvidia-smi"
    script.write_text(
        '#!/bin/sh\ncase "$1" in\n--query-gpu*) echo "NVIDIA H100 80GB HBM3, 81559, 71559";;\n'
        '--query-compute-apps*) echo "4242, /usr/bin/python3, 9000"; echo "17, trainer, [N/A]";;\nesac\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_gpu_and_who_else_is_on_it(tmp_path, monkeypatch):
    fake_driver(tmp_path, monkeypatch)
    found = machine.device_memory()
    assert found.is_gpu and found.total_bytes == 81559 * MIB == machine.gpu_total_bytes()
    assert found.others == ("4242 python3 8.79 GiB", "17 trainer [N/A]")
    text = found.describe()
    assert "NVIDIA H100" in text and "69.88 GiB free" in text and "4242 python3" in text and "context" in text
    assert parse_budget("50%") == 81559 * MIB // 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert not machine.device_memory().is_gpu and machine.gpu_total_bytes() is None


def test_a_gpu_without_memory_of_its_own_is_the_machine(tmp_path, monkeypatch):
    fake_driver(tmp_path, monkeypatch)
    script = tmp_path / "nvidia-smi"
    script.write_text(script.read_text().replace("81559, 71559", "[N/A], [N/A]"))
    assert not machine.device_memory().is_gpu and machine.gpu_total_bytes() is None


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
