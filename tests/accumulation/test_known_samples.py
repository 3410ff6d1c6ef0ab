"""The few samples of a training with which a model's own code is tested."""

import keras
import numpy as np
import pytest
from equality import as_array, dense, numbers

from accumtune.accumulation import accumulate
from accumtune.accumulation.coupling import known_samples
from accumtune.accumulation.coupling.known_samples import Samples


def test_the_first_samples_are_kept_and_fewer_of_large_ones(monkeypatch):
    x = {"tokens": np.arange(100).reshape(50, 2), "absent": None}
    samples = Samples(x, keras.ops.convert_to_tensor(np.arange(50)))
    np.testing.assert_array_equal(samples.x["tokens"], x["tokens"][:16])
    np.testing.assert_array_equal(samples.y, np.arange(16))
    assert samples.x["absent"] is None
    x["tokens"][:] = 0  # a generator may fill the same array again
    assert samples.x["tokens"].any()
    monkeypatch.setattr(known_samples, "_MOST_BYTES", 7 * 24)  # a row has 16 bytes of x and 8 of y
    assert len(Samples(x, np.arange(50)).y) == 7
    monkeypatch.setattr(known_samples, "_MOST_BYTES", 1)
    assert len(Samples(x, np.arange(50)).y) == 5


class Counts(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, inputs):
        self.calls.assign_add(1)
        return inputs


def test_predictions_beside_their_targets_change_nothing():
    model = dense(layers=[Counts()])()
    x, y = numbers(4, 4), numbers(4, 2)
    ((targets, predictions),) = Samples(x, y).targets_and_predictions(model)
    np.testing.assert_array_equal(targets, y)
    assert as_array(model.layers[1].calls) == 0
    np.testing.assert_allclose(predictions, model.predict(x, verbose=0), rtol=1e-5)


@pytest.mark.parametrize("x, y", [(numbers(4, 3), numbers(4, 2)), (numbers(4, 4), None), (numbers(4, 4), [1, 2] * 2)])
def test_samples_that_are_not_the_models_say_nothing(x, y):
    """Those of another shape, without targets, or with more targets than outputs."""
    y = [np.zeros(4)] * 2 if isinstance(y, list) else y
    assert Samples(x, y).targets_and_predictions(dense()()) == []


def test_the_first_batch_of_a_training_is_noted_and_what_is_no_array_is_left_alone():
    model = accumulate(dense()(), 2)
    x, y = numbers(8, 4), numbers(8, 2)
    model.train_on_batch(*map(keras.ops.convert_to_tensor, (x, y)))
    model.train_on_batch(*map(keras.ops.convert_to_tensor, (-x, y)))
    np.testing.assert_allclose(model._accumtune_samples.x, x[:2])
    other = accumulate(dense()(), 2)
    known_samples.note(other, (object(), y, None))
    assert other._accumtune_samples.x is None and other._accumtune_samples.targets_and_predictions(other) == []
