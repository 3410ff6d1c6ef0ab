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


def run(samples, hows):
    code = textwrap.dedent(PREPARE[BACKEND]) + textwrap.dedent(CHECK).format(samples=samples, hows=hows)
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
