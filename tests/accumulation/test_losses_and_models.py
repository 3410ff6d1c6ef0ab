"""Kinds of losses and models: every loss of Keras, losses of a user, and layers that are more than a matrix."""

import keras
import numpy as np
import pytest
from equality import (
    BACKEND,
    EFFECTIVE,
    FLOAT32,
    FLOAT64,
    SAMPLES,
    as_array,
    assert_exact,
    assert_same_training,
    numbers,
    regression,
    train,
)
from keras import layers, losses, ops
from keras.src.backend import set_keras_mask
from promises import holds

from accumtune.accumulation import accumulate, batch_coupled_layers
from accumtune.memory.machine import device_memory


def assert_same_after_one_window(build, data, tolerance=FLOAT64):
    """One window of 3 + 3 + 2 samples: fewer shapes to compile than `assert_exact` has."""
    data = keras.tree.map_structure(lambda array: array[:EFFECTIVE], data)
    plain = train(build, data, epochs=1)
    assert_same_training(train(build, data, micro_batch_size=3, epochs=1), plain, tolerance)
    assert batch_coupled_layers(plain.model) == []


def positive(*shape):
    return np.random.default_rng(3).uniform(0.1, 0.9, shape)


SIGNS = np.sign(positive(SAMPLES, 3) - 0.5)
CLASSES = np.arange(SAMPLES) % 3
ONE_HOT = np.eye(3)[CLASSES]

# Arguments of the loss, the activation of the outputs, the targets.
LOSSES = {
    "BinaryCrossentropy": ({"label_smoothing": 0.1}, "sigmoid", ONE_HOT),
    "BinaryFocalCrossentropy": ({"apply_class_balancing": True}, "sigmoid", ONE_HOT),
    "CategoricalCrossentropy": ({"label_smoothing": 0.1}, "softmax", ONE_HOT),
    "CategoricalFocalCrossentropy": ({}, "softmax", ONE_HOT),
    "CategoricalGeneralizedCrossEntropy": ({}, "softmax", CLASSES),
    "CategoricalHinge": ({}, None, ONE_HOT),
    "CosineSimilarity": ({}, None, positive(SAMPLES, 3)),
    "Dice": ({"axis": -1}, "softmax", ONE_HOT),
    "Hinge": ({}, "tanh", SIGNS),
    "Huber": ({"delta": 0.3}, None, positive(SAMPLES, 3)),
    "KLDivergence": ({}, "softmax", positive(SAMPLES, 3)),
    "LogCosh": ({}, None, positive(SAMPLES, 3)),
    "MeanAbsoluteError": ({}, None, positive(SAMPLES, 3)),
    "MeanAbsolutePercentageError": ({}, "softplus", positive(SAMPLES, 3)),
    "MeanSquaredError": ({}, None, positive(SAMPLES, 3)),
    "MeanSquaredLogarithmicError": ({}, "softplus", positive(SAMPLES, 3)),
    "Poisson": ({}, "softplus", positive(SAMPLES, 3)),
    "SparseCategoricalCrossentropy": ({}, "softmax", CLASSES),
    "SquaredHinge": ({}, "tanh", SIGNS),
    "Tversky": ({"axis": (1,)}, "softmax", ONE_HOT),
}


@pytest.mark.parametrize("name", LOSSES)
@holds("every loss of `keras.losses` and of your own that is a mean or a sum over samples or tokens")
def test_every_loss(name):
    if not hasattr(losses, name):
        pytest.skip(f"this Keras has no {name}")
    arguments, activation, y = LOSSES[name]

    def build():
        model = keras.Sequential([keras.Input((4,)), layers.Dense(3, activation=activation)])
        model.compile(keras.optimizers.SGD(0.05), getattr(losses, name)(**arguments))
        return model

    assert_same_after_one_window(build, {"x": numbers(SAMPLES, 4), "y": y})


@holds("every loss of `keras.losses` and of your own that is a mean or a sum over samples or tokens")
def test_ctc():
    def build():
        model = keras.Sequential([keras.Input((6, 4)), layers.Dense(5)])
        model.compile(keras.optimizers.SGD(0.05), losses.CTC())
        return model

    labels = np.random.default_rng(0).integers(1, 5, (SAMPLES, 3))
    tolerance = FLOAT32 if BACKEND == "tensorflow" else FLOAT64  # TensorFlow computes it in float32
    assert_same_after_one_window(build, {"x": numbers(SAMPLES, 6, 4), "y": labels}, tolerance)


def test_every_loss_is_in_the_table():
    """But the base class, CTC (above) and Circle, which compares samples."""
    names = {name for name, value in vars(losses).items() if isinstance(value, type)}
    assert names - {"Loss", "CTC", "Circle"} <= set(LOSSES)


# Losses of a user


class Tokens(losses.Loss):
    """A value for each number of an output: finer than one per sample."""

    def call(self, y_true, y_pred):
        return ops.square(y_true - y_pred)


class OwnMask(losses.Loss):
    """Leaves out samples, few in one micro-batch and many in another."""

    def call(self, y_true, y_pred):
        values = ops.mean(ops.square(y_true - y_pred), axis=-1)
        set_keras_mask(values, y_true[:, 0] > 0.3)
        return values


class ScalarSum(losses.Loss):
    """One number per batch; as a sum it is exact."""

    def call(self, y_true, y_pred):
        return ops.sum(ops.square(y_true - y_pred))


@pytest.mark.parametrize(
    "loss",
    [Tokens, lambda: Tokens(reduction="mean_with_sample_weight"), OwnMask, lambda: ScalarSum(reduction="sum")],
    ids=["tokens", "tokens-by-weight", "own-mask", "scalar-sum"],
)
@holds("every loss of `keras.losses` and of your own that is a mean or a sum over samples or tokens")
def test_losses_of_a_user(loss):
    def build():
        model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
        model.compile(keras.optimizers.SGD(0.05), loss())
        return model

    weights = {"sample_weight": positive(SAMPLES, 2)} if isinstance(loss(), Tokens) else {}
    assert_exact(build, regression(**weights))
    assert batch_coupled_layers(build()) == []


class MaskOfPredictions(losses.Loss):
    """Leaves out what the model is far off; what it divides by depends on the predictions."""

    def call(self, y_true, y_pred):
        values = ops.mean(ops.square(y_true - y_pred), axis=-1)
        set_keras_mask(values, values < 1.5)
        return values


class WrittenMask(losses.Loss):
    """The same, put together in place."""

    def call(self, y_true, y_pred):
        values = ops.mean(ops.square(y_true - y_pred), axis=-1)
        mask = ops.convert_to_tensor([True] * len(values))
        mask[ops.stop_gradient(values) > 1.5] = False
        set_keras_mask(values, mask)
        return values


class CountsCalls(layers.Layer):
    calls = 0

    def call(self, inputs):
        type(self).calls += 1
        return inputs


@pytest.mark.skipif(BACKEND != "torch", reason="elsewhere a compiler leaves out what is not needed")
@pytest.mark.parametrize(
    ("loss", "forward_passes"),
    [(Tokens, 3), (OwnMask, 3), (MaskOfPredictions, 6), (WrittenMask, 6)],
)
def test_a_denominator_takes_a_forward_pass_where_it_depends_on_predictions_alone(loss, forward_passes):
    def build():
        model = keras.Sequential([keras.Input((4,)), CountsCalls(), layers.Dense(2)])
        model.compile(keras.optimizers.SGD(0.05), loss())
        return model

    data = {name: array[:EFFECTIVE] for name, array in regression().items()}
    plain, ours = train(build, data), train(build, data, micro_batch_size=3)
    assert_same_training(ours, plain)
    before = CountsCalls.calls
    ours.model.fit(**data, batch_size=EFFECTIVE, verbose=0, shuffle=False)
    assert CountsCalls.calls - before == forward_passes


def test_metrics_see_every_sample_once():
    def build():
        model = keras.Sequential([keras.Input((4,)), layers.Dense(1, activation="sigmoid")])
        metrics = ["AUC", keras.metrics.Precision(name="precision"), keras.metrics.F1Score(threshold=0.5)]
        model.compile(keras.optimizers.SGD(0.05), "binary_crossentropy", metrics=metrics, weighted_metrics=["mae"])
        return model

    data = {"x": numbers(SAMPLES, 4), "y": np.round(positive(SAMPLES, 1)), "sample_weight": positive(SAMPLES)}
    assert_exact(build, data)


# Models


def functional(body, shape=(4,)):
    def build():
        inputs = keras.Input(shape)
        outputs = layers.Dense(2)(layers.Flatten()(body(inputs)))
        model = keras.Model(inputs, outputs)
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
        return model

    return build


def nested_and_shared(inputs):
    shared = layers.Dense(4, activation="tanh")
    block = keras.Sequential([keras.Input((4,)), layers.Dense(3, activation="relu"), layers.Dense(4)])
    return shared(block(shared(inputs))) + ops.tanh(block(inputs))


class DrawsNumbers(layers.Layer):
    """Has seeds of its own, and a constant that is no weight to train."""

    def build(self, shape):
        self.seeds = keras.random.SeedGenerator(1)
        self.constant = self.add_weight(shape=(shape[-1],), initializer="ones", trainable=False)

    def call(self, inputs, training=None):
        noise = keras.random.normal(ops.shape(inputs), seed=self.seeds) if training else 0.0
        return inputs * self.constant + 0.0 * noise


VECTORS = {
    "nested-and-shared": nested_and_shared,
    "lambda": lambda x: layers.Lambda(lambda t: t * t)(layers.Dense(3)(x)),
    "group-normalization": lambda x: layers.GroupNormalization(1)(layers.Dense(3)(x)),
    "rms-normalization": lambda x: layers.RMSNormalization()(layers.Dense(3)(x)),
    "unit-normalization": lambda x: layers.UnitNormalization()(layers.Dense(3)(x)),
    "frozen-batch-normalization": lambda x: layers.BatchNormalization(trainable=False)(layers.Dense(3)(x)),
    "seeds-and-constants": lambda x: DrawsNumbers()(layers.Dense(3)(x)),
}
SEQUENCES = {
    "attention": lambda x: layers.MultiHeadAttention(2, 3)(x, x),
    "lstm": lambda x: layers.Bidirectional(layers.LSTM(2))(x),
    "time-distributed": lambda x: layers.TimeDistributed(layers.Dense(3))(x),
    "convolution": lambda x: layers.SeparableConv1D(3, 2)(x),
}


@pytest.mark.parametrize("name", [*VECTORS, *SEQUENCES])
def test_layers(name):
    if name == "lstm" and BACKEND == "jax" and device_memory().is_gpu:
        pytest.skip("Keras hands cuDNN float32 buffers for a float64 LSTM: plain fit fails too (Keras 3.15, JAX 0.11)")
    if name in VECTORS:
        build, x = functional(VECTORS[name]), numbers(SAMPLES, 4)
    else:
        build, x = functional(SEQUENCES[name], (5, 4)), numbers(SAMPLES, 5, 4)
    assert_same_after_one_window(build, {"x": x, "y": numbers(SAMPLES, 2, seed=1)})


def test_low_rank_adaptation():
    """Frozen kernels beside small trainable ones, made after the model; Keras has them in float32."""

    def build():
        model = functional(lambda x: layers.Dense(4, name="adapted")(x))()
        model.get_layer("adapted").enable_lora(2)
        model.compile(keras.optimizers.SGD(0.05), "mse")
        return model

    assert_same_after_one_window(build, regression(), FLOAT32)


@holds("several inputs and outputs, each with its own loss, loss weight and mask")
def test_lists_of_inputs_and_outputs_of_which_one_has_no_loss():
    def build():
        inputs = [keras.Input((4,)), keras.Input((4,))]
        both = layers.Concatenate()(inputs)
        model = keras.Model(inputs, [layers.Dense(2)(both), layers.Dense(1)(both)])
        model.compile(keras.optimizers.SGD(0.05), ["mse", None])
        return model

    data = regression()
    assert_same_after_one_window(build, {"x": [data["x"], 2 * data["x"]], "y": [data["y"], data["y"][:, :1]]})


class DictionaryModel(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden, self.out = layers.Dense(3), layers.Dense(2)

    def call(self, inputs):
        return {"one": self.out(self.hidden(inputs["p"])), "other": self.hidden(inputs["q"])}


def test_a_subclassed_model_of_dictionaries():
    def build():
        model = DictionaryModel()
        model.compile(keras.optimizers.SGD(0.05), {"one": "mse", "other": "mae"}, loss_weights={"one": 2, "other": 1})
        return model

    x = numbers(SAMPLES, 4)
    y = {"one": numbers(SAMPLES, 2, seed=1), "other": numbers(SAMPLES, 3, seed=2)}
    assert_same_after_one_window(build, {"x": {"p": x, "q": 2 * x}, "y": y})


class PlusIfThere(keras.layers.Layer):
    """Adds what a layer of its own makes of the second input, where there is one."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(2)

    def build(self, *shapes):
        self.dense.build((None, 2))

    def call(self, x, optional=None):
        return x if optional is None else x + self.dense(optional)


def with_an_optional_input():
    optional, x = keras.Input((2,), name="optional", optional=True), keras.Input((2,), name="x")
    model = keras.Model({"optional": optional, "x": x}, keras.layers.Dense(2)(PlusIfThere()(x, optional)))
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    return model


@pytest.mark.skipif(BACKEND == "jax", reason="Keras's own generators cannot give None on JAX")
def test_an_input_that_is_none_in_some_batches():
    """What gets no gradient in a window gets none of the window before."""
    given, x, y = numbers(3, 8, 2)

    def batches():
        for optional in (None, given, None, given):
            yield {"optional": optional, "x": x}, y

    def run(size):
        keras.utils.set_random_seed(2)
        model = with_an_optional_input()
        if size:
            accumulate(model, size)
        for batch in batches():
            model.train_on_batch(*batch)
        return [as_array(v) for v in (*model.variables, *model.optimizer.variables)]

    for one, other in zip(run(3), run(None), strict=True):
        np.testing.assert_allclose(one, other, rtol=FLOAT64, atol=FLOAT64)
