"""Models that need different memory have different signatures; models that differ only in values share one."""

import keras
import numpy as np
import pytest

from accumtune.worker.identity.memory_signature import describe_model

SAMPLE = (np.zeros((1, 4), "float32"), np.zeros((1, 1), "float32"), None)


class Branch(keras.layers.Layer):
    def __init__(self, capacity=1.0, dropout=0.1, **kwargs):
        super().__init__(**kwargs)
        self.capacity, self.drop = capacity, keras.layers.Dropout(dropout)

    def call(self, x):
        return self.drop(keras.ops.repeat(x, int(8 * self.capacity), axis=0)[: keras.ops.shape(x)[0]])

    def get_config(self):  # as people write it: without what the constructor took
        return super().get_config()


def loss_with(negatives):
    def loss(y_true, y_pred):
        return keras.ops.mean(keras.ops.square(y_true - y_pred)) * negatives

    return loss


def signature(
    layers=tuple, optimizer=None, loss="mse", remat=None, units=8, rate=0.1, policy=None, **compiled
):
    keras.backend.clear_session()
    with keras.RematScope(mode=remat):
        hidden = [keras.layers.Dense(units, activation="relu", dtype=policy), keras.layers.Dropout(rate)]
        model = keras.Sequential([keras.Input((4,)), *hidden, *layers(), keras.layers.Dense(1)])
    model.compile(optimizer or keras.optimizers.SGD(0.1), loss, **compiled)
    return describe_model(model, SAMPLE, "CPU:0", {})["signature"]


@pytest.mark.parametrize(
    "one, other",
    [
        ({"remat": "full"}, {"remat": None}),
        ({"run_eagerly": True}, {"run_eagerly": False}),
        ({"jit_compile": True}, {"jit_compile": False}),
        ({"steps_per_execution": 4}, {"steps_per_execution": 1}),
        ({"loss": loss_with(4)}, {"loss": loss_with(400)}),
        ({"metrics": [keras.metrics.AUC(num_thresholds=5)]}, {"metrics": [keras.metrics.AUC(num_thresholds=500)]}),
        ({"optimizer": keras.optimizers.Adam(amsgrad=True)}, {"optimizer": keras.optimizers.Adam()}),
        ({"optimizer": keras.optimizers.SGD(momentum=0.9)}, {"optimizer": keras.optimizers.SGD()}),
        ({"optimizer": keras.optimizers.SGD(use_ema=True)}, {"optimizer": keras.optimizers.SGD()}),
        ({"policy": "mixed_float16"}, {"policy": "float32"}),
        ({"rate": 0.0}, {"rate": 0.5}),
        ({"layers": lambda: [Branch(1.0)]}, {"layers": lambda: [Branch(1.25)]}),
        (
            {"layers": lambda: [keras.layers.Reshape((1, 8)), keras.layers.LSTM(8, use_cudnn=True)]},
            {"layers": lambda: [keras.layers.Reshape((1, 8)), keras.layers.LSTM(8, use_cudnn=False)]},
        ),
        (
            {"layers": lambda: [keras.layers.Lambda(lambda x: x * 2, output_shape=(8,))]},
            {"layers": lambda: [keras.layers.Lambda(lambda x: keras.ops.tile(x, 1), output_shape=(8,))]},
        ),
    ],
)
def test_what_decides_memory_is_in_the_signature(one, other):
    assert signature(**one) != signature(**other)


@pytest.mark.parametrize(
    "one, other",
    [
        ({"rate": 0.1}, {"rate": 0.5}),
        ({"optimizer": keras.optimizers.SGD(0.1)}, {"optimizer": keras.optimizers.SGD(0.5)}),
        (
            {"optimizer": keras.optimizers.Adam(0.1)},
            {"optimizer": keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.1, 200))},
        ),
        ({"loss": loss_with(4)}, {"loss": loss_with(4)}),
        ({"layers": lambda: [Branch(dropout=0.1)]}, {"layers": lambda: [Branch(dropout=0.5)]}),
        ({"metrics": [keras.metrics.AUC()]}, {"metrics": [keras.metrics.AUC()]}),
    ],
)
def test_what_takes_no_memory_is_not(one, other):
    assert signature(**one) == signature(**other)


def test_a_loss_over_the_batch_keeps_the_outputs_of_the_effective_batch():
    """Three float32 outputs and their gradient, and three targets: 36 bytes of each sample, beside the micro-batch."""

    def correlation(y_true, y_pred):
        return 1 - keras.ops.mean(y_true * y_pred) / keras.ops.sqrt(keras.ops.mean(keras.ops.square(y_pred)))

    sample = (np.zeros((1, 4), "float32"), np.zeros((1, 3), "float32"), None)
    kept = {}
    for name, loss in (("over the batch", correlation), ("a mean", "mse")):
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        model.compile("sgd", loss)
        kept[name] = describe_model(model, sample, "CPU:0", {})["sample_bytes"]
    assert kept == {"over the batch": 36, "a mean": 0}


def test_the_outputs_of_layers_are_counted_where_they_are_known():
    def facts(model):
        model.compile("sgd", "mse")
        return describe_model(model, (np.zeros((1, 4), "float32"), np.zeros((1, 2), "float32"), None), "CPU:0", {})

    class Subclass(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(2)

        def call(self, x):
            return self.dense(x)

    class Block(keras.layers.Layer):
        layers = 2  # a number of the user's, not layers

        def call(self, x):
            return x + 1

    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5), keras.layers.Dense(6, dtype="float16")])
    x = keras.Input((4,))
    nested = keras.Model(x, keras.layers.Dense(2)(Block()(inner(x))))
    assert facts(nested)["activation_bytes"] == 4 * 4 + 4 * 5 + 2 * 6 + 4 * 6 + 4 * 2
    words = keras.Sequential([keras.Input((None, 4)), keras.layers.Dense(5)])
    assert facts(words)["activation_bytes"] == 4 * 5  # for each of an unknown number of words
    subclass = Subclass()
    subclass(np.zeros((1, 4), "float32"))
    assert facts(subclass)["activation_bytes"] == 0
