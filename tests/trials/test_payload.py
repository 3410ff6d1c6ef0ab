"""What can be sent to a trial, and what an error says about the rest."""

import errno
import threading

import numpy as np
import pytest

from accumtune.errors import SearchDirectoryError, UnsendableDataError
from accumtune.trials.payload import dump_payload, load_payload


def test_an_array_is_written_once_however_often_it_is_given(tmp_path):
    array = np.random.default_rng(0).normal(size=(200, 100))
    dump_payload({"a": array, "b": (array, {"c": array})}, tmp_path / "payload.pkl")
    dump_payload({"again": array.copy()}, tmp_path / "payload.pkl")
    assert len(list((tmp_path / "arrays").iterdir())) == 1
    assert np.array_equal(load_payload(tmp_path / "payload.pkl")["again"], array)


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
