"""Running out of memory is detected early, and only if it has happened."""

import os
import threading
import time

import pytest

from accumtune.memory import memory_watch as watching
from accumtune.memory.device import Device

MIB = 2**20
BACKEND = os.environ["KERAS_BACKEND"]


class Unlimited(Device):
    """A backend that cannot limit itself, whose peak the test sets."""

    backend, memory_source, has_limits = "torch", "the test", False
    peak = 0

    def current_memory_bytes(self):
        return self.peak

    def peak_memory_bytes(self):
        return self.peak

    def reset_peak(self):
        self.peak = 0


def test_a_peak_above_the_budget_is_noticed():
    device, noticed = Unlimited("CPU:0", 100), threading.Event()
    with watching.watched(device, noticed.set):
        device.peak = 100
        assert not noticed.wait(0.7)  # exactly the budget fits
        device.peak = 101
        assert noticed.wait(10)


def test_nothing_is_watched_without_a_budget_or_after_the_body():
    noticed = threading.Event()
    for device in (Unlimited("CPU:0"), Unlimited("CPU:0", 100)):
        with watching.watched(device, noticed.set):
            pass
        device.peak = 1000
    assert not noticed.wait(0.7)


def test_a_process_that_works_does_not_sleep():
    over = threading.Event()

    def work():
        while not over.is_set():
            sum(range(1000))

    worker = threading.Thread(target=work)
    worker.start()
    own = str(threading.get_native_id())
    seen = [watching._work_done(own) for _ in range(20) if not time.sleep(0.01)]
    over.set()
    worker.join()
    assert len(set(seen)) > 1 or None in seen


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's patience")
def test_tensorflow_waiting_for_memory_is_noticed_before_its_own_patience_ends(value_in_child):
    def overdraw(is_watched):
        import threading

        import tensorflow as tf

        from accumtune.memory.device import is_out_of_memory, open_device
        from accumtune.memory.memory_watch import watched

        device = open_device("tensorflow", 64 * 2**20)
        noticed = threading.Event()
        before_the_error = None
        with watched(device, noticed.set, may_wait=not is_watched):
            try:
                tf.zeros([80 * 2**18])
            except tf.errors.ResourceExhaustedError as error:
                before_the_error = noticed.is_set()
                assert is_out_of_memory(error)
        return before_the_error

    assert value_in_child(overdraw, True, budget_bytes=64 * MIB) is True
    # The negative control: training may wait for its data, so there only TensorFlow's own word counts.
    assert value_in_child(overdraw, False, budget_bytes=64 * MIB) is False
