"""A trial trains on all data that Keras trains on: sparse matrices, ragged tensors, pandas frames, torch's loaders."""

import keras
import numpy as np
import pytest

import accumtune
from accumtune.accumulation.data.array_datasets import batch_source
from accumtune.accumulation.data.array_kinds import bytes_per_row
from accumtune.errors import DataError
from accumtune.worker.data.rebatch import rebatched
from accumtune.worker.data.user_data import feed_by_batches, first_samples
from accumtune.worker.identity.memory_signature import describe_model

pandas = pytest.importorskip("pandas")
scipy_sparse = pytest.importorskip("scipy.sparse")
tf = pytest.importorskip("tensorflow")

GENERATOR = np.random.default_rng(0)
DENSE = (GENERATOR.uniform(size=(21, 6)) * (GENERATOR.uniform(size=(21, 6)) < 0.4)).astype("float32")
Y = GENERATOR.integers(0, 2, (21, 1)).astype("float32")
KINDS = {
    "csr": scipy_sparse.csr_matrix(DENSE),
    "coo": scipy_sparse.coo_array(DENSE),
    "sparse tensor": tf.sparse.from_dense(DENSE),
    "frame": pandas.DataFrame(DENSE),
    "nullable frame": pandas.DataFrame(DENSE).astype("Float64"),
}


def dense(leaf):
    if isinstance(leaf, tf.SparseTensor):
        return tf.sparse.to_dense(leaf).numpy()
    return np.asarray(leaf.todense() if scipy_sparse.issparse(leaf) else leaf)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [5, 50])
def test_the_first_samples_are_those_of_the_dense_array(kind, count):
    x, y, _ = first_samples(KINDS[kind], Y, count=count)
    wanted = np.arange(count) % 21
    assert np.array_equal(dense(x), DENSE[wanted]) and np.array_equal(y, Y[wanted])


def test_a_frame_with_columns_of_several_types():
    frame = pandas.DataFrame({"a": [1, 2], "b": pandas.array([0.5, None], dtype="Float64"), "c": [True, False]})
    x, _, _ = first_samples(frame, pandas.Series([1, 2]), count=2)
    assert x.dtype == "float32" and np.array_equal(x, [[1, 0.5, 1], [2, np.nan, 0]], equal_nan=True)


def test_a_column_s_values_of_pandas_own_types():
    """As in `y = frame["price"].values`; a column of texts has such values too since pandas 3."""
    frame = pandas.DataFrame(
        {"price": pandas.array([0.5, 2.0, 3.0], dtype="Float64"), "colour": ["red", "blue", "red"]}
    )
    x, y, _ = first_samples({"colour": frame["colour"].astype("string").values}, frame["price"].values, count=2)
    assert y.tolist() == [0.5, 2.0] and x["colour"].tolist() == ["red", "blue"]


def test_ragged_samples():
    ragged = tf.ragged.constant([[1], [2, 3], [4, 5, 6]])
    x, _, _ = first_samples(ragged, np.zeros((3, 1)), count=4)
    assert x.to_list() == [[1], [2, 3], [4, 5, 6], [1]]


def build(_=None):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4, "relu"), keras.layers.Dense(1, "sigmoid")])
    model.compile(keras.optimizers.SGD(0.5), "binary_crossentropy")
    return model


def trained(x, **arguments):
    model = accumtune.accumulate(build(), micro_batch_size=4)
    feed_by_batches(model, 8, 4)
    history = model.fit(x, arguments.pop("y", Y), epochs=2, verbose=0, **arguments).history
    return model.get_weights(), history


@pytest.mark.parametrize("kind", KINDS)
def test_a_trial_s_training_is_that_of_the_dense_array(kind):
    arguments = {"validation_split": 0.3, "class_weight": {0: 1.0, 1: 3.0}}
    weights, history = trained(KINDS[kind], **arguments)
    expected, expected_history = trained(DENSE, **arguments)
    for found, wanted in zip(weights, expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert np.allclose(history["val_loss"], expected_history["val_loss"])


def test_rows_of_a_sparse_matrix_are_made_sparse_batch_by_batch():
    batches = list(batch_source(KINDS["csr"].astype("float64"), Y, batch_size=8))
    assert [batch.dtype for batch, _ in batches] == [tf.float32] * 3
    assert np.array_equal(np.concatenate([dense(batch) for batch, _ in batches]), DENSE)


class SparseBatches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return KINDS["csr"][index * 8 : index * 8 + 8], Y[index * 8 : index * 8 + 8]


def test_a_py_dataset_of_sparse_matrices_is_cut_anew():
    dataset = rebatched(SparseBatches(), 5)
    assert np.array_equal(np.concatenate([dense(dataset[index][0]) for index in range(len(dataset))]), DENSE)


def test_a_loader_of_torch():
    torch = pytest.importorskip("torch")
    pairs = torch.utils.data.TensorDataset(torch.tensor(DENSE), torch.tensor(Y))
    loader = torch.utils.data.DataLoader(pairs, batch_size=3)
    x, y, _ = first_samples(lambda: loader, count=7)
    assert np.array_equal(x, DENSE[:7]) and np.array_equal(y, Y[:7])
    weights, _ = trained(lambda: loader, y=None, validation_data=lambda: loader)
    expected, _ = trained(DENSE, shuffle=False)
    for found, wanted in zip(weights, expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    own = torch.utils.data.DataLoader(pairs, batch_sampler=[[0, 1], [2]])
    with pytest.raises(DataError, match="batch_sampler"):
        rebatched(own, 4)


def test_what_a_sample_takes_and_is(executor):
    model = build()
    signatures = {
        kind: describe_model(model, (KINDS[kind], Y, None), "CPU:0", {})["signature"] for kind in ("csr", "frame")
    }
    assert signatures["csr"] != signatures["frame"]
    assert bytes_per_row(KINDS["csr"]) == -(-KINDS["csr"].nnz * (4 + 16) // 21)
    assert bytes_per_row(KINDS["sparse tensor"]) == bytes_per_row(KINDS["csr"])
    assert bytes_per_row(DENSE) == 24
