"""Several devices train as one: MirroredStrategy on two logical CPUs, DataParallel on two host devices of JAX."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from equality import BACKEND
from promises import holds

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


def run(samples, hows, *parts):
    check = "".join(textwrap.dedent(part) for part in parts or (CHECK,))
    code = textwrap.dedent(PREPARE[BACKEND]) + check.format(samples=samples, hows=hows)
    folder = Path(__file__).parent
    path = os.pathsep.join([str(folder), str(folder.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.skipif(BACKEND == "torch", reason="Keras on torch has no data parallelism")
@holds("several devices (`MirroredStrategy`, `DataParallel`)")
def test_two_devices_train_as_one():
    """Effective batches of 8: 4 on each device, in micro-batches of 3 and 1, of 2, or of 4."""
    run(32, [{"micro_batch_size": 3}, {"micro_batch_size": 8}, {"accumulation_steps": 2, "batch_size": 4}])


@pytest.mark.skipif(BACKEND != "tensorflow", reason="DataParallel wants batches that divide by the devices")
def test_a_last_batch_that_the_devices_do_not_share_evenly():
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
            assert set(traces(trained.model).values()) <= {{0, 1}}, traces(trained.model)
"""


@pytest.mark.skipif(BACKEND != "jax", reason="TensorFlow's functions are compiled for their arguments' shapes alone")
def test_each_function_is_compiled_once_for_several_devices():
    """Left to choose how its results are laid out, JAX compiles a function again for what it gave the first time."""
    run(16, [{"micro_batch_size": 2}, {"micro_batch_size": 4}], COMPILED_ONCE)


# BatchNormalization

HOWS = [{"micro_batch_size": 2}, {"micro_batch_size": 3}, {"micro_batch_size": 8}]


@pytest.mark.skipif(BACKEND == "torch", reason="Keras on torch has no data parallelism")
@holds("BatchNormalization's moving statistics: those of the effective batch")
def test_moving_statistics_are_those_of_all_devices():
    run(32, [*HOWS, {"accumulation_steps": 2, "batch_size": 4}], NORMALIZING, STATISTICS)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="DataParallel wants batches that divide by the devices")
def test_moving_statistics_where_a_device_has_no_samples_left():
    """The last 5 as 3 and 2: in micro-batches of 2 the second device has nothing for the last micro-step."""
    run(21, HOWS, NORMALIZING, STATISTICS)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="negative control of MirroredStrategy")
def test_keras_itself_keeps_the_statistics_of_one_device():
    run(32, [], NORMALIZING, KERAS_ITSELF)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="Keras has synchronized normalization on TensorFlow alone")
def test_synchronized_normalization():
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
def test_gradients_are_reduced_once_per_update():
    run(16, [], REDUCED_ONCE)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's optimizers sum over replicas by themselves")
def test_gradients_are_reduced_once_where_an_optimizer_hands_them_on():
    run(16, [], TWO_OPTIMIZERS)
