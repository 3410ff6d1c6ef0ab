"""`fit` gets the indices of rows, and the rows are taken when a micro-step needs them."""

import keras
import numpy as np
import pytest
from equality import BACKEND, EFFECTIVE, SAMPLES, regression
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter

from accumtune.accumulation.data.row_indices import ALIGNMENT, row_numbers, rows_of


@pytest.mark.skipif(BACKEND != "torch", reason="the others' adapters give what the host can read")
def test_row_numbers_are_read_by_the_host_whatever_the_device():
    with keras.device("meta"):  # as a GPU's, its tensors cannot be read as NumPy arrays
        adapter = rows_of(**regression()).adapter(EFFECTIVE, False)
        found = [row_numbers(batch) for batch in adapter.get_torch_dataloader()]
        assert np.array_equal(np.concatenate(found), np.arange(SAMPLES)) and len(found) == 3
        # The negative control: numbers as Keras would put them on the device.
        keras_own = ArrayDataAdapter(np.arange(SAMPLES), batch_size=EFFECTIVE).get_torch_dataloader()
        with pytest.raises(TypeError, match="meta"):
            np.asarray(next(iter(keras_own)))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow borrows NumPy's memory")
def test_tensorflow_copies_rows_once_wherever_they_lie(monkeypatch):
    import tensorflow as tf

    copied = []
    deep_copy = tf.raw_ops.DeepCopy

    def spy(x):
        copied.append(x.ctypes.data % ALIGNMENT)
        return deep_copy(x=x)

    monkeypatch.setattr(tf.raw_ops, "DeepCopy", spy)
    memory = np.random.default_rng(0).integers(0, 256, 4096, np.uint8)
    for offset in range(0, 128, 16):  # as malloc may place them
        x = memory[offset : offset + 2048].view("float64").reshape(32, 8)
        taken, _, _ = rows_of(x).take(np.arange(4, 8))
        assert np.array_equal(np.nan_to_num(taken), np.nan_to_num(x[4:8]))
    assert copied == [0] * 8, "at another address TensorFlow makes a copy before"
