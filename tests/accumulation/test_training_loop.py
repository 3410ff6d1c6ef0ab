"""`fit` in all ways: kinds of data, epochs and steps, interruptions, and the state after them."""

import keras
import numpy as np
import pytest
from equality import (
    BACKEND,
    EFFECTIVE,
    FLOAT64,
    SAMPLES,
    as_array,
    assert_exact,
    assert_same_training,
    dense,
    numbers,
    regression,
    train,
)
from promises import holds

from accumtune.accumulation import accumulate, stop_accumulating
from accumtune.errors import DataError


class Batches(keras.utils.PyDataset):
    def __init__(self, size):
        super().__init__()
        self.data, self.size = regression(), size

    def __len__(self):
        return -(-SAMPLES // self.size)

    def __getitem__(self, index):
        part = slice(index * self.size, (index + 1) * self.size)
        return self.data["x"][part], self.data["y"][part]


def as_dataset(size):
    tf = pytest.importorskip("tensorflow")
    data = regression()
    return tf.data.Dataset.from_tensor_slices((data["x"], data["y"])).batch(size)


def as_data_loader(size):
    torch = pytest.importorskip("torch")
    tensors = [torch.tensor(array) for array in regression().values()]
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*tensors), batch_size=size)


def for_ever(size):
    batches = Batches(size)
    while True:
        for index in range(len(batches)):
            yield batches[index]


KINDS = {
    "PyDataset": Batches,
    "generator": for_ever,
    "tf.data.Dataset": as_dataset,
    "torch.DataLoader": as_data_loader,
}


@pytest.mark.skipif(BACKEND != "jax", reason="Keras on JAX puts a batch on the device ahead of its step")
@pytest.mark.parametrize(("how", "size"), [({"micro_batch_size": 3}, EFFECTIVE), ({"accumulation_steps": 2}, 4)])
def test_the_batches_of_a_pipeline_stay_on_the_host(how, size, monkeypatch):
    """Only a micro-batch is on the device, not a window and the next one."""
    import jax

    held = []

    class Held(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            held.append(sum(array.shape == (size, 4) for array in jax.live_arrays()))

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # on a CPU Keras does not look ahead
    model = accumulate(dense()(), **how)
    model.fit(Batches(size), epochs=2, verbose=0, callbacks=[Held()])
    assert held == [0] * 6


@pytest.mark.parametrize("kind", KINDS)
@holds("arrays, `PyDataset`, generators, `tf.data`, torch's `DataLoader`")
def test_kinds_of_data(kind):
    steps = {"steps_per_epoch": 3} if kind == "generator" else {}

    def run(size, **how):
        return train(dense(metrics=["mae"]), {"x": KINDS[kind](size)}, batch_size=None, **steps, **how)

    plain = run(EFFECTIVE)
    assert_same_training(run(EFFECTIVE, micro_batch_size=3), plain)
    if kind != "generator":  # batches of 4 out of 21 samples for ever do not join to those of 8
        assert_same_training(run(EFFECTIVE // 2, accumulation_steps=2), plain)


@pytest.mark.parametrize("targets", [16, 5, 1])
@pytest.mark.parametrize("kind", ["generator", "tf.data.Dataset"])
def test_a_batch_whose_arrays_differ_in_their_samples_is_not_cut(kind, targets):
    """Of 16 targets for 8 samples, micro-batches would be given the first 8."""
    x, y = np.ones((8, 4), "float32"), np.ones((targets, 1), "float32")

    def batches():
        if kind == "generator":
            return (batch for batch in [(x, y)])
        return pytest.importorskip("tensorflow").data.Dataset.from_tensors((x, y))

    def mean_of_both(y_true, y_pred):
        return keras.ops.mean(keras.ops.square(y_pred), axis=-1) + keras.ops.mean(y_true)

    model = accumulate(dense(loss=mean_of_both)(), 2)
    with pytest.raises(DataError, match=rf"\(8, 4\), \({targets}, 1\).*\n.*\nFix: give each sample one entry"):
        model.fit(batches(), steps_per_epoch=1, verbose=0)
    accumulate(model, 8).fit(batches(), steps_per_epoch=1, verbose=0)  # nothing is cut: as in plain Keras


@holds("`train_on_batch`, `steps_per_epoch`, `initial_epoch`, validation, callbacks")
def test_steps_per_epoch_counts_updates():
    joined = train(dense(), {"x": for_ever(4)}, batch_size=None, steps_per_epoch=5, epochs=2, accumulation_steps=3)
    assert joined.updates() == 10
    assert [event[1] for event in joined.events if event[0] == "batch"] == [*range(5), *range(5)]
    assert joined.events[-1][-1] == 5


@pytest.mark.filterwarnings("error:.*ran out of data")
@holds("`accumulation_steps` over batched pipelines, the incomplete last window included")
def test_an_incomplete_window_makes_an_update_and_leaves_nothing():
    """21 samples in 6 batches of 4, four to an update: 16 samples, then 5; in every epoch."""
    plain = train(dense(), regression(), batch_size=16, epochs=3)
    assert_same_training(train(dense(), regression(), batch_size=4, accumulation_steps=4, epochs=3), plain)


@holds("`train_on_batch`, `steps_per_epoch`, `initial_epoch`, validation, callbacks")
def test_validation_and_initial_epoch():
    validation = (numbers(5, 4, seed=5), numbers(5, 2, seed=6))
    plain = assert_exact(
        dense(metrics=["mae"]), regression(), validation_data=validation, initial_epoch=1, epochs=3, batch_size=8
    )
    assert {"val_loss", "val_mae"} <= plain.history.keys() and len(plain.history["loss"]) == 2


@pytest.mark.parametrize("arguments", [{}, {"validation_batch_size": 5}, {"validation_steps": 9}])
@holds("`train_on_batch`, `steps_per_epoch`, `initial_epoch`, validation, callbacks")
def test_validation_steps_count_batches_of_plain_keras(arguments):
    """... and not micro-batches, which would be other samples."""
    data = regression(validation_data=(numbers(21, 4, seed=5), numbers(21, 2, seed=6)), validation_steps=2)
    plain, ours = (train(dense(), data | arguments, micro_batch_size=size).history for size in (None, 3))
    np.testing.assert_allclose(ours["val_loss"], plain["val_loss"], rtol=1e-6)


def test_validation_split_and_shuffling():
    """The same seed shuffles alike, so even this is the same training where batches are effective batches."""
    plain = train(dense(), regression(), validation_split=0.3, shuffle=True)
    ours = train(dense(), regression(), validation_split=0.3, shuffle=True, micro_batch_size=3)
    assert_same_training(ours, plain)
    joined = train(dense(), regression(), validation_split=0.3, shuffle=True, batch_size=4, accumulation_steps=2)
    assert_same_training(joined, plain)


@holds("`train_on_batch`, `steps_per_epoch`, `initial_epoch`, validation, callbacks")
def test_train_on_batch():
    def run(size):
        keras.utils.set_random_seed(1)
        model = dense(metrics=["mae"])()
        if size:
            accumulate(model, size)
        logs = [model.train_on_batch(*regression().values(), sample_weight=np.arange(SAMPLES)) for _ in range(3)]
        return logs, [keras.ops.convert_to_numpy(v) for v in model.variables]

    (plain_logs, plain), (logs, ours) = run(None), run(4)
    np.testing.assert_allclose(logs, plain_logs, rtol=FLOAT64)
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=FLOAT64, atol=FLOAT64)


class Halves(keras.callbacks.Callback):
    """Halves the learning rate after every batch that Keras reports to it."""

    def on_train_batch_end(self, batch, logs=None):
        self.model.optimizer.learning_rate = float(self.model.optimizer.learning_rate) / 2


def test_callbacks_that_change_training_are_called_per_update():
    def run(**how):
        optimizer = lambda: keras.optimizers.SGD(0.2, use_ema=True, ema_momentum=0.5)  # noqa: E731
        callbacks = [Halves(), keras.callbacks.SwapEMAWeights(swap_on_epoch=True)]
        return train(dense(optimizer=optimizer), regression(), callbacks=callbacks, **how)

    plain = run()
    assert_same_training(run(micro_batch_size=3), plain)
    assert_same_training(run(accumulation_steps=2, batch_size=4), plain)


class Sizes(keras.layers.Layer):
    """Notes the batches it is validated with, where it runs eagerly."""

    seen: set = set()

    def call(self, inputs, training=None):
        if not training:
            type(self).seen.add(inputs.shape[0])
        return inputs


@pytest.mark.parametrize(("given", "expected"), [({}, 3), ({"validation_batch_size": 6}, 6)])
def test_validation_needs_no_larger_batch_than_training(given, expected):
    model = accumulate(dense(layers=[Sizes()], run_eagerly=True)(), 3)
    model.train_on_batch(*regression().values())
    Sizes.seen.clear()
    x, y = regression().values()
    model.fit(x[:8], y[:8], batch_size=8, validation_data=(x[:18], y[:18]), verbose=0, **given)
    assert max(Sizes.seen) == expected


# Nothing stale


class Interrupted(Exception):
    pass


def broken_in_the_second_window():
    batches = Batches(4)
    yield batches[0]
    yield batches[1]
    yield np.full((4, 4), 1e6), np.zeros((4, 2))
    raise Interrupted


@holds("nothing is left of an interrupted window, of a NaN, of an earlier `compile`")
def test_an_interrupted_window_leaves_nothing_behind():
    """Two windows of two; the second breaks off after its first batch, which was huge."""
    whole = train(dense(), {"x": for_ever(4)}, accumulation_steps=2, batch_size=None, steps_per_epoch=1, epochs=1)
    keras.utils.set_random_seed(7)
    model = accumulate(dense()(), accumulation_steps=2)
    with pytest.raises(Exception):  # noqa: B017 - which one depends on who reads the generator
        model.fit(broken_in_the_second_window(), steps_per_epoch=2, verbose=0)
    for part in (whole.model, model):
        part.fit(**regression(), batch_size=4, shuffle=False, verbose=0)
    assert all(np.isfinite(keras.ops.convert_to_numpy(v)).all() for v in model.variables)
    for one, other in zip(model.variables, whole.model.variables, strict=True):
        if "seed" not in one.path:
            np.testing.assert_allclose(
                keras.ops.convert_to_numpy(one), keras.ops.convert_to_numpy(other), rtol=1e-6, err_msg=one.path
            )


@holds("nothing is left of an interrupted window, of a NaN, of an earlier `compile`")
def test_a_window_of_nan_is_gone_with_the_next():
    x, y = regression().values()
    plain = dense(optimizer=lambda: keras.optimizers.SGD(0.1))()
    model = accumulate(dense(optimizer=lambda: keras.optimizers.SGD(0.1))(), 3)
    model.train_on_batch(np.full_like(x, np.nan), y)
    assert all(np.isnan(as_array(variable)).any() for variable in model.trainable_variables)
    model.set_weights(plain.get_weights())
    for each in (plain, model):
        each.train_on_batch(x, y)
    for ours, expected in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.slow
@holds("nothing is left of an interrupted window, of a NaN, of an earlier `compile`")
def test_compile_again_another_size_and_back_to_plain():
    """Each step of this is plain training; only who does it changes."""

    def run(prepare):
        keras.utils.set_random_seed(3)
        model = dense()()
        for stage in range(4):
            prepare(model, stage)
            if stage == 2:
                model.compile(keras.optimizers.Adam(0.01), "mae")
            model.fit(**regression(), batch_size=EFFECTIVE, shuffle=False, verbose=0)
        return [keras.ops.convert_to_numpy(v) for v in model.variables]

    stages = [lambda m: accumulate(m, 3), lambda m: accumulate(m, 5), lambda m: None, stop_accumulating]
    ours = run(lambda model, stage: stages[stage](model))
    for one, other in zip(ours, run(lambda model, stage: None), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
