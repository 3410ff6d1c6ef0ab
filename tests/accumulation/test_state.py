"""State that changes during a window besides the weights: moving statistics, seeds, the loss scale."""

import keras
import numpy as np
import pytest
from equality import BACKEND, FLOAT64, SAMPLES, dense, numbers, regression, train
from promises import holds

from accumtune.accumulation import accumulate


def as_array(value):
    return np.asarray(keras.ops.convert_to_numpy(value), "float64")


# BatchNormalization


def normalizing(mask=False, momentum=0.9, synchronized=False, learning_rate=0.0, axis=-1):
    """The statistics of the inputs, whatever the weights."""

    def build():
        inputs = keras.Input((5, 4) if mask else (4,))
        x = keras.layers.Masking()(inputs) if mask else inputs
        x = keras.layers.BatchNormalization(axis, momentum=momentum, synchronized=synchronized)(x)
        model = keras.Model(inputs, keras.layers.Dense(2)(x))
        model.compile(keras.optimizers.SGD(learning_rate), "mse")
        return model

    return build


def statistics(trained):
    return [as_array(v) for v in trained.model.non_trainable_variables if "moving" in v.path]


@pytest.mark.parametrize("momentum", [0.9, 0.999])
@holds("BatchNormalization's moving statistics: those of the effective batch")
def test_moving_statistics_are_those_of_the_effective_batch(momentum):
    data = {"x": numbers(SAMPLES, 4) * 3 + 50, "y": numbers(SAMPLES, 2)}
    plain = statistics(train(normalizing(momentum=momentum), data))
    for how in ({"micro_batch_size": 3}, {"accumulation_steps": 2, "batch_size": 4}):
        ours = statistics(train(normalizing(momentum=momentum), data, **how))
        assert len(ours) == 2
        np.testing.assert_allclose(ours, plain, rtol=FLOAT64)


def test_each_of_several_normalizations_gets_its_own_moments():
    """Of different widths and momenta, one of them called twice; none in front of another."""

    def build():
        inputs = keras.Input((4,))
        wide, narrow = (keras.layers.BatchNormalization(momentum=momentum) for momentum in (0.9, 0.5))
        parts = [wide(inputs), narrow(inputs[:, :2]), narrow(inputs[:, 2:])]
        model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Concatenate()(parts)))
        model.compile(keras.optimizers.SGD(0.0), "mse")
        return model

    data = {"x": numbers(SAMPLES, 4) * 3 + np.arange(4), "y": numbers(SAMPLES, 2)}
    ours, plain = statistics(train(build, data, micro_batch_size=3)), statistics(train(build, data))
    assert [array.shape for array in ours] == [(4,), (4,), (2,), (2,)]
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=FLOAT64)


def test_averaging_variances_is_something_else():
    """Negative control: plain Keras on micro-batches moves the statistics k times, without the variance between."""
    data = {"x": numbers(SAMPLES, 4) * 3 + 50, "y": numbers(SAMPLES, 2)}
    naive = statistics(train(normalizing(), data, batch_size=3))
    assert np.abs(np.subtract(naive, statistics(train(normalizing(), data)))).max() > 0.1


@pytest.mark.parametrize("axis", [-1, 1])
def test_moving_statistics_of_masked_sequences(axis):
    """Keras adds 1e-7 to the number of valid entries, hence the tolerance."""
    x = numbers(SAMPLES, 5, 4)
    x[np.arange(SAMPLES) % 3 == 0, 2:] = 0
    x[:3] = 0
    data = {"x": x, "y": numbers(SAMPLES, 5, 2)}
    build = normalizing(mask=True, axis=axis)
    plain = statistics(train(build, data))
    np.testing.assert_allclose(
        statistics(train(build, data, micro_batch_size=3)), plain, rtol=1e-6, atol=1e-7
    )


def test_a_frozen_normalization_keeps_its_statistics():
    def build():
        model = normalizing()()
        model.layers[1].trainable = False
        model.compile(keras.optimizers.SGD(0.1), "mse")
        return model

    ours = train(build, regression(), micro_batch_size=3)
    np.testing.assert_array_equal(statistics(ours), [np.zeros(4), np.ones(4)])


# Dropout


@holds("dropout draws a fresh mask per micro-batch, the same ones for the same seed")
def test_dropout_draws_a_fresh_mask_per_micro_batch_and_the_same_ones_for_a_seed():
    """Four identical samples in micro-batches of one: the gradients differ where the masks do."""

    def run(seed):
        def build():
            model = keras.Sequential([keras.Input((50,)), keras.layers.Dropout(0.5, seed=seed), Sees()])
            model.compile(keras.optimizers.SGD(0.0), "mse")
            return model

        trained = train(build, {"x": np.ones((4, 50)), "y": np.ones((4, 50))}, micro_batch_size=1, epochs=1)
        return as_array(trained.model.layers[-1].seen)

    seen = run(1)
    # Were the masks alike, each entry would have been seen never or four times.
    assert set(np.unique(seen)) > {0.0, 4.0}
    np.testing.assert_array_equal(seen, run(1))
    assert (seen != run(2)).any()


class Sees(keras.layers.Layer):
    """Counts how often each entry came through."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(), initializer="ones")
        self.seen = self.add_weight(shape=(shape[-1],), initializer="zeros", trainable=False)

    def call(self, inputs, training=None):
        if training:
            passed = keras.ops.sum(keras.ops.cast(inputs > 0, self.seen.dtype), axis=0)
            self.seen.assign(self.seen + passed)
        return inputs * self.scale


# What does not change


def with_a_frozen_layer(shape):
    model = keras.Sequential(
        [keras.Input(shape[:1]), keras.layers.Dense(shape[1], trainable=False), keras.layers.Dropout(0.1, seed=1)]
    )
    model.add(keras.layers.Dense(2))
    return model


def with_low_rank_adaptation(shape):
    model = keras.Sequential([keras.Input(shape[:1]), keras.layers.Dense(shape[1]), keras.layers.Dense(2)])
    model.layers[0].enable_lora(2)
    return model


@pytest.mark.skipif(BACKEND != "jax", reason="compiled functions of JAX return copies of what they hand through")
@pytest.mark.parametrize(("build", "shape"), [(with_a_frozen_layer, (123, 45)), (with_low_rank_adaptation, (124, 45))])
def test_frozen_weights_are_held_once(build, shape):
    import jax

    held = []

    def copies():
        return len({array.unsafe_buffer_pointer() for array in jax.live_arrays() if array.shape == shape})

    def counting(function):
        def call(*args):
            result = function(*args)
            held.append(copies())
            return result

        return call

    model = build(shape)
    model.compile("adam", "mse")
    accumulate(model, 2)
    data = {"x": numbers(8, shape[0]), "y": numbers(8, 2), "batch_size": 8, "verbose": 0}
    model.fit(**data)
    functions = model.train_function
    for name in ("_next", "_update"):
        setattr(functions, name, counting(getattr(functions, name)))
    before = as_array(next(v for v in model.non_trainable_variables if tuple(v.shape) == shape))
    model.fit(**data, epochs=2)
    assert held == [1] * 10  # two windows of four micro-steps and an update
    np.testing.assert_array_equal(
        as_array(next(v for v in model.non_trainable_variables if tuple(v.shape) == shape)), before
    )


# Precision


@pytest.mark.parametrize("sample", [0, 10, 20], ids=["first", "middle", "last"])
@holds("mixed precision: an overflow anywhere skips the whole update, and gradients are summed in float32")
def test_one_overflow_in_a_window_skips_the_whole_update(sample):
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("mixed_float16")
    keras.utils.set_random_seed(0)
    model = accumulate(dense()(), 3)
    model.train_on_batch(*regression().values())
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    before = [as_array(v) for v in model.trainable_variables]
    scale, updates = as_array(model.optimizer.dynamic_scale), int(as_array(model.optimizer.iterations))
    x, y = regression().values()
    x[sample] = 1e30  # in the first, the fourth or the last of seven micro-batches
    model.train_on_batch(x, y)
    for one, variable in zip(before, model.trainable_variables, strict=True):
        np.testing.assert_array_equal(one, as_array(variable))
    assert as_array(model.optimizer.dynamic_scale) == scale / 2  # once, not per micro-batch
    assert int(as_array(model.optimizer.iterations)) == updates
    model.train_on_batch(*regression().values())
    assert any((one != as_array(v)).any() for one, v in zip(before, model.trainable_variables, strict=True))
    assert all(np.isfinite(as_array(v)).all() for v in model.trainable_variables)


class One(keras.layers.Layer):
    """Its gradient is the number of samples over the batch: a sum of ones."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(), initializer="zeros")

    def call(self, inputs):
        return inputs + self.kernel


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16", "float16"])
@holds("mixed precision: an overflow anywhere skips the whole update, and gradients are summed in float32")
def test_gradients_are_summed_in_float32(policy):
    """512 gradients of 1 make 512; a bfloat16 sum would stop at 256, and one of float16 at 2048 of 4096."""
    number = 4096 if policy == "float16" else 512
    keras.config.set_floatx("float32")
    model = keras.Sequential([keras.Input((1,), dtype="float32"), One(dtype=policy)])
    loss = keras.losses.MeanAbsoluteError(reduction="sum")
    model.compile(keras.optimizers.SGD(1.0), loss, auto_scale_loss=False)
    accumulate(model, 1)
    model.train_on_batch(np.ones((number, 1), "float32"), np.zeros((number, 1), "float32"))
    assert as_array(model.trainable_variables[0]) == -number


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_trains_alike(policy):
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy(policy)
    plain = train(dense(), regression())
    ours = train(dense(), regression(), micro_batch_size=3)
    assert ours.updates() == plain.updates()
    for one, other in zip(ours.weights(), plain.weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-2 if "bfloat" in policy else 3e-3)


def test_the_backend_is_the_one_asked_for():
    assert BACKEND in ("tensorflow", "jax", "torch")
