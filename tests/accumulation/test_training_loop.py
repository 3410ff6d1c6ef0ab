"""The ways into `fit`: kinds of data, epochs and steps, interruptions, what is left behind."""

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
    largest_difference,
    numbers,
    regression,
    train,
)
from promises import holds

from accumtune.accumulation import accumulate, stop_accumulating


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
    model = accumulate(dense(optimizer=lambda: keras.optimizers.SGD(0.0))(), 3)
    x, y = regression().values()
    model.train_on_batch(np.full_like(x, np.nan), y)
    weights = [keras.ops.convert_to_numpy(v) for v in numbers_into(model)]
    model.train_on_batch(x, y)
    assert all(np.isfinite(keras.ops.convert_to_numpy(v)).all() for v in model.trainable_variables)
    assert weights


def numbers_into(model):
    """Gives every variable of model and optimizer a finite value again."""
    for variable in (*model.trainable_variables, *model.optimizer.variables):
        value = keras.ops.convert_to_numpy(variable)
        variable.assign(np.nan_to_num(value, nan=0.5))
    return model.trainable_variables


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


# Negative controls: the naive ways are other trainings, so the comparison can tell


def native(optimizer, steps, **fit):
    """Keras's own accumulation over batches of 4."""

    def build():
        return dense(optimizer=lambda: optimizer(gradient_accumulation_steps=steps))()

    return train(build, regression(), batch_size=4, **fit)


def schedule():
    return keras.optimizers.schedules.ExponentialDecay(0.2, decay_steps=1, decay_rate=0.5)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda **k: keras.optimizers.SGD(0.1, **k),  # mean of means and stale residue: the batches are 4 4 4 4 4 1
        lambda **k: keras.optimizers.SGD(schedule(), **k),
        lambda **k: keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2, **k),
    ],
    ids=["mean-of-means", "schedule-per-micro-step", "ema-per-micro-step"],
)
def test_the_comparison_tells_naive_accumulation_apart(optimizer):
    plain = train(dense(optimizer=optimizer), regression())
    naive = native(optimizer, 2)
    pairs = zip(naive.weights(), plain.weights(), strict=True)
    assert max(np.abs(one - other).max() for one, other in pairs) > 1e-4
    ours = train(dense(optimizer=optimizer), regression(), batch_size=4, accumulation_steps=2)
    assert largest_difference(ours, plain) < 1e-6


def test_keras_own_accumulation_leaves_a_residue():
    """Negative control: 5 equal batches, 2 to an update. The fifth waits for the next epoch, and the next fit."""
    data = {name: array[:20] for name, array in regression().items()}
    sgd = keras.optimizers.SGD
    plain = train(dense(optimizer=lambda: sgd(0.1)), data, epochs=1)
    ours = train(dense(optimizer=lambda: sgd(0.1)), data, batch_size=4, accumulation_steps=2, epochs=1)
    naive = train(dense(optimizer=lambda: sgd(0.1, gradient_accumulation_steps=2)), data, batch_size=4, epochs=1)
    assert_same_training(ours, plain)
    assert (ours.updates(), naive.updates()) == (3, 2)
    pairs = zip(naive.model.trainable_variables, plain.model.trainable_variables, strict=True)
    assert max(np.abs(as_array(one) - as_array(other)).max() for one, other in pairs) > 1e-4
    accumulators = [as_array(v) for v in naive.model.optimizer.variables if "accumul" in v.path]
    assert max(np.abs(array).max() for array in accumulators) > 0


class Halves(keras.callbacks.Callback):
    """Halves the learning rate after every batch that it is told of."""

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


# Compiled once


# Windows of 8, 8 and 5 samples.
RAGGED = [({"micro_batch_size": 3}, EFFECTIVE), ({"accumulation_steps": 2}, EFFECTIVE // 2)]


class CountsTraces(keras.layers.Layer):
    traces = 0

    def call(self, inputs):
        type(self).traces += 1
        return inputs


@pytest.mark.skipif(BACKEND == "torch", reason="torch runs eagerly")
@pytest.mark.parametrize(("how", "batch_size"), RAGGED)
def test_nothing_is_traced_again_for_the_ragged_window_of_each_epoch(how, batch_size):
    CountsTraces.traces = 0
    model = accumulate(dense(layers=[CountsTraces()])(), **how)
    model.fit(**regression(), batch_size=batch_size, epochs=1, verbose=0)
    after_one = CountsTraces.traces
    model.fit(**regression(), batch_size=batch_size, epochs=3, verbose=0)
    assert CountsTraces.traces == after_one
    assert after_one <= 8


def traces(model):
    """How often each compiled function of a window was traced so far."""
    count = {"tensorflow": "experimental_get_tracing_count", "jax": "_cache_size"}[BACKEND]
    functions = {name: getattr(model.train_function, f"_{name}") for name in ("only", "first", "next", "update")}
    return {name: getattr(function, count)() for name, function in functions.items()}


@pytest.mark.skipif(BACKEND == "torch", reason="see the next test")
@pytest.mark.parametrize(("how", "batch_size"), RAGGED)
def test_each_function_is_traced_once_per_shape(how, batch_size):
    """Micro-batches of 3 + 3 + 2 and 3 + 2, or of 4 + 4 and 4 + 1: further ones have two shapes, first ones one."""
    model = accumulate(dense(metrics=["mae"])(), **how)
    for epochs in (1, 3):
        model.fit(**regression(), batch_size=batch_size, epochs=epochs, verbose=0)
        assert traces(model) == {"only": 0, "first": 1, "next": 2, "update": 1}


@pytest.mark.skipif(BACKEND != "torch", reason="see the test before")
def test_torch_compiles_nothing_again_for_the_ragged_window_of_each_epoch(monkeypatch):
    """With a compiler that only counts: torch's own wants one for C++."""
    import torch
    from torch._dynamo.testing import CompileCounter

    counter, compiled = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiled(function, backend=counter))
    model = accumulate(dense(jit_compile=True)(), 3)
    model.fit(**regression(), batch_size=EFFECTIVE, epochs=1, verbose=0)
    after_one = counter.frame_count
    model.fit(**regression(), batch_size=EFFECTIVE, epochs=3, verbose=0)
    assert counter.frame_count == after_one > 0
    model.fit(*(array[:7] for array in regression().values()), batch_size=7, verbose=0)  # a shape that is new
    assert counter.frame_count > after_one


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
