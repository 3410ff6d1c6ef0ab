"""Batches from memory maps: the same training as from arrays, bit for bit, without the arrays on the device."""

import os

import numpy as np
import pytest

from accumtune.accumulation.data.array_datasets import batch_source
from accumtune.errors import DataError

MIB = 2**20
BACKEND = os.environ["KERAS_BACKEND"]
ROWS, FEATURES = 37, 5  # not a multiple of the batch size


@pytest.fixture
def data():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(ROWS, FEATURES)).astype("float32")
    return x, generator.integers(0, 3, ROWS)


def mapped(array, folder, name):
    path = folder / f"{name}.npy"
    np.save(path, array)
    return np.load(path, mmap_mode="r")


def trained(fit, build=None):
    """The weights and the losses of a training that starts from a fixed seed."""
    import keras

    keras.utils.set_random_seed(7)
    model = (build or classifier)()
    history = fit(model)
    return [np.asarray(weight) for weight in model.get_weights()], history.history["loss"]


def classifier():
    import keras

    layers = keras.layers
    model = keras.Sequential([layers.Input((FEATURES,)), layers.Dense(4), layers.Dropout(0.3), layers.Dense(3)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def assert_same(one, other):
    assert one[1] == other[1]
    for a, b in zip(one[0], other[0], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shuffle", [True, False, "batch"])
def test_the_same_run_as_fit_on_the_arrays(data, tmp_path, shuffle):
    x, y = data
    plain = trained(lambda model: model.fit(x, y, batch_size=8, shuffle=shuffle, epochs=3, verbose=0))

    def fit(model):
        source = batch_source(mapped(x, tmp_path, "x"), mapped(y, tmp_path, "y"), batch_size=8, shuffle=shuffle)
        return model.fit(source, shuffle=False, epochs=3, verbose=0)

    assert_same(trained(fit), plain)
    if shuffle:  # the negative control: the order matters
        unshuffled = trained(lambda model: model.fit(x, y, batch_size=8, shuffle=False, epochs=3, verbose=0))
        assert unshuffled[1] != plain[1]


def test_class_weights_and_sample_weights_come_along(data):
    x, y = data
    weights = {0: 1.0, 1: 3.0, 2: 0.25}
    plain = trained(lambda m: m.fit(x, y, batch_size=8, class_weight=weights, epochs=2, verbose=0))
    source = {"batch_size": 8, "shuffle": True}
    fed = trained(
        lambda m: m.fit(batch_source(x, y, class_weight=weights, **source), shuffle=False, epochs=2, verbose=0)
    )
    assert_same(fed, plain)
    sample_weight = np.linspace(0.1, 2, ROWS).astype("float32")
    plain = trained(lambda m: m.fit(x, y, sample_weight=sample_weight, batch_size=8, epochs=2, verbose=0))
    fed = trained(lambda m: m.fit(batch_source(x, y, sample_weight, **source), shuffle=False, epochs=2, verbose=0))
    assert_same(fed, plain)


def test_structures_and_wide_floats_are_fed_as_keras_feeds_them(data):
    import keras

    x, y = data

    def two_inputs():
        layers = keras.layers
        a, b = layers.Input((2,), name="a"), layers.Input((3,), name="b")
        joined = layers.Concatenate()([a, b])
        model = keras.Model([a, b], [layers.Dense(3, name="p")(joined), layers.Dense(1, name="q")(joined)])
        model.compile("sgd", [keras.losses.SparseCategoricalCrossentropy(from_logits=True), "mse"])
        return model

    inputs = {"a": x[:, :2].astype("float64"), "b": x[:, 2:]}
    targets = [y, x[:, :1].astype("float64")]
    sample_weight = np.linspace(0, 1, ROWS)
    arguments = {"batch_size": 10, "shuffle": True}

    def plainly(model):
        return model.fit(inputs, targets, sample_weight=sample_weight, epochs=2, verbose=0, **arguments)

    def fed(model):
        source = batch_source(inputs, targets, sample_weight, **arguments)
        return model.fit(source, shuffle=False, epochs=2, verbose=0)

    assert_same(trained(fed, two_inputs), trained(plainly, two_inputs))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a tf.data.Dataset")
def test_shapes_and_length_are_known_beforehand(data):
    x, y = data
    full = batch_source(x[:32], y[:32], batch_size=8)
    assert [tuple(spec.shape) for spec in full.element_spec] == [(8, FEATURES), (8,)]
    ragged = batch_source(x, y, batch_size=8)
    assert [tuple(spec.shape) for spec in ragged.element_spec] == [(None, FEATURES), (None,)]
    assert int(ragged.cardinality()) == 5 and [len(batch[1]) for batch in ragged] == [8, 8, 8, 8, 5]
    assert full.element_spec[1].dtype == np.int64
    texts = batch_source(np.array(["a", "bc"]), batch_size=2)
    assert next(iter(texts)).numpy().tolist() == [b"a", b"bc"]


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's allocator")
def test_the_data_set_at_rest_is_not_on_the_device(value_in_child, tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((2048, 8192), "float32"))  # 64 MiB; a batch of 64 has 2 MiB

    def feed(path, is_fed):
        import keras
        import numpy as np

        from accumtune.accumulation.data.array_datasets import batch_source
        from accumtune.memory.device import open_device

        device = open_device("tensorflow")
        model = keras.Sequential([keras.layers.Input((8192,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        x, y = np.load(path, mmap_mode="r"), np.zeros((2048, 1), "float32")
        arguments = {"batch_size": 64, "shuffle": True}
        if is_fed:
            model.fit(batch_source(x, y, **arguments), shuffle=False, verbose=0)
        else:
            model.fit(x, y, verbose=0, **arguments)
        return device.peak_memory_bytes()

    fed = value_in_child(feed, str(path), True)
    assert 2 * MIB <= fed <= 8 * MIB  # one batch and then some: the data of a batch is counted
    assert value_in_child(feed, str(path), False) >= 64 * MIB


@pytest.mark.parametrize(
    ("x", "y"),
    [(np.zeros((4, 2)), np.zeros(3)), (np.zeros(()), None), ([1, 2, 3], None), (np.zeros((0, 2)), np.zeros(0))],
    ids=["lengths differ", "a scalar", "a list of numbers", "empty"],
)
def test_data_that_cannot_be_sliced(x, y):
    with pytest.raises(DataError, match="Expected"):
        batch_source(x, y, batch_size=2)
