"""The table of what is exact: accumulated training against plain Keras at the effective batch."""

import keras
import numpy as np
import pytest
from equality import (
    BACKEND,
    EFFECTIVE,
    FLOAT32,
    FLOAT64,
    SAMPLES,
    assert_exact,
    assert_same_training,
    dense,
    numbers,
    regression,
    train,
    weights_with_empty_micro_batches,
)
from keras.src.backend import set_keras_mask
from keras.src.backend.common import dtypes
from promises import holds

from accumtune.memory.machine import device_memory

REDUCTIONS = ("sum", "sum_over_batch_size", "mean_with_sample_weight")
EVEN = 16  # where the last, ragged batch is not what is tested: fewer shapes to compile


@pytest.mark.parametrize("micro_batch_size", [1, 3, 4, 8, 9])
@holds("micro-batches of any size, the ragged last window included")
def test_micro_batches_of_any_size(micro_batch_size):
    """Divides the batch or not, equals it, exceeds it."""
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
    """On JAX and torch much of it is float32 (see conftest.py): a sum over a batch differs by how it is grouped."""
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


# Masks


def sequences(vocabulary=6):
    """Sequences of 5, padded with 0 at the end to very different lengths; one micro-batch is padding throughout."""
    random = np.random.default_rng(4)
    tokens = random.integers(1, vocabulary, (SAMPLES, 5))
    for sample, length in enumerate(random.integers(1, 6, SAMPLES)):
        tokens[sample, length:] = 0
    tokens[8:11] = 0
    return tokens


def embedding_model(reduction="sum_over_batch_size"):
    def build():
        inputs = keras.Input((5,), dtype="int32")
        x = keras.layers.Embedding(6, 3, mask_zero=True)(inputs)
        model = keras.Model(inputs, keras.layers.Dense(2)(x))
        model.compile(keras.optimizers.SGD(0.05), keras.losses.MeanSquaredError(reduction=reduction))
        return model

    return build


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@holds("masks, with unequal numbers of valid entries")
def test_masked_sequences(reduction, weighted):
    data = {"x": sequences(), "y": numbers(SAMPLES, 5, 2)}
    if weighted:
        data["sample_weight"] = np.repeat(weights_with_empty_micro_batches()[:, None], 5, axis=1)
    assert_exact(embedding_model(reduction), data)


@holds("masks, with unequal numbers of valid entries")
def test_masking_layer_before_a_recurrent_one():
    def build():
        layers = [keras.layers.Masking(), keras.layers.SimpleRNN(3, return_sequences=True), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input((5, 2)), *layers])
        model.compile(keras.optimizers.SGD(0.1), "mse")
        return model

    x = numbers(SAMPLES, 5, 2) * (sequences() > 0)[:, :, None]
    assert_exact(build, {"x": x, "y": numbers(SAMPLES, 5, 1)})


@holds("masks, with unequal numbers of valid entries")
def test_a_loss_that_masks_its_own_values():
    def build():
        model = keras.Sequential([keras.Input((5, 2)), keras.layers.Dense(3)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0)
        model.compile(keras.optimizers.SGD(0.1), loss)
        return model

    assert_exact(build, {"x": numbers(SAMPLES, 5, 2), "y": np.minimum(sequences(), 2)})


class ExplicitMask(keras.layers.Layer):
    """Sets a mask by hand, as a subclassed model may; the layer says nothing of masks."""

    def call(self, inputs):
        outputs = inputs * 1.0
        set_keras_mask(outputs, inputs[..., 0] > 0)
        return outputs


@holds("masks, with unequal numbers of valid entries")
def test_a_mask_set_by_hand():
    def build():
        model = keras.Sequential([keras.Input((5, 2)), keras.layers.Dense(2), ExplicitMask()])
        model.compile(keras.optimizers.SGD(0.1), "mse")
        return model

    assert_exact(build, {"x": numbers(SAMPLES, 5, 2), "y": numbers(SAMPLES, 5, 2)})


def test_micro_batches_padded_to_different_lengths_count_by_their_tokens():
    """No effective batch could hold these; each value of the loss counts the same all the same."""

    def build():
        model = keras.Sequential([keras.Input((None, 2)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.1), "mse")
        return model

    long, short = numbers(3, 8, 2), numbers(3, 2, 2)
    batches = [(long, long[..., :1]), (short, short[..., :1])]
    joined = train(
        build,
        {"x": (batch for batch in batches)},
        accumulation_steps=2,
        steps_per_epoch=1,
        epochs=1,
        batch_size=None,
    )
    tokens = np.concatenate([long.reshape(-1, 1, 2), short.reshape(-1, 1, 2)])
    flat = train(build, {"x": tokens, "y": tokens[..., :1]}, batch_size=len(tokens), epochs=1)
    assert_same_training(joined, flat)


# Several outputs


@holds("several inputs and outputs, each with its own loss, loss weight and mask")
def test_outputs_with_their_own_losses_weights_and_masks():
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
        model.compile(keras.optimizers.SGD(0.05), losses, loss_weights=weights, metrics={"kind": "accuracy"})
        return model

    weight = weights_with_empty_micro_batches()
    data = {
        "x": {"tokens": sequences(), "other": numbers(SAMPLES, 4)},
        "y": {"tagged": numbers(SAMPLES, 5, 2), "total": numbers(SAMPLES, 1), "kind": np.arange(SAMPLES) % 3},
        "sample_weight": {"tagged": np.repeat(weight[:, None], 5, axis=1), "total": weight, "kind": weight},
    }
    plain = assert_exact(build, data)
    assert {"tagged_loss", "total_loss", "kind_loss", "kind_accuracy"} <= plain.history.keys()


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


# What belongs to the update


def schedule():
    return keras.optimizers.schedules.ExponentialDecay(0.2, decay_steps=2, decay_rate=0.5)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.SGD(0.1, clipnorm=0.05),
        lambda: keras.optimizers.SGD(0.1, clipvalue=0.02),
        lambda: keras.optimizers.SGD(0.1, global_clipnorm=0.05),
        lambda: keras.optimizers.Adam(schedule()),
        lambda: keras.optimizers.Adam(0.05, use_ema=True, ema_momentum=0.5),
        lambda: keras.optimizers.Adam(0.05, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2),
        lambda: keras.optimizers.SGD(0.1, weight_decay=0.1),
        lambda: keras.optimizers.SGD(0.1, loss_scale_factor=128.0),
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), dynamic_growth_steps=2),
    ],
    ids="clipnorm clipvalue global_clipnorm schedule ema ema_overwrite weight_decay scale dynamic_scale".split(),
)
@holds("clipping, schedules, EMA, weight decay and loss scaling, once per update")
def test_what_belongs_to_the_update(optimizer):
    assert_exact(dense(optimizer=optimizer), regression(EVEN))


OPTIMIZERS = (
    "Adadelta Adafactor Adagrad Adam AdamW Adamax Ftrl Lamb Lion Muon Nadam RMSprop SGD ScheduleFreeAdamW".split()
)


@pytest.mark.parametrize("name", OPTIMIZERS)
@holds("every optimizer of `keras.optimizers`")
def test_every_optimizer(name):
    if not hasattr(keras.optimizers, name):
        pytest.skip(f"this Keras has no {name}")

    def build():
        model = dense(optimizer=lambda: getattr(keras.optimizers, name)(0.01))()
        # Left to build it while tracing, plain Keras on TensorFlow starts ScheduleFreeAdamW from zeros.
        model.optimizer.build(model.trainable_variables)
        return model

    plain = train(build, regression(EVEN))
    assert_same_training(train(build, regression(EVEN), micro_batch_size=3), plain)


@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="this Keras has no MultiOptimizer")
@holds("every optimizer of `keras.optimizers`")
def test_an_optimizer_for_some_variables_and_one_for_the_others():
    def build():
        kernels = keras.optimizers.Adam(0.05, clipnorm=0.1, use_ema=True, ema_overwrite_frequency=2)
        biases = keras.optimizers.SGD(schedule(), momentum=0.9)
        choose = lambda variable: kernels if "kernel" in variable.path else biases  # noqa: E731
        return dense(optimizer=lambda: keras.optimizers.MultiOptimizer(choose))()

    assert_exact(build, regression())


def test_every_optimizer_is_in_the_table():
    names = {name for name, value in vars(keras.optimizers).items() if isinstance(value, type)}
    bases_and_wrappers = {"Optimizer", "LossScaleOptimizer", "MultiOptimizer", "OptimizerMap"}
    assert names - bases_and_wrappers <= set(OPTIMIZERS)


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
