"""A saved state comes back as it was, and runs no code."""

import pickle
import random

import keras
import ml_dtypes
import numpy as np
import pytest

from accumtune.worker.checkpoint.state_file import read_state, write_state


def written(path, state):
    with open(path, "wb") as file:
        write_state(file, state)
    return read_state(path)


def test_a_state_comes_back_as_it_was(tmp_path):
    random.seed(3)
    state = {
        "python": random.getstate(), "numpy": np.random.get_state(), "best": None, "inf": float("inf"), "is": True,
        "mixed": [1, (2.5, "a"), {3, 4}, b"\0\xff", 1j, {1: "one", "~tuple": [2]}, {"a": {"b": [()]}}],
        "scalar": np.float32(0.1), "operation": keras.ops.less, "numpy function": np.mean, "10**30": 10**30,
    }  # fmt: skip
    found = written(tmp_path / "a.npz", state)
    np.testing.assert_equal(found, state)
    assert type(found["scalar"]) is np.float32 and found["operation"] is keras.ops.less
    random.setstate(found["python"])
    np.random.set_state(found["numpy"])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.uint32, bool, "U5"])
def test_arrays_of_every_type(tmp_path, dtype):
    array = np.array([[0, 1, 0], [1, 1, 0]]).astype(dtype)
    for value in (array, array[0, 0], array[:0], np.array(array[0, 1])):
        found = written(tmp_path / "a.npz", {"value": value})["value"]
        assert type(found) is type(value) and found.dtype == value.dtype and np.shape(found) == np.shape(value)
        assert np.array_equal(found, value)


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit('it was run')",)


def test_nothing_is_unpickled(tmp_path):
    (tmp_path / "a.npz").write_bytes(pickle.dumps(Hostile()))
    np.savez(tmp_path / "b.npz", state=np.array([Hostile()], object))
    for name in ("a.npz", "b.npz"):
        with pytest.raises(ValueError):
            read_state(tmp_path / name)
    for value in (object(), np.array([None])):
        with pytest.raises(TypeError):
            written(tmp_path / "c.npz", value)


def test_a_function_is_no_reason_to_import_a_module(tmp_path, monkeypatch):
    (tmp_path / "unknown_module.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)

    def function():
        pass

    function.__module__, function.__qualname__ = "unknown_module", "function"
    with pytest.raises(ValueError, match="not imported"):
        written(tmp_path / "a.npz", function)
