"""The same training within another budget, on another device, over replicas."""

import fake_nvml
import numpy as np
import pytest
from made_config import MIB, build_model, config_of, data, moved_training

from accumtune.config import TrainingConfig, moving
from accumtune.config.verification import compared
from accumtune.errors import BatchSizeError, BudgetError, BudgetTooSmallError, ConfigError, VerificationError
from accumtune.memory.machine import available_memory_bytes, machine_memory


def profile_of(line=lambda size: 10 * MIB + size * MIB, limit=None, **other):
    """A profile as measurements would make it; sizes whose peak is over the limit ran out of memory."""
    from accumtune.memory.prediction.profile import Measurement, Profile

    def measurement(size, steps):
        peak = line(size) + (MIB if steps > 1 else 0)
        is_over = limit is not None and peak > limit
        seconds = None if is_over else steps * (0.01 + size * 0.0001)
        return Measurement(size, steps, None if is_over else peak, seconds, "BFC allocator", limit)

    points = [measurement(size, steps) for size in (1, 8, 16, 32) for steps in (1, 2, 4)]
    return Profile(tuple(points), **{"device": "CPU", "memory_source": "BFC allocator"} | other)


def test_another_budget_changes_the_micro_batch_and_nothing_else():
    config = config_of(micro_batch_size=32, accumulation_steps=1, hyperparameters={"width": 16})
    smaller = moving.fitted(config, profile_of(device="GPU"), 32 * MIB, "tensorflow")
    batch = {"effective_batch_size": 32, "micro_batch_size": 16, "accumulation_steps": 2}
    assert {name: getattr(smaller, name) for name in batch} == batch
    assert smaller.hyperparameters == {"width": 16, **batch}
    assert smaller.peak_memory_bytes <= smaller.memory_budget_bytes == 32 * MIB and smaller.device == "GPU"
    assert "predicted" in smaller.memory_source and smaller.epochs == config.epochs
    assert TrainingConfig.from_json(smaller.to_json()) == smaller
    assert moving.fitted(config, profile_of(), 1024 * MIB, "tensorflow").micro_batch_size == 32


def test_a_budget_in_which_nothing_fits():
    with pytest.raises(BudgetTooSmallError, match="Not even micro-batch 1 fits in 5.0 MiB on CPU"):
        moving.fitted(config_of(), profile_of(), 5 * MIB, "tensorflow")
    with pytest.raises(BudgetTooSmallError, match="of which .* loss over the whole batch; a smaller eff"):
        moving.fitted(config_of(), profile_of(loss_bytes=(0, MIB, 0)), 64 * MIB, "tensorflow")


def test_ghost_batches_are_kept_and_never_divided(monkeypatch):
    from accumtune.execution import standalone_profile as costs

    asked = {}
    monkeypatch.setattr(costs, "profile", lambda *args, **kwargs: asked.update(kwargs) or profile_of())
    config = config_of(ghost_batch_size=8)
    moved = config.for_budget(64 * MIB, None, None)
    assert asked["micro_batch_sizes"] == [8, 16, 32]
    assert moved.ghost_batch_size == 8 and moved.micro_batch_size % 8 == 0
    assert TrainingConfig.from_json(moved.to_json()) == moved
    with pytest.raises(BudgetTooSmallError, match="Not even micro-batch 8 fits.*\n.*8 samples"):
        moving.fitted(config, profile_of(), 12 * MIB, "tensorflow")
    assert config.for_replicas(2).micro_batch_size == 8
    with pytest.raises(BatchSizeError, match="leaves 4 samples"):
        config.for_replicas(8)
    with pytest.raises(ConfigError, match="micro_batch_size 8 is not a multiple of ghost_batch_size 3"):
        config_of(ghost_batch_size=3)


def test_ghost_batches_are_kept_on_another_device(monkeypatch):
    """Also those of a small effective batch, which is one group: there is one micro-batch for it."""
    from accumtune.execution import device_query
    from accumtune.execution import standalone_profile as costs

    asked = {}
    monkeypatch.setattr(costs, "profile", lambda *args, **kwargs: asked.update(kwargs) or profile_of())
    monkeypatch.setattr(device_query, "free_device_memory_bytes", lambda: 40 * MIB)
    config = config_of(micro_batch_size=32, accumulation_steps=1, ghost_batch_size=8, hyperparameters={})
    moved = config.for_device(None, None)
    assert asked["memory_budget"] == moved.memory_budget_bytes == int(0.9 * 40 * MIB)
    assert (moved.ghost_batch_size, moved.micro_batch_size, moved.effective_batch_size) == (8, 16, 32)
    with pytest.raises(ConfigError, match="not a multiple of ghost_batch_size 64"):
        config_of(ghost_batch_size=64)
    small = config_of(micro_batch_size=32, accumulation_steps=1, ghost_batch_size=64, hyperparameters={})
    with pytest.raises(BudgetTooSmallError, match="Not even micro-batch 32"):
        small.for_device(None, None)
    assert asked["micro_batch_sizes"] == [32]


def test_a_change_of_micro_batch_is_told_where_it_changes_the_training(monkeypatch):
    from accumtune.execution import standalone_profile as costs

    monkeypatch.setattr(costs, "profile", lambda *args, **kwargs: profile_of())
    coupled = config_of(batch_coupled_layers=["BatchNormalization (bn)"])
    with pytest.warns(UserWarning, match="With micro-batches of 16 instead of 8.* coupled by BatchNormalization .bn."):
        coupled.for_budget(32 * MIB, None, None)


# Another device


def test_the_device_at_hand_is_a_budget(monkeypatch):
    from accumtune.execution import device_query as device
    from accumtune.execution import standalone_profile as costs

    asked = {}
    monkeypatch.setattr(device, "free_device_memory_bytes", lambda: 100 * MIB)
    monkeypatch.setattr(costs, "profile", lambda *args, **kwargs: asked.update(kwargs) or profile_of(device="GPU"))
    moved = config_of().for_device(None, None)
    assert asked["memory_budget"] == moved.memory_budget_bytes == 90 * MIB and moved.device == "GPU"


def test_free_memory_of_this_machine():
    from accumtune.execution.device_query import free_device_memory_bytes

    assert 64 * MIB < free_device_memory_bytes() < 2**50


@pytest.mark.slow
def test_a_real_profile_moves_a_configuration_that_then_holds():
    # Few divisors, few probes: each is a process.
    batch = {"micro_batch_size": 1, "accumulation_steps": 3, "effective_batch_size": 3}
    config = config_of(**batch, hyperparameters={"width": 2048, "learning_rate": 0.01}, peak_memory_bytes=None)
    moved = config.for_device(build_model, *data())
    assert moved.effective_batch_size == 3 == moved.micro_batch_size * moved.accumulation_steps
    assert moved.hyperparameters["width"] == 2048 and moved.memory_budget_bytes > 64 * MIB
    # What a profile predicts, a few real updates confirm.
    told = moved.verify(build_model, *data(), peak_tolerance=0.25)
    assert told.throughput_samples_per_second > 0 and "promised" in str(told)


def test_a_container_has_no_more_than_its_limit(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4096 kB\nHugePages_Total:       0\n")
    (tmp_path / "cgroup").mkdir()

    def free():
        return machine_memory(tmp_path / "meminfo", tmp_path / "cgroup").free_bytes

    assert free() == 4 * MIB
    for limit, expected in (("max", 4 * MIB), (str(3 * MIB), 2 * MIB), (str(2**40), 4 * MIB), ("1000", 0)):
        (tmp_path / "cgroup" / "memory.max").write_text(limit + "\n")
        (tmp_path / "cgroup" / "memory.current").write_text(f"{MIB}\n")
        assert free() == expected


def test_free_memory_of_a_gpu_is_what_its_driver_says(monkeypatch):
    fake_nvml.install(monkeypatch, fake_nvml.gpu("H100", 81559, 1234, "GPU-aa"))
    assert available_memory_bytes("GPU:0 NVIDIA H100") == 1234 * MIB
    fake_nvml.install(monkeypatch, init_error="Driver Not Loaded")
    with pytest.raises(BudgetError, match="Driver Not Loaded") as error:
        available_memory_bytes("GPU:0 NVIDIA H100")
    assert "for_budget" in error.value.fix
    with pytest.raises(BudgetError, match="free memory of TPU:0 v5e is not known"):
        available_memory_bytes("TPU:0 v5e")


# Replicas


def test_an_effective_batch_is_split_over_replicas():
    config = config_of(hyperparameters={"width": 16})
    for replicas, micro, steps in ((1, 8, 4), (2, 8, 2), (4, 8, 1), (8, 4, 1), (32, 1, 1)):
        spread = config.for_replicas(replicas)
        assert (spread.micro_batch_size, spread.accumulation_steps, spread.replicas) == (micro, steps, replicas)
        assert spread.effective_batch_size == 32 == spread.fit_arguments()["batch_size"]
        assert spread.hyperparameters["micro_batch_size"] == micro and spread.hyperparameters["width"] == 16
        known = (spread.peak_memory_bytes, spread.memory_source, spread.throughput_samples_per_second)
        assert known == ((40 * MIB, "BFC allocator", 1234.5) if replicas == 1 else (None, None, None)), "not measured"
        assert TrainingConfig.from_json(spread.to_json()) == spread
        assert spread.for_replicas(1).for_replicas(replicas) == spread.for_replicas(replicas)
    assert "32 = 8 × 2 × 2 replicas" in repr(config.for_replicas(2))


def test_a_smaller_peak_of_a_replica_holds():
    spread = config_of(hyperparameters={}).for_replicas(4)
    measured = {"peak_memory_bytes": 12 * MIB, "throughput_samples_per_second": 1.0, "device": "CPU"}
    assert compared(spread, measured, "tensorflow", 0.1).promised_peak_memory_bytes is None
    with pytest.raises(VerificationError, match="does not fit"):
        compared(spread, measured | {"peak_memory_bytes": 65 * MIB}, "tensorflow", 0.1)


def test_a_smaller_micro_batch_of_a_coupled_model_is_another_training():
    config = config_of(hyperparameters={}, batch_coupled_layers=["norm"])
    with pytest.warns(UserWarning, match="4 instead of 8.* norm"):
        config.for_replicas(8)


def test_what_divides_is_said():
    with pytest.raises(BatchSizeError, match="does not divide the effective batch 32") as error:
        config_of().for_replicas(3)
    assert error.value.expected == "one of 1, 2, 4, 8, 16, 32." and "30 or 33" in error.value.fix
    for wrong in (0, -1, True, 2.0, "2"):
        with pytest.raises(BatchSizeError):
            config_of().for_replicas(wrong)


def test_another_budget_on_several_replicas_keeps_them():
    spread = config_of(hyperparameters={}).for_replicas(2)
    moved = moving.fitted(spread, profile_of(), 1024 * MIB, "tensorflow")
    assert (moved.micro_batch_size, moved.accumulation_steps, moved.replicas) == (16, 1, 2)


# The same training


@pytest.mark.parametrize(("floatx", "tolerance"), [("float32", 1e-5), ("float64", 1e-9)])
def test_moved_training_is_the_same(run_in_child, floatx, tolerance):
    config = config_of(hyperparameters={"width": 16, "learning_rate": 0.05})
    smaller = moving.fitted(config, profile_of(), 14 * MIB, "tensorflow")
    larger = moving.fitted(config, profile_of(), 1024 * MIB, "tensorflow")
    assert smaller.micro_batch_size < config.micro_batch_size < larger.micro_batch_size
    weights = run_in_child(moved_training, [item.to_json() for item in (config, smaller, larger)], floatx)
    for moved in weights[1:]:
        for ours, theirs in zip(moved, weights[0], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def test_replicas_train_the_same(run_in_child):
    config = config_of(hyperparameters={"width": 16, "learning_rate": 0.05})
    one, two = run_in_child(moved_training, [config.to_json(), config.for_replicas(2).to_json()], "float64")
    for ours, theirs in zip(two, one, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)
