"""The list of what is exact: compares accumulated training with plain Keras at the effective batch."""

import keras
import numpy as np
import pytest
from equality import (
    BACKEND,
    EFFECTIVE,
    FLOAT32,
    FLOAT64,
    REDUCTIONS,
    SAMPLES,
    assert_exact,
    assert_same_training,
    dense,
    numbers,
    regression,
    sequences,
    train,
    weights_with_empty_micro_batches,
)
from keras.src.backend.common import dtypes
from promises import holds

from accumtune.accumulation.losses.whole_batch_loss import chosen_for
from accumtune.memory.machine import device_memory


@pytest.mark.parametrize("micro_batch_size", [1, 3, 4, 8, 9])
@holds("micro-batches of any size, the ragged last window included")
def test_micro_batches_of_any_size(micro_batch_size):
    """Sizes that divide the batch, that do not, that equal it, and that exceed it."""
    assert_exact(dense(metrics=["mae"]), regression(), [micro_batch_size])


@pytest.mark.parametrize("accumulation_steps", [1, 2, 3, 30])
@holds("`accumulation_steps` over batched pipelines, the incomplete last window included")
def test_accumulation_steps_of_any_number(accumulation_steps):
    plain = train(dense(), regression(), batch_size=3 * accumulation_steps)
    joined = train(dense(), regression(), batch_size=3, accumulation_steps=accumulation_steps)
    assert_same_training(joined, plain)


def test_float32():
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    assert_exact(dense(metrics=["mae"]), regression(), [3], tolerance=FLOAT32, epochs=4)


def test_float64_as_keras_has_it(monkeypatch):
    """On JAX and torch Keras computes much in float32 (see precision.py): sums depend on how they are grouped."""
    if BACKEND != "tensorflow":
        monkeypatch.setitem(dtypes.BIT64_TO_BIT32_DTYPE, "float64", "float32")
    is_exact = BACKEND == "tensorflow" or (BACKEND == "jax" and not device_memory().is_gpu)
    tolerance = FLOAT64 if is_exact else 3e-7
    assert_exact(dense(metrics=["mae"]), regression(), [3], tolerance)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", [*REDUCTIONS, "mean"])
@holds("sample weights, class weights, every reduction of a loss")
def test_reductions(reduction, weighted):
    data = regression(sample_weight=weights_with_empty_micro_batches()) if weighted else regression()
    optimizer = lambda: keras.optimizers.SGD(0.02)  # noqa: E731
    assert_exact(dense(keras.losses.MeanSquaredError(reduction=reduction), optimizer, weighted_metrics=["mae"]), data)


@holds("sample weights, class weights, every reduction of a loss")
def test_class_weights():
    labels = np.random.default_rng(3).integers(0, 2, SAMPLES)
    data = {"x": numbers(SAMPLES, 4), "y": labels, "class_weight": {0: 0.3, 1: 2.0}}
    assert_exact(dense(keras.losses.SparseCategoricalCrossentropy(from_logits=True)), data)


# Several outputs


@pytest.mark.parametrize("run_eagerly", [False, True])
@holds("several inputs and outputs, each with its own loss, loss weight and mask")
def test_outputs_with_their_own_losses_weights_and_masks(run_eagerly):
    """In both ways to run: Keras weights the logged losses of outputs by samples only if it knows their number."""

    def build():
        tokens, other = keras.Input((5,), dtype="int32", name="tokens"), keras.Input((4,), name="other")
        x = keras.layers.Embedding(6, 3, mask_zero=True)(tokens)
        tagged = keras.layers.Dense(2, name="tagged")(x)
        total = keras.layers.Dense(1, name="total")(keras.layers.Concatenate()([keras.layers.Flatten()(tagged), other]))
        kind = keras.layers.Dense(3, name="kind")(other)
        model = keras.Model({"tokens": tokens, "other": other}, {"tagged": tagged, "total": total, "kind": kind})
        losses = {
            "tagged": "mae",
            "total": keras.losses.MeanSquaredError(reduction="sum"),
            "kind": keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight"),
        }
        weights = {"tagged": 0.5, "total": 0.1, "kind": 2.0}
        options = {"metrics": {"kind": "accuracy"}, "run_eagerly": run_eagerly}
        model.compile(keras.optimizers.SGD(0.05), losses, loss_weights=weights, **options)
        return model

    weight = weights_with_empty_micro_batches()
    data = {
        "x": {"tokens": sequences(), "other": numbers(SAMPLES, 4)},
        "y": {"tagged": numbers(SAMPLES, 5, 2), "total": numbers(SAMPLES, 1), "kind": np.arange(SAMPLES) % 3},
        "sample_weight": {"tagged": np.repeat(weight[:, None], 5, axis=1), "total": weight, "kind": weight},
    }
    plain = assert_exact(build, data)
    assert {"tagged_loss", "total_loss", "kind_loss", "kind_accuracy"} <= plain.history.keys()


@pytest.mark.parametrize("whole_batch_loss", [False, True])
@holds("compiled, with XLA, eagerly, several steps per execution")
def test_losses_of_outputs_are_logged_as_an_eager_model_logs_them(whole_batch_loss):
    """The last batch of training and of validation is smaller."""

    def build():
        inputs = keras.Input((4,))
        ends = {name: keras.layers.Dense(2, name=name)(inputs) for name in ("a", "b")}
        model = keras.Model(inputs, ends)
        model.compile(keras.optimizers.SGD(0.05), {"a": "mse", "b": "mae"}, run_eagerly=True)
        chosen_for(model, whole_batch_loss)
        return model

    x, y = numbers(SAMPLES, 4), {"a": numbers(SAMPLES, 2, seed=1), "b": numbers(SAMPLES, 2, seed=2)}
    data = {"x": x, "y": y, "validation_data": (x, y)}
    plain = train(build, data)
    assert SAMPLES % EFFECTIVE and {"a_loss", "val_b_loss"} <= plain.history.keys()
    assert_same_training(train(build, data, micro_batch_size=3), plain)


# Losses of layers, regularizers, constraints


class MeanActivity(keras.layers.Layer):
    def call(self, inputs):
        self.add_loss(0.1 * keras.ops.mean(inputs**2))
        return inputs


@pytest.mark.parametrize(
    "layer",
    [
        lambda: keras.layers.Dense(3, kernel_regularizer=keras.regularizers.L1L2(0.01, 0.02)),
        lambda: keras.layers.Dense(3, activity_regularizer=keras.regularizers.L2(0.05)),
        lambda: keras.layers.Dense(3, kernel_constraint=keras.constraints.UnitNorm()),
        lambda: MeanActivity(),
        lambda: keras.layers.LayerNormalization(),
    ],
    ids=["weight-regularizer", "activity-regularizer", "constraint", "add_loss", "layer-normalization"],
)
@holds("regularizers, constraints, and what a layer adds as a mean over samples")
def test_losses_of_layers(layer):
    def build():
        return dense(layers=[layer()])()

    assert_exact(build, regression())


@holds("regularizers, constraints, and what a layer adds as a mean over samples")
def test_a_model_that_has_only_losses_of_its_layers():
    def build():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), MeanActivity()])
        model.compile(keras.optimizers.SGD(0.1))
        return model

    assert_exact(build, {"x": numbers(SAMPLES, 4)})


# Variables


class Unused(keras.layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight(shape=(3,), initializer="ones", name="unused")

    def call(self, inputs):
        return inputs


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@holds("frozen variables, unused variables, embeddings")
def test_unused_and_frozen_variables():
    def build():
        frozen = keras.layers.Dense(4)
        frozen.trainable = False
        return dense(layers=[frozen, Unused()], optimizer=lambda: keras.optimizers.Adam(0.01))()

    assert_exact(build, regression())


@holds("gradients of embeddings are dense (plain Adam on TensorFlow squares the slices of a repeated row apart)")
def test_embeddings_have_dense_gradients_whatever_the_micro_batch():
    """Plain Adam on TensorFlow squares the slices of a repeated row apart; a window does not depend on its parts."""

    def build():
        layers = [keras.layers.Embedding(6, 3), keras.layers.Flatten(), keras.layers.Dense(2)]
        model = keras.Sequential([keras.Input((5,), dtype="int32"), *layers])
        model.compile(keras.optimizers.Adam(0.01), "mse")
        return model

    data = {"x": sequences(), "y": numbers(SAMPLES, 2)}
    whole = train(build, data, micro_batch_size=EFFECTIVE)
    assert_same_training(train(build, data, micro_batch_size=3), whole)
    assert_same_training(train(build, data, batch_size=4, accumulation_steps=2), whole)


# Kinds of models and ways to run


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden = keras.layers.Dense(5, activation="tanh")
        self.out = keras.layers.Dense(2)

    def call(self, inputs):
        return self.out(self.hidden(inputs))


class OwnLoss(Subclassed):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        usual = super().compute_loss(x, y, y_pred, sample_weight, training)
        return usual + 0.1 * keras.ops.mean(keras.ops.abs(y_pred))


@pytest.mark.parametrize("model_class", [Subclassed, OwnLoss])
def test_subclassed_models(model_class):
    def build():
        model = model_class()
        model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
        return model

    assert_exact(build, regression())


def mean_of_everything(y_true, y_pred):
    return keras.ops.mean((y_true - y_pred) ** 2)


def per_sample(y_true, y_pred):
    return keras.ops.sum(keras.ops.abs(y_true - y_pred), axis=-1)


@pytest.mark.parametrize("loss", [mean_of_everything, per_sample])
def test_losses_of_the_user(loss):
    assert_exact(dense(loss), regression())


@pytest.mark.parametrize(
    "how", [{"run_eagerly": True}, {"jit_compile": True}, {"jit_compile": False}, {"steps_per_execution": 2}]
)
@holds("compiled, with XLA, eagerly, several steps per execution")
def test_ways_to_run(how):
    if "jit_compile" in how and BACKEND == "torch":
        pytest.skip("torch.compile needs a C++ compiler")
    if "steps_per_execution" in how and BACKEND == "torch":
        pytest.skip("Keras on torch has no steps_per_execution")
    assert_exact(dense(metrics=["mae"], **how), regression())
