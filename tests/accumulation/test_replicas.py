"""Several devices train as one: MirroredStrategy on two logical CPUs, DataParallel on two host devices of JAX."""

import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
from equality import BACKEND
from promises import holds

from accumtune.errors import ModelError

PREPARE = {
    "tensorflow": """
        import tensorflow as tf
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        scope = strategy.scope
    """,
    "jax": """
        import os
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
        import keras
        assert len(keras.distribution.list_devices()) == 2
        scope = keras.distribution.DataParallel().scope
    """,
}
CHECK = """
    import keras
    keras.config.set_floatx("float64")
    from equality import assert_same_training, dense, numbers, train

    def adam():
        return keras.optimizers.Adam(0.01, global_clipnorm=0.1)

    def build():
        return dense(optimizer=adam, metrics=["mae"])()

    samples = {samples}
    data = {{"x": numbers(samples, 4), "y": numbers(samples, 2, seed=1)}}
    one = train(build, data)
    for how in {hows}:
        with scope():
            several = train(build, data, **how)
        assert_same_training(several, one, 1e-5)
"""

# Of inputs far from 0; each device sees another half of the window.
NORMALIZING = """
    import keras, numpy as np
    keras.config.set_floatx("float64")
    from equality import as_array, assert_same_training, numbers, train
    from precision import let_keras_compute_in_float64
    from test_state import normalizing, statistics

    let_keras_compute_in_float64(dict.__setitem__)
    samples = {samples}
    data = {{"x": numbers(samples, 4) * 3 + 50, "y": numbers(samples, 2, seed=1)}}

    def on_devices(how, **options):
        with scope():
            return train(normalizing(**options), data, **how)

    def assert_statistics(ours, plain):
        np.testing.assert_allclose(statistics(ours), statistics(plain), rtol=1e-9)
        assert all(np.isfinite(as_array(v)).all() for v in ours.model.trainable_variables)
        for variable in ours.model.layers[1].non_trainable_variables:
            copies = strategy.experimental_local_results(variable.value) if "strategy" in globals() else []
            for copy in copies:
                np.testing.assert_array_equal(copy, as_array(variable))
"""
STATISTICS = """
    one = train(normalizing(), data)
    for how in {hows}:
        assert_statistics(on_devices(how, learning_rate=0.01), one)
"""
KERAS_ITSELF = """
    naive, one = statistics(on_devices({{}})), statistics(train(normalizing(), data))
    assert np.abs(np.subtract(naive, one)).max() > 0.1
"""
SYNCHRONIZED = """
    options = {{"synchronized": True, "learning_rate": 0.01}}
    one = train(normalizing(**options), data)
    for how in {hows}:
        assert_statistics(on_devices(how, **options), one)
    # 4 on each device are the effective batch: together they are normalized as one device does it.
    assert_same_training(on_devices({{"micro_batch_size": 4}}, **options), one)
"""
GHOST_BATCHES = """
    import accumtune

    def grouped(micro_batch_size):
        def build():
            model = normalizing(learning_rate=0.1)()
            return accumtune.accumulate(model, micro_batch_size, ghost_batch_size=2)
        return train(build, data)

    one = grouped(8)
    for micro_batch_size in (2, 4):
        with scope():
            several = grouped(micro_batch_size)
        assert_same_training(several, one, 1e-7)
"""


@pytest.fixture
def run(value_in_child):
    """Each in a process of its own: devices are as many as there are before the first is used."""

    def run(samples, hows, *parts):
        check = "".join(textwrap.dedent(part) for part in parts or (CHECK,))
        code = textwrap.dedent(PREPARE[BACKEND]) + check.format(samples=samples, hows=hows)
        folder = Path(__file__).parent

        def in_a_script(code, paths):
            import sys

            sys.path[:0] = paths
            exec(compile(code, "<replicas>", "exec"), {"__name__": "__main__"})

        value_in_child(in_a_script, code, [str(folder), str(folder.parents[1])])

    return run


@pytest.mark.skipif(BACKEND == "torch", reason="Keras on torch has no data parallelism")
@holds("several devices (`MirroredStrategy`, `DataParallel`)")
def test_two_devices_train_as_one(run):
    """Effective batches of 8: 4 on each device, in micro-batches of 3 and 1, of 2, or of 4."""
    run(32, [{"micro_batch_size": 3}, {"micro_batch_size": 8}, {"accumulation_steps": 2, "batch_size": 4}])


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="DataParallel wants batches that divide by the devices")
def test_a_last_batch_that_the_devices_do_not_share_evenly(run):
    """21 samples: 8, 8 and 5, the 5 as 3 and 2. Plain Keras weighs the devices alike here and is off."""
    run(21, [{"micro_batch_size": 2}, {"micro_batch_size": 1}])


COMPILED_ONCE = """
    from equality import numbers, train
    from test_compiled_once import traces
    from test_state import normalizing

    data = {{"x": numbers({samples}, 4), "y": numbers({samples}, 2)}}
    with scope():
        for how in {hows}:
            trained = train(normalizing(learning_rate=0.1), data, **how)
            assert set(traces(trained.model)) <= {{0, 1}}, traces(trained.model)
"""


@pytest.mark.skipif(BACKEND != "jax", reason="TensorFlow's functions are compiled for their arguments' shapes alone")
def test_each_function_is_compiled_once_for_several_devices(run):
    """Left to choose how its results are laid out, JAX compiles a function again for what it gave the first time."""
    run(16, [{"micro_batch_size": 2}, {"micro_batch_size": 4}], COMPILED_ONCE)


# Each family of layers and losses: 21 samples leave 3 and 2 for the last window, and 1 and 0 for the last of 4.

FAMILIES = """
    import keras
    import numpy as np
    keras.config.set_floatx("float64")
    from equality import FLOAT64, SAMPLES, assert_same_training, dense, numbers, regression, sequences, train
    from precision import let_keras_compute_in_float64
    from test_exactness import MeanActivity, OwnLoss, mean_of_everything
    from test_losses_and_models import SEQUENCES, VECTORS, functional
    from test_masks import ExplicitMask, embedding_model

    let_keras_compute_in_float64(dict.__setitem__)

    def of_layers(*layers, shape=(5,), loss="mse", **more):
        def build():
            model = keras.Sequential([keras.Input(shape, **more), *(layer() for layer in layers)])
            model.compile(keras.optimizers.Adam(0.01), loss)
            return model
        return build

    def own_loss():
        model = OwnLoss()
        model.compile(keras.optimizers.SGD(0.05), "mse", metrics=["mae"])
        return model

    def every_layer(inputs):
        x = inputs
        for kind in (*SEQUENCES.values(), *(VECTORS[name] for name in ("group-normalization", "seeds-and-constants"))):
            x = kind(x) if len(x.shape) == 3 else kind(keras.layers.RepeatVector(3)(x))
        return x

    layers = keras.layers
    ignoring = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0)
    tokens, y, steps = sequences(), numbers(SAMPLES, 2, seed=1), numbers(SAMPLES, 5, 2)
    families = {{
        "a mean over the batch": (dense(mean_of_everything), regression()),
        "a loss of the model's own": (own_loss, regression()),
        "a loss of a layer": (lambda: dense(layers=[MeanActivity()])(), regression()),
        "eagerly": (dense(run_eagerly=True, metrics=["mae"]), regression()),
        "layers": (functional(every_layer, (5, 4)), {{"x": numbers(SAMPLES, 5, 4), "y": y}}),
        "mask": (embedding_model(), {{"x": tokens, "y": steps}}),
        "mask by hand": (of_layers(lambda: layers.Dense(2), ExplicitMask, shape=(5, 2)), {{"x": steps, "y": steps}}),
        "a loss with its own mask": (
            of_layers(lambda: layers.Dense(3), shape=(5, 2), loss=ignoring), {{"x": steps, "y": np.minimum(tokens, 2)}}
        ),
    }}
    for name, (build, data) in families.items():
        one = train(build, data)
        for how in {hows}:
            with scope():
                several = train(build, data, **how)
            try:
                assert_same_training(several, one)
            except AssertionError as error:
                raise AssertionError(f"{{name}}, {{how}}: {{error}}") from None

    # Plain Adam on TensorFlow squares the slices of a repeated row apart: windows are compared with each other.
    embedding = of_layers(lambda: layers.Embedding(6, 3), layers.Flatten, lambda: layers.Dense(2), dtype="int32")
    data = {{"x": tokens, "y": y}}
    whole = train(embedding, data, micro_batch_size=8)
    for how in {hows}:
        with scope():
            assert_same_training(train(embedding, data, **how), whole)
"""


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="DataParallel wants batches that divide by the devices")
def test_layers_and_losses_of_every_kind_on_two_devices(run):
    run(21, [{"accumulation_steps": 2, "batch_size": 4}], FAMILIES)


# BatchNormalization

HOWS = [{"micro_batch_size": 2}, {"micro_batch_size": 3}, {"micro_batch_size": 8}]


@pytest.mark.skipif(BACKEND == "torch", reason="Keras on torch has no data parallelism")
@holds("BatchNormalization's moving statistics: those of the effective batch")
def test_moving_statistics_are_those_of_all_devices(run):
    run(32, [*HOWS, {"accumulation_steps": 2, "batch_size": 4}], NORMALIZING, STATISTICS)


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="DataParallel wants batches that divide by the devices")
def test_moving_statistics_where_a_device_has_no_samples_left(run):
    """The last 5 as 3 and 2: in micro-batches of 2 the second device has nothing for the last micro-step."""
    run(21, HOWS, NORMALIZING, STATISTICS)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras on torch has no data parallelism")
def test_ghost_batches_are_groups_within_a_device(run):
    """4 of a window of 8 are on each device, in one or two micro-batches: the groups of 2 are those of one device."""
    run(32, [], NORMALIZING, GHOST_BATCHES)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="negative control of MirroredStrategy")
def test_keras_itself_keeps_the_statistics_of_one_device(run):
    run(32, [], NORMALIZING, KERAS_ITSELF)


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="Keras has synchronized normalization on TensorFlow alone")
def test_synchronized_normalization(run):
    run(32, HOWS, NORMALIZING, SYNCHRONIZED)


# Once per update

REDUCED_ONCE = """
    import keras
    from equality import dense, numbers, train

    calls = []
    own = tf.distribute.ReplicaContext.all_reduce

    def all_reduce(self, operation, value, *rest):
        calls.append(len(value))
        return own(self, operation, value, *rest)

    tf.distribute.ReplicaContext.all_reduce = all_reduce
    with scope():
        train(dense(), {{"x": numbers({samples}, 4), "y": numbers({samples}, 2)}}, micro_batch_size=1)
    # While the one update is traced, once on each replica, all of its gradients together.
    assert calls == [4, 4], calls
"""

TWO_OPTIMIZERS = """
    import keras
    keras.config.set_floatx("float64")
    import accumtune.accumulation.optimizers
    from equality import assert_same_training, dense, largest_difference, numbers, train

    def build():
        kernels, biases = keras.optimizers.Adam(0.01, clipnorm=0.1), keras.optimizers.SGD(0.1)
        choose = lambda variable: kernels if "kernel" in variable.path else biases
        return dense(optimizer=lambda: keras.optimizers.MultiOptimizer(choose))()

    data = {{"x": numbers({samples}, 4), "y": numbers({samples}, 2, seed=1)}}
    one = train(build, data)
    with scope():
        assert_same_training(train(build, data, micro_batch_size=2), one, 1e-5)
        # The negative control: an optimizer whose inner ones are not looked for.
        accumtune.accumulation.optimizers.updating = lambda optimizer: [optimizer]
        assert largest_difference(train(build, data, micro_batch_size=2), one) > 1e-2
"""


@pytest.mark.skipif(BACKEND != "tensorflow", reason="JAX puts what devices exchange where it likes")
def test_gradients_are_reduced_once_per_update(run):
    run(16, [], REDUCED_ONCE)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's optimizers sum over replicas by themselves")
def test_gradients_are_reduced_once_where_an_optimizer_hands_them_on(run):
    run(16, [], TWO_OPTIMIZERS)


WHOLE_BATCH_LOSS = """
    from equality import dense, numbers, train
    from test_whole_batch_loss import correlation
    from accumtune.errors import ModelError

    data = {{"x": numbers({samples}, 4), "y": numbers({samples}, 2, seed=1)}}
    for how in {hows}:
        with scope():
            try:
                train(dense(correlation), data, **how)
            except ModelError as error:
                assert "2 replicas" in str(error) and "whole_batch_loss=False" in str(error)
            else:
                raise AssertionError("it trained")
"""


@pytest.mark.skipif(BACKEND == "torch", reason="Keras on torch has no data parallelism")
def test_losses_over_the_batch_are_refused(run):
    run(8, [{"micro_batch_size": 2}], WHOLE_BATCH_LOSS)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a strategy of TensorFlow")
def test_replicas_in_other_processes_are_refused():
    """What they hold of an effective batch is not known here: shares would be those of other samples."""
    from accumtune.accumulation.engines.replicas import Replicas

    here = SimpleNamespace(worker_devices=("CPU:0", "CPU:1"))
    assert Replicas(SimpleNamespace(num_replicas_in_sync=2, extended=here, scope=None)).number == 2
    with pytest.raises(ModelError, match="4 replicas, 2 of them here"):
        Replicas(SimpleNamespace(num_replicas_in_sync=4, extended=here, scope=None))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="other backends have no strategies")
@pytest.mark.parametrize("how", [{"micro_batch_size": 3}, {"accumulation_steps": 2}])
def test_a_strategy_with_one_replica_trains_as_none(how):
    """As a script for several GPUs does on a machine with one. Keras's own sum over replicas fails there."""
    import keras
    import tensorflow as tf
    from equality import assert_same_training, dense, numbers, train

    build = dense(optimizer=lambda: keras.optimizers.Adam(0.01, clipnorm=0.1), metrics=["mae"])
    data = {"x": numbers(12, 4), "y": numbers(12, 2, seed=1)}
    one = train(build, data, **how)
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        mirrored = train(build, data, **how)
    assert_same_training(mirrored, one)
