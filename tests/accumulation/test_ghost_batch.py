"""BatchNormalization in ghost batches: one training for every micro-batch that is a multiple of a group."""

import functools

import keras
import numpy as np
import pytest
from equality import BACKEND, FLOAT64, SAMPLES, as_array, assert_same_training, largest_difference, numbers, train
from keras import layers, ops
from promises import holds

import accumtune
from accumtune.errors import BatchSizeError, ModelError

GHOST = 4
EFFECTIVE = 16  # windows of 16 and 5: the last one has a group of 4 and one of 1
TOLERANCE = FLOAT64 if BACKEND == "tensorflow" else 3e-7  # as plain Keras has it, compiled and not


class DropsByContent(layers.Layer):
    """A dropout whose mask follows a sample wherever it is; it draws from a seed all the same."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(3)

    def call(self, inputs, training=None):
        if not training:
            return inputs
        keras.random.uniform(ops.shape(inputs), seed=self.seed_generator)
        return ops.where(ops.sin(ops.stop_gradient(inputs) * 1e4) > -0.5, inputs * 1.5, ops.zeros_like(inputs))


def image_model(data_format="channels_last", axis=-1, **normalization):
    """A convolution, a depthwise one, a dense layer, each normalized."""

    def build():
        shape = (6, 5, 2) if data_format == "channels_last" else (2, 6, 5)
        inputs = keras.Input(shape)
        kind = {"data_format": data_format, "use_bias": False}
        x = inputs
        if axis in (-1, 3) or BACKEND != "tensorflow":  # no convolution of TensorFlow's on a CPU has channels first
            x = layers.Conv2D(4, 3, **kind)(x)
            x = layers.BatchNormalization(axis=axis, momentum=0.9, **normalization)(x)
            x = layers.DepthwiseConv2D(2, **kind)(layers.Activation("relu")(x))
        x = layers.BatchNormalization(axis=axis, momentum=0.8, **normalization)(x)
        x = DropsByContent()(layers.Flatten()(x))
        x = layers.BatchNormalization(momentum=0.5)(layers.Dense(3)(x))
        model = keras.Model(inputs, layers.Dense(2)(layers.Activation("tanh")(x)))
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", metrics=["mae"])
        return model

    return build, {"x": numbers(SAMPLES, *build_shape(data_format)) * 2 + 1, "y": numbers(SAMPLES, 2, seed=1)}


def build_shape(data_format):
    return (6, 5, 2) if data_format == "channels_last" else (2, 6, 5)


def sequence_model():
    """Masked sequences; whole groups are padding."""

    def build():
        inputs = keras.Input((5, 3))
        x = layers.BatchNormalization(momentum=0.9)(layers.Masking()(inputs))
        model = keras.Model(inputs, layers.Dense(2)(layers.Dense(4, activation="tanh")(x)))
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
        return model

    x = numbers(SAMPLES, 5, 3) + 1
    x[np.arange(SAMPLES) % 3 == 0, 2:] = 0
    x[4:8] = 0
    return build, {"x": x, "y": numbers(SAMPLES, 5, 2, seed=1)}


def trained(build, data, ghost_batch_size=GHOST, micro_batch_size=None, accumulation_steps=None, **fit):
    def accumulating():
        model = build()
        return accumtune.accumulate(
            model, micro_batch_size, accumulation_steps=accumulation_steps, ghost_batch_size=ghost_batch_size
        )

    return train(accumulating, data, **({"batch_size": EFFECTIVE} | fit))


MODELS = {
    "channels-last": image_model(),
    "channels-first": image_model("channels_first", axis=1),
    "another-axis": image_model(axis=2),
    "without-gamma-and-beta": image_model(center=False, scale=False),
    "masked": sequence_model(),
}


NAMES = [name if name != "channels-first" else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


@pytest.mark.parametrize("name", NAMES)
@holds("BatchNormalization with `ghost_batch_size`: every micro-batch that is a multiple of it")
def test_every_micro_batch_is_the_same_training(name):
    whole = trained(*MODELS[name], micro_batch_size=EFFECTIVE)
    for how in (
        {"micro_batch_size": GHOST},
        {"micro_batch_size": 2 * GHOST},
        {"micro_batch_size": 3 * GHOST},  # leaves one group
        {"accumulation_steps": 2, "batch_size": EFFECTIVE // 2},
    ):
        assert_same_training(trained(*MODELS[name], **how), whole, TOLERANCE)


@pytest.mark.parametrize("how", [{"run_eagerly": True}, {"jit_compile": True}] if BACKEND == "tensorflow" else [])
def test_compiled_in_other_ways(how):
    """XLA compiles a rest of a window, whose size the graph does not know."""
    build, data = MODELS["channels-last"]

    def compiled():
        model = build()
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", metrics=["mae"], **how)
        return model

    whole = trained(build, data, micro_batch_size=EFFECTIVE)
    assert_same_training(trained(compiled, data, micro_batch_size=2 * GHOST), whole, TOLERANCE)


def test_without_a_ghost_batch_micro_batches_differ():
    """Negative control."""
    build, data = MODELS["channels-last"]
    whole = trained(build, data, ghost_batch_size=None, micro_batch_size=EFFECTIVE)
    parts = trained(build, data, ghost_batch_size=None, micro_batch_size=GHOST)
    assert largest_difference(parts, whole) > 1e-3


def test_groups_of_one_window_are_those_of_micro_batches():
    """What plain accumulation normalizes together at a micro-batch of 4 is what a window in one pass does."""
    build, data = MODELS["channels-last"]
    plain = trained(build, data, ghost_batch_size=None, micro_batch_size=GHOST)
    assert_same_training(trained(build, data, micro_batch_size=EFFECTIVE), plain, TOLERANCE)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="shapes are always known")
@pytest.mark.parametrize("is_masked", [False, True])
def test_shapes_that_are_not_known_as_a_step_is_traced(is_masked):
    """The rest of a micro-batch is found as it runs. It may be empty, and so may the micro-batch (of a replica)."""
    import tensorflow as tf

    from accumtune.accumulation import moving_statistics
    from accumtune.accumulation.ghost_batch import GhostBatches
    from accumtune.accumulation.window import Accumulation

    layer = layers.BatchNormalization(axis=-1 if is_masked else 1)
    model = keras.Sequential([keras.Input((5, 3)), layer])
    ghosts = GhostBatches(model, Accumulation(2 * GHOST, ghost_batch_size=GHOST))

    def step(x, mask):
        with ghosts.active(), moving_statistics.recorded(model) as notes, tf.GradientTape() as tape:
            tape.watch(x)
            outputs = layer(x, training=True, mask=mask if is_masked else None)
            loss = tf.reduce_sum(outputs**3)
        (noted,) = notes.mine()
        gradients = tape.gradient(loss, [x, layer.gamma.value, layer.beta.value])
        return outputs, gradients, noted.mean, noted.variance

    signature = [tf.TensorSpec([None, None, 3], tf.float64), tf.TensorSpec([None, None], tf.bool)]
    if not is_masked:
        signature[0] = tf.TensorSpec([None, 5, None], tf.float64)
    unknown = tf.function(step, input_signature=signature)
    for samples in (0, 1, GHOST, GHOST + 1, 3 * GHOST):
        x = tf.constant(numbers(samples, 5, 3))
        mask = tf.constant(numbers(samples, 5, seed=1) > 0)
        result = tf.nest.flatten(unknown(x, mask))
        assert all(np.isfinite(as_array(value)).all() for value in result)
        if samples > GHOST:
            for one, other in zip(result, tf.nest.flatten(tf.function(step)(x, mask)), strict=True):
                np.testing.assert_allclose(one, other, rtol=FLOAT64, atol=FLOAT64)


def test_the_gradient_is_the_one_of_automatic_differentiation():
    """Two steps of Keras's own normalization on groups, the gradients added up."""
    build, data = MODELS["channels-last"]
    one_window = {name: values[: 2 * GHOST] for name, values in data.items()}
    ours = trained(build, one_window, micro_batch_size=2 * GHOST, epochs=1)
    plain = trained(build, one_window, ghost_batch_size=None, micro_batch_size=GHOST, epochs=1)
    assert_same_training(ours, plain, TOLERANCE)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="its allocator counts")
def test_groups_take_no_more_memory_than_plain_normalization(value_in_child):
    """TensorFlow's own differentiation of the same formula would keep each layer's inputs twice."""

    def peak(ghost_batch_size, has_own_gradient=True):
        import keras
        import numpy as np
        import tensorflow as tf

        from accumtune.accumulation import accumulate
        from accumtune.memory.device import open_device

        device = open_device("tensorflow")
        if not has_own_gradient:
            tf.custom_gradient = lambda function: lambda *arguments: function(*arguments)[0]
            tf.stop_gradient = tf.identity
        inputs = x = keras.Input((64, 64, 3))
        for _ in range(4):
            x = keras.layers.Dense(8, use_bias=False)(x)
            x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
        model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x))
        model.compile("sgd", "mse")
        accumulate(model, 16, ghost_batch_size=ghost_batch_size)
        device.reset_peak()
        model.train_on_batch(np.zeros((32, 64, 64, 3), "float32"), np.zeros((32, 8), "float32"))
        return device.peak_memory_bytes()

    plain, ghost, differentiated = (value_in_child(peak, *how) for how in ((None,), (4,), (4, False)))
    assert ghost <= 1.02 * plain
    assert differentiated > 1.1 * plain


def test_with_a_loss_over_the_batch():
    """Both passes of such a loss normalize in the same groups; the statistics are noted once."""

    def build(micro_batch_size):
        inputs = keras.Input((4,))
        x = layers.BatchNormalization(momentum=0.9)(layers.Dense(5)(inputs))
        model = keras.Model(inputs, layers.Dense(2, activation="sigmoid")(DropsByContent()(x)))
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), keras.losses.Dice())
        return accumtune.accumulate(model, micro_batch_size, ghost_batch_size=GHOST, whole_batch_loss=True)

    data = {"x": numbers(SAMPLES, 4), "y": (numbers(SAMPLES, 2, seed=1) > 0).astype("float64")}
    whole, parts = (
        train(functools.partial(build, size), data, batch_size=EFFECTIVE) for size in (EFFECTIVE, GHOST)
    )
    assert_same_training(parts, whole, TOLERANCE)


def test_mixed_precision_keeps_float32_statistics():
    """The moments of float16 inputs would overflow."""
    keras.config.set_dtype_policy("mixed_float16")

    def build():
        inputs = keras.Input((4,), dtype="float32")
        x = layers.BatchNormalization(momentum=0.5)(layers.Rescaling(1e4, dtype="mixed_float16")(inputs))
        model = keras.Model(inputs, layers.Dense(2, dtype="float32")(x))
        model.compile(keras.optimizers.SGD(0.1), "mse")
        return model

    data = {"x": numbers(SAMPLES, 4).astype("float32"), "y": numbers(SAMPLES, 2).astype("float32")}
    whole, parts = (trained(build, data, micro_batch_size=size) for size in (EFFECTIVE, GHOST))
    assert largest_difference(parts, whole) < 1e-3
    variance = next(v for v in whole.model.variables if "moving_variance" in v.path)
    assert as_array(variance).min() > 1e6


def test_a_frozen_normalization_is_untouched():
    def build():
        inputs = keras.Input((4,))
        x = layers.BatchNormalization(trainable=False)(inputs)
        model = keras.Model(inputs, layers.Dense(2)(layers.BatchNormalization()(x)))
        model.compile(keras.optimizers.SGD(0.1), "mse")
        return model

    data = {"x": numbers(SAMPLES, 4) * 3, "y": numbers(SAMPLES, 2)}
    ours = trained(build, data, micro_batch_size=2 * GHOST)
    np.testing.assert_array_equal(as_array(ours.model.layers[1].moving_mean), np.zeros(4))
    assert np.abs(as_array(ours.model.layers[2].moving_mean)).max() > 0


def test_what_is_left_behind_is_plain_keras(tmp_path):
    """Inference, calls by hand, saving, cloning; and training after `stop_accumulating`."""
    build, data = MODELS["channels-last"]
    model = trained(build, data, micro_batch_size=2 * GHOST).model
    assert not any("call" in vars(layer) for layer in model.layers)
    x = data["x"]
    plain = build()
    plain.set_weights(model.get_weights())
    for training in (False, True):
        np.testing.assert_allclose(
            as_array(model(x, training=training)), as_array(plain(x, training=training)), rtol=TOLERANCE, atol=1e-7
        )
    model.save(tmp_path / "model.keras")
    custom = {"DropsByContent": DropsByContent}
    loaded = keras.models.load_model(tmp_path / "model.keras", custom_objects=custom)
    for copy in (loaded, keras.models.clone_model(model)):
        assert accumtune.accumulation.accumulation_of(copy) is None
        assert not any("call" in vars(layer) for layer in copy.layers)

    def stopped():
        return accumtune.accumulation.stop_accumulating(
            accumtune.accumulate(build(), micro_batch_size=2 * GHOST, ghost_batch_size=GHOST)
        )

    assert_same_training(train(stopped, data), train(build, data), TOLERANCE)


@pytest.mark.parametrize("size", [0, -4, 2.5, True, "8"])
def test_a_ghost_batch_that_is_no_number_of_samples(size):
    with pytest.raises(BatchSizeError, match="ghost_batch_size"):
        accumtune.accumulate(MODELS["masked"][0](), micro_batch_size=8, ghost_batch_size=size)


@pytest.mark.parametrize("micro_batch_size", [12, 4])
def test_a_micro_batch_that_would_divide_a_group(micro_batch_size):
    with pytest.raises(BatchSizeError, match=f"{micro_batch_size} samples and ghost_batch_size=8"):
        accumtune.accumulate(MODELS["masked"][0](), micro_batch_size=micro_batch_size, ghost_batch_size=8)


def test_batches_of_fit_that_would_divide_a_group():
    with pytest.raises(BatchSizeError, match="6 samples and ghost_batch_size=4"):
        trained(*MODELS["masked"], accumulation_steps=2, batch_size=6)


def sequence_data():
    return {"x": numbers(SAMPLES, 5, 3), "y": numbers(SAMPLES, 5, 2, seed=1)}


def of_sequences(*inner):
    def build():
        model = keras.Sequential([keras.Input((5, 3)), *(make() for make in inner), layers.Dense(2)])
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
        return model

    return build


def tower():
    return keras.Sequential([keras.Input((3,)), layers.Dense(4), layers.BatchNormalization(momentum=0.9)])


class Cell(layers.Layer):
    """A cell of an RNN, with a normalization."""

    state_size = output_size = 3

    def build(self, shape):
        self.dense, self.normalization = layers.Dense(3), layers.BatchNormalization()
        self.dense.build(shape)
        self.normalization.build((None, 3))

    def call(self, inputs, states, training=None):
        state = ops.tanh(self.normalization(self.dense(inputs) + states[0], training=training))
        return state, [state]


@pytest.mark.parametrize(
    "inner",
    [
        lambda: layers.TimeDistributed(layers.BatchNormalization(momentum=0.9)),  # one after the other, all steps
        lambda: layers.TimeDistributed(tower()),
        lambda: layers.RNN(Cell(), return_sequences=True, unroll=True),
    ],
)
def test_a_normalization_that_runs_once_for_each_time_step(inner):
    whole = trained(of_sequences(inner), sequence_data(), micro_batch_size=EFFECTIVE)
    parts = trained(of_sequences(inner), sequence_data(), micro_batch_size=GHOST)
    assert_same_training(parts, whole, TOLERANCE)


def test_a_nested_model_that_is_used_twice():
    def build():
        inner, inputs = tower(), [keras.Input((3,)), keras.Input((3,))]
        model = keras.Model(inputs, layers.Dense(2)(layers.Subtract()([inner(one) for one in inputs])))
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
        return model

    data = {"x": [numbers(SAMPLES, 3), numbers(SAMPLES, 3, seed=2) + 2], "y": numbers(SAMPLES, 2, seed=1)}
    whole, parts = (trained(build, data, micro_batch_size=size) for size in (EFFECTIVE, GHOST))
    assert_same_training(parts, whole, TOLERANCE)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="its own loops and functions")
def test_a_normalization_in_a_loop_is_refused_with_the_way_out():
    build = of_sequences(lambda: layers.RNN(Cell(), return_sequences=True))
    with pytest.raises(ModelError, match=r"in a loop(.|\n)*Fix: unroll"):
        trained(build, sequence_data(), micro_batch_size=GHOST)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="its own loops and functions")
def test_a_layer_whose_call_is_a_function():
    """Plain training has traced it before, with plain normalization."""
    import tensorflow as tf

    class Block(layers.Layer):
        def build(self, shape):
            self.normalization = layers.BatchNormalization(momentum=0.9)
            self.normalization.build(shape)

        def call(self, inputs, training=None):
            return tf.tanh(self.normalization(inputs, training=training))

    class Function(Block):
        call = tf.function(Block.call)

    def build():
        model = of_sequences(Function)()
        weights = model.get_weights()
        data = sequence_data()
        for size in (GHOST, EFFECTIVE):
            model.fit(data["x"][:size], data["y"][:size], batch_size=size, verbose=0)
        model.set_weights(weights)
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
        return model

    whole = trained(of_sequences(Block), sequence_data(), micro_batch_size=EFFECTIVE)
    for size in (EFFECTIVE, GHOST):
        assert_same_training(trained(build, sequence_data(), micro_batch_size=size), whole, TOLERANCE)


class OwnCall(layers.BatchNormalization):
    def call(self, inputs, training=None, mask=None):
        return super().call(inputs, training=training, mask=mask)


class OwnMoments(layers.BatchNormalization):
    def _moments(self, inputs, mask):
        return super()._moments(inputs, mask)


class OnlyAName(layers.BatchNormalization):
    pass


def with_normalization(normalization, *before):
    def build():
        model = keras.Sequential([keras.Input((4,)), *before, normalization, layers.Flatten(), layers.Dense(2)])
        model.compile(keras.optimizers.SGD(0.1), "mse")
        return model

    return build


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: OwnCall(name="mine"), "mine.*OwnCall.*its own call"),
        (lambda: OwnMoments(name="mine"), "mine.*OwnMoments.*its own _moments"),
        (lambda: layers.BatchNormalization(renorm=True, name="mine"), "mine.*renorm=True"),
    ],
)
def test_normalizations_that_cannot_work_in_groups(make, reason):
    with pytest.raises(ModelError, match=reason):
        accumtune.accumulate(with_normalization(make())(), micro_batch_size=8, ghost_batch_size=4)
    frozen = make()
    frozen.trainable = False
    accumtune.accumulate(with_normalization(frozen)(), micro_batch_size=8, ghost_batch_size=4)
    accumtune.accumulate(with_normalization(OnlyAName())(), micro_batch_size=8, ghost_batch_size=4)


@pytest.mark.parametrize("micro_batch_size", [GHOST, 2 * GHOST])
def test_rows_that_are_no_samples(micro_batch_size):
    """If the first axis is not that of the samples, the sample of a row is unknown."""

    def folded():
        inputs = keras.Input((4,))
        x = layers.Lambda(lambda x: ops.reshape(x, (-1, 2)), output_shape=(2,))(inputs)
        x = layers.BatchNormalization(name="mine")(x)
        x = layers.Lambda(lambda x: ops.reshape(x, (-1, 4)), output_shape=(4,))(x)
        model = keras.Model(inputs, layers.Dense(2)(x))
        model.compile(keras.optimizers.SGD(0.1), "mse")
        return model

    data = {"x": numbers(SAMPLES, 4), "y": numbers(SAMPLES, 2)}
    with pytest.raises(ModelError, match="mine.*rows where the micro-batch has"):
        trained(folded, data, micro_batch_size=micro_batch_size)


@pytest.mark.parametrize("is_trained_first", [True, False])
def test_a_normalization_that_runs_in_both_modes(is_trained_first):
    """Moving statistics move once per update, which a pass with training=False may only follow in plain Keras."""

    class Both(keras.Model):
        def __init__(self):
            super().__init__()
            self.mine, self.last = layers.BatchNormalization(momentum=0.5, name="mine"), layers.Dense(2)

        def call(self, inputs, training=None):
            modes = (training, False) if is_trained_first else (False, training)
            one, other = (self.mine(inputs, training=mode) for mode in modes)
            return self.last(one + other)

    def build():
        model = Both()
        model.compile(keras.optimizers.SGD(0.01), "mse")
        return model

    data = {"x": numbers(SAMPLES, 4), "y": numbers(SAMPLES, 2, seed=1)}
    if is_trained_first:
        for micro_batch_size in (GHOST, EFFECTIVE):
            with pytest.raises(ModelError, match="mine.*training=False after training=True"):
                trained(build, data, micro_batch_size=micro_batch_size)
    else:
        one, other = (trained(build, data, micro_batch_size=size) for size in (GHOST, EFFECTIVE))
        assert_same_training(one, other, TOLERANCE)


def test_what_still_couples_samples():
    """BatchNormalization in groups does not; a layer of the user's that holds one is tried by itself."""

    class Block(layers.Layer):
        def __init__(self, centers, **kwargs):
            super().__init__(**kwargs)
            self.normalization, self.centers = layers.BatchNormalization(), centers

        def call(self, inputs, training=None):
            x = self.normalization(inputs, training=training)
            return x - ops.mean(x, axis=0) if self.centers else x

    def names(*blocks, ghost_batch_size=GHOST):
        model = with_normalization(layers.BatchNormalization(), *blocks)()
        accumtune.accumulate(model, micro_batch_size=8, ghost_batch_size=ghost_batch_size)
        return [coupling.kind for coupling in accumtune.batch_coupled_layers(model)]

    assert names(Block(False)) == []
    assert names(Block(True)) == ["Block"]
    assert set(names(Block(False), ghost_batch_size=None)) == {"BatchNormalization"}
