"""Objects that can be sent to a trial, and the errors for those that cannot."""

import errno
import os
import pickle
import stat
import threading

import keras
import numpy as np
import pytest

from accumtune.errors import SearchDirectoryError, UnsendableDataError
from accumtune.worker.transport.payload import dump_payload, load_payload, read_header


def test_an_array_is_written_once_however_often_it_is_given(tmp_path):
    array = np.random.default_rng(0).normal(size=(200, 100))
    dump_payload({"a": array, "b": (array, {"c": array})}, tmp_path / "payload.pkl")
    dump_payload({"again": array.copy()}, tmp_path / "payload.pkl")
    assert len(list((tmp_path / "arrays").iterdir())) == 1
    assert np.array_equal(load_payload(tmp_path / "payload.pkl")["again"], array)


def test_only_its_owner_may_write_where_it_lies_and_read_it(tmp_path):
    """Whoever may replace it decides what trials run."""
    before = os.umask(0)
    try:
        dump_payload({"a": np.zeros(40_000)}, tmp_path / "payload" / "payload.pkl")
    finally:
        os.umask(before)
    for folder in (tmp_path / "payload", tmp_path / "payload" / "arrays"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_arrays_keep_type_shape_and_order(tmp_path):
    arrays = {
        "fortran": np.asfortranarray(np.arange(40_000, dtype="int16").reshape(200, 200)),
        "sliced": np.arange(80_000, dtype="float32")[::2],
        "text": np.array(["a" * 70_000]),
        "scalar": np.float64(3.0),
        "empty": np.zeros((0, 8)),
    }
    dump_payload(arrays, tmp_path / "payload.pkl")
    for name, loaded in load_payload(tmp_path / "payload.pkl").items():
        assert loaded.dtype == arrays[name].dtype
        assert np.array_equal(loaded, arrays[name])


def test_functions_that_close_over_local_things_travel(tmp_path):
    factor = 3
    dump_payload({"function": lambda value: value * factor}, tmp_path / "payload.pkl")
    assert load_payload(tmp_path / "payload.pkl")["function"](2) == 6


@pytest.mark.parametrize(
    "value, words",
    [
        (threading.Lock(), "lock"),
        ((n for n in range(3)), "generator"),
    ],
)
def test_what_cannot_be_sent_is_named_with_a_way_out(tmp_path, value, words):
    with pytest.raises(UnsendableDataError) as caught:
        dump_payload({"x": np.zeros(3), "validation_data": value}, tmp_path / "payload.pkl")
    message = str(caught.value)
    assert "validation_data" in message and words in message and "Fix:" in message
    assert not (tmp_path / "payload.pkl").exists()


def test_a_live_tf_dataset_is_refused_with_the_function_to_write(tmp_path):
    tf = pytest.importorskip("tensorflow")
    dataset = tf.data.Dataset.from_tensor_slices([1, 2, 3]).batch(2)
    with pytest.raises(UnsendableDataError, match="def train_data") as caught:
        dump_payload({"x": dataset}, tmp_path / "payload.pkl")
    assert "x of type" in str(caught.value)
    dump_payload({"x": lambda: tf.data.Dataset.range(3)}, tmp_path / "payload.pkl")


def test_a_full_disk_is_said_as_such_and_given_back_its_space(tmp_path, monkeypatch):
    def write(file, header):
        file.write(b"0" * 1000)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", write)
    with pytest.raises(SearchDirectoryError, match="No space left.*\n.*\nFix: free some space"):
        dump_payload({"x": np.zeros(100_000)}, tmp_path / "payload.pkl")
    assert not list((tmp_path / "arrays").iterdir())


def sent(value, folder):
    dump_payload({"value": value}, folder / "payload.pkl")
    return load_payload(folder / "payload.pkl")["value"]


def tensor(value):
    return keras.ops.convert_to_tensor(value)


def test_tensors_among_the_data_are_sent_as_arrays_and_elsewhere_as_tensors(tmp_path):
    x = np.arange(40_000, dtype="float32").reshape(100, 400)
    arguments = {"validation_data": (tensor(x), [tensor(x[:, :1])]), "class_weight": {0: 1.0}, "epochs": 2}
    content = {"fit_args": ({"a": tensor(x)}, tensor(x[:, 0])), "fit_kwargs": arguments, "other": tensor(x[:1])}
    dump_payload(content, tmp_path / "payload.pkl")
    loaded = load_payload(tmp_path / "payload.pkl")
    (inputs, targets), (x_val, (y_val,)) = loaded["fit_args"], loaded["fit_kwargs"]["validation_data"]
    assert {type(array) for array in (inputs["a"], x_val)} == {np.memmap}
    assert np.array_equal(inputs["a"], x) and np.array_equal(x_val, x)
    assert np.array_equal(targets, x[:, 0]) and np.array_equal(y_val, x[:, :1])
    assert loaded["fit_kwargs"]["epochs"] == 2 and loaded["fit_kwargs"]["class_weight"] == {0: 1.0}
    assert type(loaded["other"]) is type(tensor(x))


def test_numbers_that_numpy_does_not_know_keep_their_type(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = np.arange(80_000).astype(ml_dtypes.bfloat16)
    assert sent(array, tmp_path).dtype == array.dtype
    assert np.array_equal(sent(array, tmp_path), array)


def test_a_function_for_data_is_bytes_until_it_is_called(tmp_path):
    """What it closes over would else be in the account of every process that reads the payload."""
    closed_over = tensor(np.arange(6.0))

    def make():
        return keras.ops.convert_to_numpy(closed_over)

    content = {"fit_args": (make, make), "fit_kwargs": {"validation_data": make, "callbacks": None}}
    dump_payload(content, tmp_path / "payload.pkl")
    header = read_header(tmp_path / "payload.pkl")
    assert set(header.functions) == {"x", "y", "validation_data"}
    assert all(isinstance(function.pickled, bytes) for function in header.functions.values())
    loaded = load_payload(tmp_path / "payload.pkl")
    for function in (*loaded["fit_args"], loaded["fit_kwargs"]["validation_data"], header.functions["x"]):
        assert np.array_equal(function(), np.arange(6.0))


class Off(keras.Metric):
    """With an argument that no configuration mentions."""

    def __init__(self, factor=1.0):
        super().__init__(name="off")
        self.factor = factor
        self.inner = keras.metrics.MeanAbsoluteError()

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.inner.update_state(y_true, y_pred)

    def result(self):
        return self.factor * self.inner.result()

    def reset_state(self):
        self.inner.reset_state()


class Scaled(keras.Loss):
    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor

    def call(self, y_true, y_pred):
        return self.factor * keras.ops.mean(keras.ops.square(y_true - y_pred), axis=-1)


class Twice(keras.layers.Layer):
    def call(self, inputs):
        return 2.0 * inputs


def test_metrics_and_losses_arrive_with_all_that_they_hold(tmp_path):
    wrapped = keras.metrics.MeanMetricWrapper(lambda y_true, y_pred: keras.ops.abs(y_true - 3 * y_pred), name="far")
    used = Off(factor=5.0)
    used.update_state(np.ones((9, 1)), np.ones((9, 1)))
    metrics, loss = sent(([used, keras.metrics.AUC(curve="PR", name="area"), wrapped], Scaled(7.0)), tmp_path)
    ones = np.ones((2, 1), "float32")
    values = []
    for metric in metrics:
        metric.update_state(ones, 0.5 * ones)
        values.append(float(metric.result()))
    assert values == pytest.approx([2.5, float(values[1]), 0.5]) and metrics[1].curve.value == "PR"
    assert np.allclose(loss(ones, 0 * ones), 7.0)
    # The control: Keras's own pickling does not know the class, or makes it with its defaults.
    with pytest.raises((TypeError, ValueError)):
        pickle.loads(pickle.dumps(Off(factor=5.0)))


def test_layers_and_models_arrive_with_their_state_and_classes_of_the_script(tmp_path):
    normalization = keras.layers.Normalization()
    normalization.adapt(np.array([[3.0], [7.0]]))
    model = keras.Sequential([keras.Input((1,)), normalization, Twice(), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.25), Scaled(2.0), metrics=[Off()])
    model.fit(np.ones((4, 1)), np.ones((4, 1)), verbose=0)
    arrived, optimizer = sent((model, keras.optimizers.Adam(0.125)), tmp_path)
    x = np.array([[5.0], [9.0]], "float32")
    assert np.allclose(arrived.predict(x, verbose=0), model.predict(x, verbose=0))
    y = np.ones((2, 1), "float32")
    assert arrived.evaluate(x, y, verbose=0) == pytest.approx(model.evaluate(x, y, verbose=0), rel=1e-5)
    assert float(arrived.optimizer.learning_rate) == 0.25 and float(optimizer.learning_rate) == 0.125
    with pytest.raises(TypeError, match="Twice"):
        pickle.loads(pickle.dumps(model))
