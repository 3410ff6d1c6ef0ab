"""A `fit` that is not Keras's own: a class's that prepares its data, and wrappers around Keras's (autologging)."""

import functools

import keras
import numpy as np
import pytest
from equality import BACKEND, EFFECTIVE, SAMPLES, as_array, assert_same_training, dense, numbers, regression, train

from accumtune.accumulation import accumulate
from accumtune.errors import BatchSizeError

X, Y = np.arange(SAMPLES * 4).reshape(SAMPLES, 4) % 7, numbers(SAMPLES, 2, seed=1)
SIZES = set()


class Noted(keras.layers.Layer):
    """Notes the batches it is validated with, where it runs eagerly."""

    def call(self, inputs, training=None):
        if not training:
            SIZES.add(inputs.shape[0])
        return inputs


class Task(keras.Sequential):
    """As KerasHub's tasks: `fit` cuts batches of what was prepared, and names no batch size to Keras."""

    batches_are_declared = False

    def prepared(self, x, y, batch_size):
        size = batch_size or 32
        batches = [(x[i : i + size] / 7.0 - 0.5, y[i : i + size]) for i in range(0, len(x), size)]
        return batches if self.batches_are_declared else Batches(batches)

    def fit(self, x=None, y=None, batch_size=None, validation_data=None, **kwargs):
        data = self.prepared(x, y, batch_size)
        if self.batches_are_declared:
            kwargs["steps_per_epoch"] = len(data)
            data = iter(data * kwargs["epochs"])
            data = (batch for batch in data)
        if validation_data is not None:
            validation_data = self.prepared(*validation_data, batch_size)
        return super().fit(data, validation_data=validation_data, **kwargs)


class Batches(keras.utils.PyDataset):
    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def task(run_eagerly=False, cls=Task):
    def build():
        model = cls([keras.Input((4,)), keras.layers.Dense(3), Noted(), keras.layers.Dense(2)])
        model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"], run_eagerly=run_eagerly)
        return model

    return build


def test_a_fit_that_prepares_its_data():
    data = {"x": X, "y": Y, "validation_data": (X[:10], Y[:10])}
    plain = train(task(), data)
    assert_same_training(train(task(), data, micro_batch_size=3), plain)
    assert_same_training(train(task(), data, accumulation_steps=2, batch_size=4), plain)


@pytest.mark.parametrize(("given", "expected"), [({}, 3), ({"validation_batch_size": 8}, 8)])
def test_its_validation_takes_no_more_than_a_micro_batch_unless_told(given, expected):
    model = accumulate(task(run_eagerly=True)(), 3)
    model.train_on_batch(X, Y)
    SIZES.clear()
    model.fit(X[:8], Y[:8], batch_size=8, validation_data=(X[:10], Y[:10]), verbose=0, **given)
    assert max(SIZES) == expected
    SIZES.clear()
    model.evaluate(X[:10], Y[:10], batch_size=5, verbose=0)
    assert SIZES == {5}


class DeclaringTask(Task):
    batches_are_declared = True


def test_a_fit_that_counts_its_batches():
    """Where it says `steps_per_epoch` to Keras, it means its batches, of which several are an update."""
    data = {"x": X[:16], "y": Y[:16]}
    plain = train(task(cls=DeclaringTask), data)
    joined = train(task(cls=DeclaringTask), data, accumulation_steps=2, batch_size=4)
    assert plain.updates() == joined.updates() == 4
    assert_same_training(joined, plain)
    with pytest.raises(BatchSizeError, match="micro_batch_size"):
        train(task(cls=DeclaringTask), data, accumulation_steps=3, batch_size=4)


# Autologging


def undecorated(own, seen):
    def fit(*args, **kwargs):
        seen.append((args[1:], kwargs))
        return own(*args, **kwargs)

    return fit


def decorated(own, seen):
    return functools.wraps(own)(undecorated(own, seen))


@pytest.mark.parametrize("wrap", [undecorated, decorated])
@pytest.mark.parametrize("when", ["before", "afterwards"])
def test_a_class_whose_fit_is_wrapped_sees_the_users_call(monkeypatch, when, wrap):
    def run(is_wrapped, size, **how):
        keras.utils.set_random_seed(7)
        model, seen = dense(metrics=["mae"])(), []
        with monkeypatch.context() as patch:
            wrapping = lambda: patch.setattr(keras.Model, "fit", wrap(keras.Model.fit, seen))  # noqa: E731
            if is_wrapped and when == "before":
                wrapping()
            if how:
                accumulate(model, **how)
            if is_wrapped and when == "afterwards":
                wrapping()
            x, y = regression().values()
            model.fit(x, y, size, epochs=2, shuffle=False, verbose=0)
            if is_wrapped:
                ((args, kwargs),) = seen
                assert args[0] is x and args[1] is y and args[2] == size and kwargs["epochs"] == 2
        return [as_array(v) for v in model.variables]

    plain = run(False, EFFECTIVE)
    for size, how in ((EFFECTIVE, {"micro_batch_size": 3}), (EFFECTIVE // 2, {"accumulation_steps": 2})):
        for one, other in zip(run(True, size, **how), plain, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


def test_a_fit_called_by_its_class_counts_windows():
    model = accumulate(dense()(), accumulation_steps=2)
    keras.Model.fit(model, **regression(), batch_size=4, verbose=0)
    assert int(as_array(model.optimizer.iterations)) == 3


@pytest.mark.skipif(BACKEND == "torch", reason="evaluate() on torch does not say that it begins")
def test_a_fit_that_fails_leaves_evaluate_alone():
    model = accumulate(dense()(), accumulation_steps=2)
    with pytest.raises(ValueError):
        keras.Model.fit(model, x=object())
    x, y = regression().values()
    assert model.evaluate(x, y, batch_size=5, verbose=0) == pytest.approx(model.evaluate(x, y, verbose=0))


# KerasHub


def classifier(has_preprocessor):
    hub = pytest.importorskip("keras_hub")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    preprocessor = None
    if has_preprocessor:
        pytest.importorskip("tensorflow_text")
        tokenizer = hub.models.BertTokenizer(vocabulary=words)
        preprocessor = hub.models.BertTextClassifierPreprocessor(tokenizer, sequence_length=6)
    backbone = hub.models.BertBackbone(
        vocabulary_size=len(words), num_layers=1, num_heads=1, hidden_dim=4, intermediate_dim=4, max_sequence_length=6,
        dropout=0.0,
    )  # fmt: skip
    model = hub.models.BertTextClassifier(backbone, num_classes=2, preprocessor=preprocessor, dropout=0.0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss, metrics=["accuracy"])
    return model


@pytest.mark.slow
@pytest.mark.parametrize("has_preprocessor", [False, True])
def test_a_task_of_keras_hub(has_preprocessor):
    if has_preprocessor:
        x = np.array(["good film", "bad film", "bad bad film", "good"] * 5)
    else:
        tokens = np.random.default_rng(0).integers(0, 8, (20, 6))
        x = {"token_ids": tokens, "segment_ids": np.zeros_like(tokens), "padding_mask": np.ones_like(tokens)}
    data = {"x": x, "y": np.array([1, 0, 0, 1] * 5)}
    build = lambda: classifier(has_preprocessor)  # noqa: E731
    plain = train(build, data, epochs=1)
    assert_same_training(train(build, data, epochs=1, micro_batch_size=3), plain, tolerance=1e-5)
    if BACKEND != "jax":  # which compiles each of these models for 6 to 10 seconds
        assert_same_training(train(build, data, epochs=1, accumulation_steps=2, batch_size=4), plain, tolerance=1e-5)
