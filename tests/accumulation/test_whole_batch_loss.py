"""Losses over the whole effective batch: two passes equal one gradient of all micro-batches, called in order."""

import contextlib
import functools

import keras
import numpy as np
import pytest
from equality import BACKEND, EFFECTIVE, SAMPLES, Trained, as_array, assert_same_training, numbers, sequences
from keras import layers, ops
from keras.src.backend import get_keras_mask, set_keras_mask
from precision import set_precision
from promises import holds

from accumtune.accumulation import accumulate, accumulation_of, batch_coupled_layers
from accumtune.accumulation.losses import whole_batch_loss as whole_batch
from accumtune.accumulation.losses.leftovers import Leftovers
from accumtune.errors import AccumtuneError, DataError, ModelError

MICRO = 3
TOLERANCE = 1e-9
PROMISE = (
    "losses over the batch (contrastive, in-batch softmax, Dice, correlation) and a `compute_loss` of your own: of the "
    "whole effective batch, in two passes"
)

# Losses


def in_batch_softmax(y_true, y_pred):
    """Each sample's first vector against the second vectors of all samples."""
    one, other = ops.normalize(y_pred[:, 0], axis=-1), ops.normalize(y_pred[:, 1], axis=-1)
    similarities = ops.matmul(one, ops.transpose(other)) * 5
    return ops.mean(ops.diagonal(ops.logsumexp(similarities, axis=1, keepdims=True) - similarities))


def correlation(y_true, y_pred):
    """One number per batch: what is left of Pearson's correlation."""
    a, b = y_true - ops.mean(y_true, axis=0), y_pred - ops.mean(y_pred, axis=0)
    return 1 - ops.mean(ops.sum(a * b, axis=0) / ops.sqrt(ops.sum(a * a, axis=0) * ops.sum(b * b, axis=0)))


def rank_in_batch(y_true, y_pred):
    """A value for each sample, which depends on the others: sample weights and masks can be taken."""
    return ops.mean(ops.square(y_pred - y_true - ops.mean(y_pred, axis=0, keepdims=True)), axis=-1)


def circle():
    return keras.losses.Circle(gamma=2.0)


# Models


class Views(layers.Layer):
    """Two views of a sample as its two vectors."""

    def call(self, x):
        return ops.reshape(x, (-1, 2, 3))


def embedding(loss=in_batch_softmax, **compile):
    def build():
        model = keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(8, activation="tanh"),
                layers.Dropout(0.3),
                layers.Dense(6),
                layers.GaussianNoise(0.1),
                Views(),
            ]
        )
        return compiled(model, loss, **compile)

    return build


def outputs(loss, activation=None, kinds=2, **compile):
    def build():
        model = keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(8, activation="tanh"),
                layers.Dropout(0.3),
                layers.Dense(kinds, activation=activation),
            ]
        )
        return compiled(model, loss() if isinstance(loss, type) or loss is circle else loss, **compile)

    return build


def compiled(model, loss, optimizer=None, **compile):
    model.compile(optimizer or keras.optimizers.SGD(0.1, momentum=0.9), loss, **compile)
    return model


class Temperature(keras.Model):
    """A loss of its own with a weight of its own, which no output leads to; it looks at the inputs, too."""

    def __init__(self):
        super().__init__()
        self.hidden, self.dropout, self.head = layers.Dense(8, activation="tanh"), layers.Dropout(0.3), layers.Dense(6)
        self.temperature = self.add_weight(shape=(), initializer="ones", name="temperature")

    def call(self, x, training=None):
        return ops.reshape(self.head(self.dropout(self.hidden(x), training=training)), (-1, 2, 3))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        scaled = y_pred * ops.exp(self.temperature)
        return in_batch_softmax(y, scaled) + ops.var(scaled) * ops.mean(ops.square(x))


def temperature():
    model = Temperature()
    model.build((None, 4))
    return compiled(model, None)


def several_outputs():
    inputs = keras.Input((4,))
    hidden = layers.Dropout(0.3)(layers.Dense(8, activation="tanh")(inputs))
    ends = {"a": layers.Dense(2, name="a")(hidden), "b": layers.Dense(3, name="b", activation="sigmoid")(hidden)}
    return compiled(
        keras.Model(inputs, ends | {"unused": layers.Dense(1, name="unused")(hidden)}),
        {"a": correlation, "b": keras.losses.Tversky()},
        loss_weights={"a": 0.3, "b": 2.0},
        metrics={"a": ["mae"], "b": ["mse"]},
    )


def masked():
    inputs = keras.Input((5,), dtype="int32")
    hidden = layers.Dropout(0.3)(layers.Embedding(6, 3, mask_zero=True)(inputs))
    return compiled(keras.Model(inputs, layers.Dense(2)(hidden)), rank_in_batch)


# What it is compared with


class InOrder(keras.Model):
    """Calls a model on one micro-batch after the other, within one gradient of Keras's own train_step."""

    def __init__(self, inner, size):
        super().__init__()
        self.inner, self.size = inner, size

    def call(self, x, training=None):
        parts = [
            self.inner(x[start : start + self.size], training=training) for start in range(0, x.shape[0], self.size)
        ]
        whole = keras.tree.map_structure(lambda *leaves: ops.concatenate(leaves), *parts)
        masks = [None if keras.tree.is_nested(part) else get_keras_mask(part) for part in parts]
        if masks[0] is not None:
            set_keras_mask(whole, ops.concatenate(masks))
        return whole

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        if type(self.inner).compute_loss is keras.Model.compute_loss:
            return super().compute_loss(x, y, y_pred, sample_weight)
        return self.inner.compute_loss(x, y, y_pred, sample_weight)


def in_order(build, data, size=MICRO, **fit):
    """Plain Keras at the effective batch, whose layers see the micro-batches one after the other."""
    keras.utils.set_random_seed(7)
    inner = build()
    model = InOrder(inner, size)
    config = inner.get_compile_config() | {"run_eagerly": BACKEND == "tensorflow"}
    model.compile(
        inner.optimizer,
        inner._compile_loss and inner._compile_loss._user_loss,
        loss_weights=config.get("loss_weights"),
        metrics=inner._compile_metrics and inner._compile_metrics._user_metrics,
        run_eagerly=BACKEND == "tensorflow",
    )
    history = model.fit(verbose=0, shuffle=False, **({"batch_size": EFFECTIVE, "epochs": 2} | data | fit))
    return Trained(inner, history.history)


def two_passes(build, data, size=MICRO, whole_batch_loss="auto", steps=None, **fit):
    keras.utils.set_random_seed(7)
    model = build()
    accumulate(model, None if steps else size, accumulation_steps=steps, whole_batch_loss=whole_batch_loss)
    arguments = {"batch_size": size if steps else EFFECTIVE, "epochs": 2} | data | fit
    return Trained(model, model.fit(verbose=0, shuffle=False, **arguments).history)


def difference(one, other):
    pairs = zip(one.model.variables, other.model.variables, strict=True)
    return max(float(np.max(np.abs(as_array(a) - as_array(b)))) for a, b in pairs if "seed" not in a.path)


def assert_same(accumulated, reference, tolerance=TOLERANCE, history=True):
    """Weights, the optimizer's state, seeds and logs."""
    assert_same_training(accumulated, reference, tolerance, history=False)
    for one, other in zip(accumulated.model.variables, reference.model.variables, strict=True):
        if "seed" in one.path:
            np.testing.assert_array_equal(as_array(one), as_array(other))
    for name, values in reference.history.items() if history else ():
        np.testing.assert_allclose(accumulated.history[name], values, rtol=tolerance * 10, atol=tolerance * 10)


ONE_HOT = np.eye(3)[np.arange(SAMPLES) % 3]
POSITIVE = np.random.default_rng(3).uniform(0.1, 2.0, SAMPLES)
X, PAIRS = {"x": numbers(SAMPLES, 4)}, numbers(SAMPLES, 2, seed=1)

CASES = {
    "contrastive": (embedding(), X | {"y": np.zeros((SAMPLES, 1))}),
    "dice": (outputs(keras.losses.Dice, "sigmoid", 3), X | {"y": ONE_HOT}),
    "tversky": (outputs(keras.losses.Tversky, "sigmoid", 3), X | {"y": ONE_HOT}),
    "circle": (outputs(circle, "tanh"), X | {"y": np.arange(SAMPLES) % 3}),
    "correlation": (outputs(correlation), X | {"y": PAIRS}),
    "weights": (outputs(rank_in_batch), X | {"y": PAIRS, "sample_weight": POSITIVE}),
    "classes": (
        outputs(rank_in_batch, kinds=1, metrics=["mae"]),
        X | {"y": np.arange(SAMPLES) % 3, "class_weight": {0: 1.0, 1: 3.0, 2: 0.5}},
    ),
    # Equal windows: plain Keras does not weigh the logged losses of outputs by the samples of a batch.
    "outputs": (
        several_outputs,
        {"x": X["x"][:16], "y": {"a": PAIRS[:16], "b": ONE_HOT[:16], "unused": PAIRS[:16, :1]}},
    ),
    "masks": (masked, {"x": sequences(), "y": numbers(SAMPLES, 5, 2)}),
    "own-loss": (temperature, X),
}


@pytest.mark.parametrize("name", CASES)
@holds(PROMISE)
def test_it_equals_one_gradient_over_the_micro_batches_in_order(name):
    """And validation, in micro-batches, equals Keras's at the effective batch."""
    build, data = CASES[name]
    arrays = [data[part] for part in ("x", "y", "sample_weight") if part in data]
    validation = {"validation_data": tuple(arrays) if len(arrays) > 1 else None}
    assert_same(two_passes(build, data | validation), in_order(build, data | validation))


@pytest.mark.parametrize("options", [{"run_eagerly": True}, {"steps_per_execution": 2}], ids=str)
@holds(PROMISE)
def test_it_is_exact_however_it_is_run(options):
    data = CASES["contrastive"][1]
    assert_same(two_passes(embedding(**options), data), in_order(embedding(), data), history=False)


@holds(PROMISE)
def test_batches_of_fit_may_be_the_micro_batches():
    """Windows of 9, 9 and 3 samples."""
    build, data = CASES["weights"]
    assert_same(two_passes(build, data, steps=3), in_order(build, data, batch_size=9))


def test_arrays_of_train_on_batch_train_as_tensors_do():
    """On torch, Keras passes arrays on as they are."""
    build, data = CASES["weights"]
    arrays = [array[:EFFECTIVE] for array in data.values()]

    def trained(arrays):
        keras.utils.set_random_seed(7)
        model = accumulate(build(), MICRO)
        losses = [model.train_on_batch(*arrays) for _ in range(2)]
        return Trained(model, {"loss": losses})

    assert_same(trained(arrays), trained([ops.convert_to_tensor(array) for array in arrays]))


def test_a_window_may_have_many_micro_batches():
    data = {"x": numbers(64, 4), "y": np.zeros((64, 1))}
    reference = in_order(embedding(), data, size=1, batch_size=64, epochs=1)
    assert_same(two_passes(embedding(), data, size=1, batch_size=64, epochs=1), reference)


class AddsLoss(layers.Layer):
    def call(self, x):
        self.add_loss(0.3 * ops.mean(ops.square(x)))
        return x


def everything(**compile):
    """What one pass counts once, and sees once; its loss couples no samples."""
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(8, activity_regularizer="l2", kernel_regularizer="l2"),
            layers.BatchNormalization(),
            layers.Dropout(0.3),
            AddsLoss(),
            layers.Dense(2),
        ]
    )
    return compiled(model, "mse", metrics=["mae"], weighted_metrics=["mse"], **compile)


def test_the_rest_of_a_step_is_that_of_one_pass():
    """Regularizers, losses of layers, moving statistics, metrics, random seeds, weights of samples."""
    data = X | {"y": PAIRS, "sample_weight": POSITIVE, "validation_data": (numbers(SAMPLES, 4), PAIRS)}
    one = two_passes(everything, data, whole_batch_loss=False)
    assert_same(two_passes(everything, data, whole_batch_loss=True), one)


@pytest.mark.skipif(BACKEND == "torch", reason="torch.compile takes minutes")
def test_it_is_exact_with_xla():
    """Its random numbers are others than those of the reference, which runs eagerly on TensorFlow."""
    build = functools.partial(everything, jit_compile=True)
    data = X | {"y": PAIRS, "epochs": 1}
    assert_same(two_passes(build, data, whole_batch_loss=True), two_passes(build, data, whole_batch_loss=False))


def test_with_ghost_batches_every_micro_batch_is_the_same_training():
    def build():
        hidden = [layers.Dense(8), layers.BatchNormalization(), layers.Dense(2)]
        model = compiled(keras.Sequential([keras.Input((4,)), *hidden]), correlation)
        return accumulate(model, sizes.pop(), ghost_batch_size=2)

    def train():
        keras.utils.set_random_seed(7)
        model = build()
        return Trained(model, model.fit(**X, y=PAIRS, batch_size=EFFECTIVE, verbose=0, shuffle=False).history)

    sizes = [2, 4, 8]
    plain, *others = train(), train(), train()  # of 8: one pass
    for other in others:
        assert_same(other, plain)


def test_mixed_precision_with_loss_scaling():
    set_precision("float32")
    keras.config.set_dtype_policy("mixed_float16")
    build = embedding(optimizer=None)
    data = {name: np.asarray(value, "float32") for name, value in CASES["contrastive"][1].items()}
    one, other = two_passes(build, data), in_order(build, data)
    assert type(one.model.optimizer).__name__ == "LossScaleOptimizer"
    # Half precision keeps three digits, which each kind of CPU rounds in its own way.
    assert difference(one, other) < 1e-2 < difference(two_passes(build, data, whole_batch_loss=False), other)


# What it is chosen for, and what is left


def test_losses_that_couple_samples_take_two_passes_and_others_one():
    for build, _ in CASES.values():
        model = build()
        assert [item.name for item in batch_coupled_layers(model)]
        accumulate(model, 3)
        assert whole_batch.is_wanted(model)
        assert batch_coupled_layers(model) == []
        accumulate(model, 3, whole_batch_loss=False)
        assert not whole_batch.is_wanted(model)
        assert batch_coupled_layers(model)
    model = accumulate(outputs("mse")(), 3)
    assert not whole_batch.is_wanted(model)
    model.compile("sgd", correlation)
    assert whole_batch.is_wanted(model)
    accumulate(model, 3, whole_batch_loss=True)
    assert accumulation_of(model).whole_batch_loss is True


def test_a_mean_of_micro_batches_is_another_training():
    """The broken way: what accumulation did before."""
    build, data = CASES["correlation"]
    reference = in_order(build, data)
    assert difference(two_passes(build, data, whole_batch_loss=False), reference) > 1e-3
    assert difference(two_passes(build, data), reference) < 1e-9


# Bad input


def fails(error, words, build, data=None, **arguments):
    with pytest.raises(error) as raised:
        two_passes(build, data or X | {"y": PAIRS}, **arguments)
    assert isinstance(raised.value, AccumtuneError) and raised.value.fix
    for word in words:
        assert word in str(raised.value)


def with_layer(layer, loss=correlation, **compile):
    def build():
        return compiled(keras.Sequential([keras.Input((4,)), layer(), layers.Dense(2)]), loss, **compile)

    return build


class Counts(layers.Layer):
    def build(self, shape):
        self.calls = self.add_weight(shape=(), trainable=False, initializer="zeros", name="calls")

    def call(self, x):
        self.calls.assign(self.calls + 1)
        return x * (1 + 0 * self.calls)


class Draws(layers.Layer):
    """Noise that no seed of Keras holds."""

    def call(self, x, training=None):
        return x + np.random.normal(size=x.shape) if training else x  # noqa: NPY002


class Doubles(layers.Layer):
    """Two views of each sample, one batch after the other."""

    def call(self, x):
        return ops.concatenate([x, -x])


class Changes(keras.losses.Loss):
    def __init__(self):
        super().__init__()
        self.center = keras.Variable(np.zeros(2), trainable=False, name="center")

    def call(self, y_true, y_pred):
        self.center.assign(ops.mean(y_pred, axis=0))
        return correlation(y_true, y_pred)


class OwnTestStep(keras.Sequential):
    def test_step(self, *arguments):
        found = super().test_step(*arguments)
        logs = found[0] if isinstance(found, tuple) else found
        logs["twice"] = 2 * logs["loss"]
        return found


def test_a_test_step_of_the_models_own_validates():
    """It gets the batches that it would get with any other loss."""

    def build():
        return compiled(OwnTestStep([keras.Input((4,)), layers.Dense(2)]), correlation)

    data = X | {"y": PAIRS, "validation_data": (*X.values(), PAIRS), "epochs": 2}
    keras.utils.set_random_seed(7)
    options = {"batch_size": EFFECTIVE, "validation_batch_size": MICRO, "shuffle": False, "verbose": 0}
    plain, ours = build().fit(**data, **options).history, two_passes(build, data).history
    assert plain.keys() == ours.keys() and "val_twice" in ours
    for name, values in plain.items():
        np.testing.assert_allclose(ours[name], values, rtol=1e-6)


def test_another_value_is_refused():
    fails(ModelError, ["whole_batch_loss='yes'", '"auto"'], outputs("mse"), whole_batch_loss="yes")


def test_layers_with_a_state_are_refused_by_name():
    fails(ModelError, ["Counts", "'calls'", "run twice"], with_layer(Counts))

    def stateful():
        inputs = keras.Input((5, 2), batch_size=3)
        model = keras.Model(inputs, layers.Dense(2)(layers.SimpleRNN(3, stateful=True, name="remembers")(inputs)))
        return compiled(model, correlation)

    x, y = numbers(6, 5, 2), numbers(6, 2, seed=1)
    fails(ModelError, ["remembers"], stateful, {"x": x, "y": y, "batch_size": 6})


def test_a_loss_that_changes_variables_is_refused():
    fails(ModelError, ["center", "changes the variable"], outputs(Changes))


def test_outputs_that_cannot_be_joined_are_refused():
    fails(ModelError, ["(6, 2) for 3 samples", "axis=1"], with_layer(Doubles, lambda y_true, y_pred: ops.var(y_pred)))

    def of_any_length():
        inputs = keras.Input((None, 2))
        return compiled(keras.Model(inputs, layers.Dense(2)(inputs)), lambda y_true, y_pred: ops.var(y_pred))

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return numbers(3, 4 + index, 2), np.zeros((3, 1))

    fails(DataError, ["(3, 4, 2)", "pad"], of_any_length, {"x": Batches()}, steps=2, batch_size=None)


def test_noise_that_cannot_be_drawn_again_is_refused(monkeypatch):
    """And it is another training: what happens where nothing looks."""
    np.random.seed(0)  # noqa: NPY002
    build = with_layer(Draws, run_eagerly=True)
    fails(ModelError, ["differ by", "SeedGenerator"], build)
    reference = in_order(build, X | {"y": PAIRS})
    monkeypatch.setattr(whole_batch.Replay, "compare", lambda *arguments: None)
    assert difference(two_passes(build, X | {"y": PAIRS}), reference) > 1e-3


class Leaves(layers.Layer):
    """Leaves a tensor of its last call."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2)

    def call(self, x):
        self.z = self.dense(x)
        return self.z * 1


class ReadsLeftovers(keras.Model):
    """Its loss takes what a layer has left, of the model's own call or of another one."""

    def __init__(self, calls_again):
        super().__init__()
        self.leaves, self.calls_again = Leaves(), calls_again

    def call(self, x):
        return self.leaves(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        if self.calls_again:
            self.leaves(x)
        return correlation(y, y_pred) + (ops.mean(self.leaves.z**2) if hasattr(self.leaves, "z") else 0.0)


def reads_leftovers(calls_again=False, **compile):
    def build():
        model = ReadsLeftovers(calls_again)
        model.build((None, 4))
        return compiled(model, None, **compile)

    return build


def at_once(build, data):
    keras.utils.set_random_seed(7)
    model = build()
    history = model.fit(**data, batch_size=EFFECTIVE, epochs=2, verbose=0, shuffle=False).history
    return Trained(model, history)


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}], ids=str)
def test_a_loss_that_reads_what_a_forward_pass_left_is_refused(options, monkeypatch):
    data, build = X | {"y": PAIRS}, reads_leftovers(**options)
    fails(ModelError, ["'z'", "Leaves", "one micro-batch", "y_pred"], build)
    if BACKEND == "torch" or options:  # the broken way: what the last micro-batch has left
        monkeypatch.setattr(Leftovers, "hidden", lambda self: contextlib.nullcontext())
        assert difference(two_passes(build, data), at_once(build, data)) > 1e-3


def test_a_loss_may_run_a_layer_and_read_what_that_has_left():
    data, build = X | {"y": PAIRS}, reads_leftovers(calls_again=True)
    assert_same(two_passes(build, data), at_once(build, data))
