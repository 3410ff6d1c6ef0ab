"""`fit` is handed the numbers of rows, and the rows are taken where a micro-step needs them."""

import keras
import numpy as np
import pytest
from equality import BACKEND, EFFECTIVE, SAMPLES, regression
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter

from accumtune.accumulation.rows import row_numbers, rows_of


@pytest.mark.skipif(BACKEND != "torch", reason="the others' adapters give what the host can read")
def test_row_numbers_are_read_by_the_host_whatever_the_device():
    with keras.device("meta"):  # as a GPU's, its tensors cannot be read as NumPy arrays
        adapter = rows_of(**regression()).adapter(EFFECTIVE, None, False)
        found = [row_numbers(batch) for batch in adapter.get_torch_dataloader()]
        assert np.array_equal(np.concatenate(found), np.arange(SAMPLES)) and len(found) == 3
        # The negative control: numbers as Keras would put them on the device.
        keras_own = ArrayDataAdapter(np.arange(SAMPLES), batch_size=EFFECTIVE).get_torch_dataloader()
        with pytest.raises(TypeError, match="meta"):
            np.asarray(next(iter(keras_own)))
