"""Every optimizer, and the parts of an update: clipping, schedules, EMA, weight decay, loss scaling."""

import keras
import pytest
from equality import assert_exact, assert_same_training, dense, regression, train
from promises import holds

EVEN = 16  # where the last, ragged batch is not what is tested: fewer shapes to compile


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
