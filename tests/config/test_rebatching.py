"""Production's own pipelines in batches of the effective size."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from made_config import build_model, config_of, data

from accumtune.errors import DataError

CONFIG = config_of(data_shapes={"x": [100, 2], "y": [100]})


def samples(count=70):
    x = np.arange(2.0 * count, dtype="float32").reshape(count, 2)
    return x, np.arange(count, dtype="float32"), np.arange(count, dtype="float32") / count


def collected(batches):
    leaves = [tf.nest.flatten(batch) for batch in batches]
    return [np.concatenate([leaf[index] for leaf in leaves]) for index in range(len(leaves[0]))]


BATCHINGS = {
    "samples": lambda ds: ds,
    "batches of 5": lambda ds: ds.batch(5),
    "whole batches of 10": lambda ds: ds.batch(10, drop_remainder=True),
    "larger batches": lambda ds: ds.batch(64),
    "the effective batch": lambda ds: ds.batch(32),
    "one batch": lambda ds: ds.batch(1000),
    "prefetched": lambda ds: ds.batch(7).prefetch(2),
}


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("structure", ["x, y", "x, y, weight", "dict", "x"])
def test_the_same_samples_in_effective_batches(batching, structure):
    x, y, weight = samples()
    element = {
        "x, y": (x, y), "x, y, weight": (x, y, weight), "dict": ({"b": x, "a": y}, {"out": y}), "x": x,
    }[structure]  # fmt: skip
    config = CONFIG if structure != "dict" else config_of(data_shapes={"x": {"b": [9, 2], "a": [9]}, "y": None})
    dataset = BATCHINGS[batching](tf.data.Dataset.from_tensor_slices(element))
    rebatched = config.dataset(dataset)
    batches = list(rebatched.as_numpy_iterator())
    assert [len(tf.nest.flatten(batch)[0]) for batch in batches] == [32, 32, 6]
    for ours, theirs in zip(collected(batches), tf.nest.flatten(element), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    tf.nest.assert_same_structure(batches[0], element)
    assert rebatched.cardinality() == 3, "known before, known after"


def test_cardinality_is_not_made_up():
    ds = tf.data.Dataset.from_tensor_slices(samples()[0])
    assert CONFIG.dataset(ds.batch(5).repeat()).cardinality() == tf.data.INFINITE_CARDINALITY
    assert CONFIG.dataset(ds.filter(lambda x: True).batch(5)).cardinality() == tf.data.UNKNOWN_CARDINALITY
    # 7 batches of at most 10 samples: two or three of 32.
    hidden = ds.batch(10).map(lambda x: x)
    assert CONFIG.dataset(hidden).cardinality() in (3, tf.data.UNKNOWN_CARDINALITY)


def test_a_py_dataset_is_cut_anew():
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 14

        def __getitem__(self, index):
            x, y, _ = samples()
            return x[index * 5 : index * 5 + 5], y[index * 5 : index * 5 + 5]

    rebatched = CONFIG.dataset(Batches())
    assert len(rebatched) == 3
    np.testing.assert_array_equal(collected([rebatched[index] for index in range(3)])[0], samples()[0])


def test_what_cannot_be_told_is_asked():
    x = samples()[0]
    for shapes in (None, {"x": None, "y": None}, {"x": [9, 2, 2, 2]}):
        config = config_of(data_shapes=shapes)
        with pytest.raises(DataError, match="of shape .2,") as error:
            config.dataset(tf.data.Dataset.from_tensor_slices((x, x)))
        assert "is_batched=True" in error.value.fix
        assert config.dataset(tf.data.Dataset.from_tensor_slices((x, x)), is_batched=False).cardinality() == 3
        assert config.dataset(tf.data.Dataset.from_tensor_slices((x, x)).batch(5), is_batched=True).cardinality() == 3
    numbers = tf.data.Dataset.from_tensor_slices((x, x[:, 0]))
    assert config_of(data_shapes=None).dataset(numbers).cardinality() == 3, "a number cannot be a batch"
    for wrong in (x, [x], None, iter([x])):
        with pytest.raises(DataError, match="Received data of type"):
            CONFIG.dataset(wrong)


def test_fit_arguments_fit_with_it():
    x, y = data(72)
    config = config_of(hyperparameters={"width": 4, "learning_rate": 0.05}, data_shapes={"x": [72, 64], "y": [72, 1]})
    weights = []
    for arguments in ({"x": x, "y": y}, {"x": config.dataset(tf.data.Dataset.from_tensor_slices((x, y)).batch(5))}):
        keras.utils.set_random_seed(1)
        model = config.build(build_model)
        model.fit(**arguments, verbose=0, **config.fit_arguments(epochs=2, shuffle=False))
        assert int(model.optimizer.iterations) == 2 * 3
        weights.append(model.get_weights())
    for ours, theirs in zip(*weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
