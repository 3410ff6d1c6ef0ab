"""On a GPU: a known allocation gives a known peak, the limit bites, and a share of the device is a budget.

Run by hand where there is one: `KERAS_BACKEND=jax pytest tests/memory/test_gpu.py`, and torch.
"""

import os

import pytest

from accumtune.memory.budget import parse_budget
from accumtune.memory.machine import device_memory

MIB = 2**20
BACKEND = os.environ["KERAS_BACKEND"]
SOURCES = {"jax": "jax compile-time analysis", "torch": "cuda allocator", "tensorflow": "tensorflow allocator"}

pytestmark = pytest.mark.skipif(not device_memory().is_gpu, reason="no GPU here")


def test_known_allocation_gives_known_peak(value_in_child):
    def allocate(backend):
        import keras

        from accumtune.memory.device import open_device

        device = open_device(backend)
        start = device.current_memory_bytes()
        first = keras.ops.ones((16 * 2**18,))  # 16 MiB
        one = device.current_memory_bytes() - start
        second = keras.ops.ones((32 * 2**18,))
        both = device.current_memory_bytes() - start
        del second
        peak = device.peak_memory_bytes() - start
        del first
        after = device.current_memory_bytes() - start
        return [one, both, peak, after, device.name, device.memory_source]

    one, both, peak, after, name, source = value_in_child(allocate, BACKEND)
    assert (one / MIB, both / MIB, peak / MIB, after / MIB) == pytest.approx((16, 48, 48, 0), abs=0.1)
    assert name.startswith("GPU:0 ") and source == SOURCES[BACKEND]


def test_the_limit_bites_and_is_recognised(value_in_child):
    def overdraw(backend, budget_bytes):
        import keras

        from accumtune.memory.device import is_out_of_memory, open_device

        device = open_device(backend, budget_bytes)
        held = keras.ops.ones((64 * 2**18,))  # what fits runs
        try:
            float(keras.ops.sum(keras.ops.ones((1024 * 2**18,))) + held[0])
        except Exception as error:
            return [is_out_of_memory(error), device.has_limits, device.budget_bytes]
        return None

    assert value_in_child(overdraw, BACKEND, 512 * MIB, budget_bytes=512 * MIB) == [True, True, 512 * MIB]
    # The negative control: without the limit the same allocation is no trouble.
    assert value_in_child(overdraw, BACKEND, None) is None


def test_a_share_of_the_device_is_a_budget():
    device = device_memory()
    assert parse_budget("50%") == pytest.approx(device.total_bytes / 2)
    assert 0 < device.free_bytes <= device.total_bytes
    assert device.name in device.describe()
