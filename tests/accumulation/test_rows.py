"""`fit` gets the indices of rows, and the rows are taken when a micro-step needs them, the next ones meanwhile."""

import threading
import traceback

import keras
import numpy as np
import pytest
from equality import BACKEND, EFFECTIVE, SAMPLES, assert_exact, dense, regression, train
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter

from accumtune.accumulation import accumulate
from accumtune.accumulation.data import row_indices
from accumtune.accumulation.data.gather_ahead import GatherAhead
from accumtune.accumulation.data.row_indices import ALIGNMENT, Rows, row_numbers, rows_of


@pytest.mark.skipif(BACKEND != "torch", reason="the others' adapters give what the host can read")
def test_row_numbers_are_read_by_the_host_whatever_the_device():
    with keras.device("meta"):  # as a GPU's, its tensors cannot be read as NumPy arrays
        adapter = rows_of(**regression()).adapter(EFFECTIVE, False)
        found = [row_numbers(batch)[0] for batch in adapter.get_torch_dataloader()]
        assert np.array_equal(np.concatenate(found), np.arange(SAMPLES)) and len(found) == 3
        # The negative control: numbers as Keras would put them on the device.
        keras_own = ArrayDataAdapter(np.arange(SAMPLES), batch_size=EFFECTIVE).get_torch_dataloader()
        with pytest.raises(TypeError, match="meta"):
            np.asarray(next(iter(keras_own)))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow borrows NumPy's memory")
@pytest.mark.parametrize("is_counted", [True, False])
def test_tensorflow_copies_rows_once_wherever_they_lie(is_counted, monkeypatch):
    """Into its allocator's memory if that is measured; else the rows are where they were gathered."""
    import tensorflow as tf

    copied = []
    deep_copy = tf.raw_ops.DeepCopy

    def spy(x):
        copied.append(x.ctypes.data % ALIGNMENT)
        return deep_copy(x=x)

    monkeypatch.setattr(tf.raw_ops, "DeepCopy", spy)
    monkeypatch.setenv("TF_CPU_ALLOCATOR_USE_BFC", "true" if is_counted else "false")
    memory = np.random.default_rng(0).integers(0, 256, 4096, np.uint8)
    for offset in range(0, 128, 16):  # as malloc may place them
        x = memory[offset : offset + 2048].view("float64").reshape(32, 8)
        for chosen in (np.arange(4, 8), np.array([3, 9, 2])):
            taken, _, _ = rows_of(x).take(chosen)
            assert np.array_equal(np.nan_to_num(taken), np.nan_to_num(x[chosen]))
            assert not np.shares_memory(taken.numpy(), memory)
    # At another address TensorFlow makes a copy before.
    assert copied == [0] * 16 * is_counted


# Rows of the next micro-batch


class Gathers:
    """Which rows are gathered, and in which thread."""

    def __init__(self, monkeypatch, broken=()):
        self.seen, self.ahead = [], 0
        self.changed = threading.Condition()
        own = Rows._gathered

        def gathered(rows, indices):
            if set(broken) & set(indices.tolist()):
                raise OSError("a row that cannot be read")
            arrays = own(rows, indices)
            with self.changed:
                self.seen.append(indices.tolist())
                self.ahead += threading.current_thread() is not threading.main_thread()
                self.changed.notify_all()
            return arrays

        monkeypatch.setattr(Rows, "_gathered", gathered)

    def wait_for(self, number):
        with self.changed:
            return self.changed.wait_for(lambda: len(self.seen) >= number, timeout=60)


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("accumtune-rows")]


class Step(keras.layers.Layer):
    """Calls a function in each micro-step. Its loss needs no denominator, for which rows would be taken twice."""

    on_step = staticmethod(lambda: None)

    def call(self, inputs, training=False):
        if training:
            self.on_step()
        self.add_loss(keras.ops.mean(keras.ops.square(inputs)))
        return inputs


FORMS = [({"micro_batch_size": 4}, EFFECTIVE), ({"accumulation_steps": 2}, EFFECTIVE // 2)]


def stepping(how, batch_size):
    """A model that is built, which takes rows of its own, and the arguments of `fit` for 6 micro-steps."""
    step = Step()
    model = keras.Sequential([keras.layers.Dense(2), step])
    model.compile("sgd", run_eagerly=True)
    accumulate(model, **how)
    given = {"x": regression()["x"], "batch_size": batch_size, "shuffle": False, "verbose": 0}
    model.fit(**given)
    return model, step, given


@pytest.mark.parametrize("is_ahead", [True, False])
@pytest.mark.parametrize(("how", "batch_size"), FORMS)
def test_the_next_rows_are_gathered_while_a_step_runs(how, batch_size, is_ahead, monkeypatch):
    """Each step waits until its next rows are there; without a thread, the negative control, they never are."""
    model, step, given = stepping(how, batch_size)
    gathers = Gathers(monkeypatch)
    if not is_ahead:
        monkeypatch.setattr(row_indices, "LEAST_BYTES_AHEAD", 10**9)
    gathered_in_step, alive = [], []

    def on_step():
        if is_ahead and len(gathered_in_step) < 5:
            assert gathers.wait_for(len(gathered_in_step) + 2)
        gathered_in_step.append(len(gathers.seen))
        alive.append(len(threads()))

    step.on_step = on_step
    model.fit(**given)
    assert gathered_in_step == ([2, 3, 4, 5, 6, 6] if is_ahead else [1, 2, 3, 4, 5, 6])
    assert sum(gathers.seen, []) == list(range(SAMPLES))
    assert gathers.ahead == (5 if is_ahead else 0)
    assert alive == [int(is_ahead)] * 6 and not threads()


def test_where_the_host_s_memory_is_the_device_s_nothing_waits_in_it(monkeypatch):
    monkeypatch.setattr(row_indices, "may_gather_ahead", False)
    gathers = Gathers(monkeypatch)
    accumulate(dense()(), 3).fit(**regression(), batch_size=EFFECTIVE, verbose=0)
    assert gathers.seen and not gathers.ahead


@pytest.mark.parametrize("broken", [0, 4, 8, 20])
@pytest.mark.parametrize(("how", "batch_size"), FORMS)
def test_an_error_appears_at_the_micro_step_that_needs_the_row(how, batch_size, broken, monkeypatch):
    model, step, given = stepping(how, batch_size)
    steps = []
    step.on_step = lambda: steps.append(None)
    Gathers(monkeypatch, broken=[broken])
    with pytest.raises(OSError, match="cannot be read") as raised:
        model.fit(**given)
    assert len(steps) == broken // 4
    assert "gathered" in [frame.name for frame in traceback.extract_tb(raised.tb)]
    assert not threads()


class Ends(keras.callbacks.Callback):
    def __init__(self, error=None):
        super().__init__()
        self.error = error

    def on_train_batch_end(self, batch, logs=None):
        assert threads()
        self.model.stop_training = True
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), ValueError("of a callback")])
def test_no_thread_outlives_fit_however_it_ends(error):
    model = accumulate(dense()(), 3)
    arguments = {**regression(), "batch_size": EFFECTIVE, "epochs": 3, "verbose": 0, "callbacks": [Ends(error)]}
    if error is None:
        assert len(model.fit(**arguments).epoch) == 1
    else:
        with pytest.raises(type(error)):
            model.fit(**arguments)
    assert not threads()


def random_states():
    states = [np.random.get_state()[1].tolist(), np.random.get_state()[2]]
    if BACKEND == "torch":
        import torch

        states.append(torch.get_rng_state().tolist())
    return states


class Draws(keras.callbacks.Callback):
    """Draws from the generators from which Keras shuffles."""

    def on_train_batch_end(self, batch, logs=None):
        np.random.random()
        if BACKEND == "torch":
            import torch

            torch.rand(1)


@pytest.mark.parametrize("shuffle", [True, "batch"])
@pytest.mark.parametrize("steps", [None, 2])
def test_random_draws_are_those_of_plain_keras(shuffle, steps):
    """Also with a callback that draws in between, and with epochs that end before the data do."""
    if steps is not None:
        arguments = {"steps_per_epoch": steps, "epochs": 1}
    else:
        arguments = {"epochs": 3}
    after = []
    for how in ({}, {"micro_batch_size": 3}):
        train(dense(), regression(), shuffle=shuffle, callbacks=[Draws()], **arguments, **how)
        after.append(random_states())
    assert after[0] == after[1]
    assert_exact(dense(), regression(), shuffle=shuffle, callbacks=[Draws()], epochs=3)


@pytest.mark.parametrize("shuffle", [True, False, "batch"])
def test_a_batch_of_row_numbers_has_those_of_the_next(shuffle):
    adapter = rows_of(**regression()).adapter(EFFECTIVE, shuffle)
    get = {"tensorflow": "get_tf_dataset", "jax": "get_jax_iterator", "torch": "get_torch_dataloader"}[BACKEND]
    mine, following = zip(*map(row_numbers, getattr(adapter, get)()), strict=True)
    assert sorted(np.concatenate(mine)) == list(range(SAMPLES)) and len(mine) == 3
    if shuffle == "batch" and BACKEND != "tensorflow":  # a batch that is not yet shuffled is not known
        assert not any(map(len, following))
    else:
        assert [list(numbers) for numbers in following] == [*map(list, mine[1:]), []]


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the shapes of a tf.data.Dataset")
@pytest.mark.parametrize(("size", "expected"), [(EFFECTIVE, None), (SAMPLES // 3, SAMPLES // 3)])
def test_shapes_of_row_numbers_are_those_of_keras(size, expected):
    """Keras weights the logged losses by them."""
    spec = rows_of(**regression()).adapter(size, True).get_tf_dataset().element_spec
    assert {tuple(spec[name].shape) for name in spec} == {(expected,), (None,)}


def test_rows_that_were_not_expected_are_gathered():
    calls = []
    ahead = GatherAhead(lambda indices: (calls.append(indices.tolist()), indices * 10)[1])
    try:
        one, two, nothing = np.array([1, 2]), np.array([3, 4]), np.array([], int)
        assert ahead.take(one, two).tolist() == [10, 20]
        assert ahead.take(one, two).tolist() == [10, 20]  # as in a second pass
        assert ahead.take(two, nothing).tolist() == [30, 40]
        assert sorted(calls) == [[1, 2], [1, 2], [3, 4], [3, 4]] and threads()
    finally:
        ahead.close()
    assert not threads() and ahead.take(one, nothing).tolist() == [10, 20]


def test_a_memory_map_is_read_by_the_thread(tmp_path):
    """A slice of it would be read by the step, or when it is put on the device."""
    path = tmp_path / "x.npy"
    np.save(path, np.arange(80.0).reshape(20, 4))
    for mode, is_read in (("r", True), (None, BACKEND == "tensorflow")):
        array = np.load(path, mmap_mode=mode)
        (gathered,) = rows_of(array)._gathered(np.arange(2, 6))
        assert np.array_equal(gathered, array[2:6])
        assert np.shares_memory(gathered, array) is not is_read


@pytest.mark.parametrize("numbers", [[2, 3, 4], [5, 2, 9]])
@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8"])
def test_an_array_with_an_indexing_of_its_own_is_asked(dtype, numbers):
    class Negative(np.ndarray):
        def __getitem__(self, key):
            return -np.asarray(super().__getitem__(key))

    plain = np.arange(40).reshape(10, 4).astype(dtype)
    taken, _, _ = rows_of(plain.view(Negative)).take(np.array(numbers))
    assert np.array_equal(keras.ops.convert_to_numpy(taken), -plain[numbers])


def test_each_array_of_a_dictionary_is_taken_under_its_own_name():
    """On torch, Keras maps a dictionary in the order of its insertion and flattens it in that of its keys."""
    rows = rows_of({"tokens": np.arange(4.0), "other": 10 + np.arange(4.0)}, np.zeros(4))
    x, _, _ = rows.take(np.array([1, 2]))
    taken = {name: keras.ops.convert_to_numpy(value).tolist() for name, value in x.items()}
    assert taken == {"tokens": [1.0, 2.0], "other": [11.0, 12.0]}
