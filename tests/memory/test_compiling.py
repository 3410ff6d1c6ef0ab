"""Memory that is used only while programs are compiled is not part of a training's peak."""

import functools

import keras
import numpy as np
import pytest

from accumtune.memory.compilation import PeakWithoutCompiling
from accumtune.memory.device import Device
from accumtune.memory.probe import probe


class CompilingDevice(Device):
    """Holds 10 always, 30 in an update, 20 in a validation, and 100 and 90 in the first of each."""

    backend, memory_source = "made", "made"
    compiles_in_its_memory = True

    def __init__(self):
        super().__init__("GPU:0")
        self.peak = 10

    def ran(self, held):
        self.peak = max(self.peak, held)

    def current_memory_bytes(self):
        return 10

    def peak_memory_bytes(self):
        return self.peak

    def reset_peak(self):
        self.peak = 10


def follow(peak, events):
    updates = validations = 0
    for event in events:
        if event == "u":
            peak.device.ran(30 if updates else 100)
            peak.update_ended()
            updates += 1
        else:
            peak.validation_begins()
            peak.device.ran(20 if validations else 90)
            peak.validation_ended()
            validations += 1
    return peak.peak_bytes(), peak.compile_peak_bytes


@pytest.mark.parametrize(
    ("events", "training"), [("uuu", 30), ("uuv", 30), ("uvuv", 30), ("uvuvu", 30), ("uv", 100), ("u", 100)]
)
def test_the_first_update_and_the_first_validation_are_left_out(events, training):
    assert follow(PeakWithoutCompiling(CompilingDevice()), events) == (training, 100)


def test_a_probe_s_peak_is_that_of_the_updates_after_the_first(monkeypatch):
    device, runs = CompilingDevice(), {"train": 0, "test": 0}
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")

    def batches(count):
        return np.ones((count, 2), "float32"), np.ones((count, 1), "float32"), None

    class Takes(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            device.ran(30 if runs["train"] else 100)
            runs["train"] += 1

        def on_test_batch_begin(self, batch, logs=None):
            device.ran(40 if runs["test"] else 90)
            runs["test"] += 1

    keras_fit = keras.Model.fit

    @functools.wraps(keras_fit)
    def fit(self, *args, callbacks, **kwargs):
        return keras_fit(self, *args, callbacks=[Takes(), *callbacks], **kwargs)

    monkeypatch.setattr(keras.Model, "fit", fit)
    (measured,) = probe(model, batches, micro_batch_size=2, accumulation_steps=(2,), device=device)
    assert (measured.peak_memory_bytes, measured.compile_peak_memory_bytes) == (40, 100)
    assert runs["test"] == 2, "what validation takes is seen once it is compiled"
