"""The user's data inside a trial: samples for probes, and batches of the effective size."""

from functools import partial

import keras
import keras_tuner
import numpy as np
import pytest

from accumtune.accumulation import accumulate
from accumtune.errors import DataError
from accumtune.worker.data.hypermodel_fit_data import arguments_of_fit, own_fit
from accumtune.worker.data.rebatch import RebatchedDataset
from accumtune.worker.data.user_data import feed_by_batches, first_samples, fit_by_default, has_batches, resolve

X = np.arange(40, dtype="float32").reshape(20, 2)
Y = np.arange(20, dtype="float32")[:, None]


class Batches(keras.utils.PyDataset):
    def __init__(self, size):
        super().__init__()
        self.size = size

    def __len__(self):
        return -(-len(X) // self.size)

    def __getitem__(self, index):
        part = slice(index * self.size, (index + 1) * self.size)
        return {"features": X[part]}, Y[part]


def test_samples_come_from_the_front_and_repeat_where_there_are_too_few():
    x, y, weight = first_samples({"a": X, "b": (X, Y)}, Y, count=3)
    assert np.array_equal(x["a"], X[:3]) and np.array_equal(x["b"][1], Y[:3]) and weight is None
    x, y, _ = first_samples(X, Y, count=45)
    assert len(x) == len(y) == 45 and np.array_equal(x[20:40], X) and np.array_equal(y[40:], Y[:5])


def test_samples_of_data_sets_and_functions():
    x, y, _ = first_samples(Batches(6), count=9)
    assert np.array_equal(x["features"], X[:9]) and np.array_equal(y, Y[:9])
    x, y, weight = first_samples(lambda: (X, Y, Y[:, 0]), count=2)
    assert np.array_equal(y, Y[:2]) and np.array_equal(weight, Y[:2, 0])
    assert resolve(lambda: X, lambda: Y)[1] is Y


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="a tf.data pipeline")
def test_batches_that_cannot_be_cut_anew_are_refused_with_what_to_do():
    import tensorflow as tf

    padded = tf.data.Dataset.range(1, 7).map(lambda n: (tf.zeros([n, 2]), n)).padded_batch(2)
    assert first_samples(padded, count=2)[0].shape == (2, 2, 2)
    with pytest.raises(DataError, match=r"\(2, 2\) in one, \(4, 2\) in another.*\n.*\nFix: pad them"):
        first_samples(padded, count=3)


@pytest.mark.parametrize("inner", [1, 3, 6, 20, 32])
@pytest.mark.parametrize("size", [1, 4, 7, 20, 50])
def test_a_py_dataset_is_cut_anew_in_order(inner, size):
    dataset = RebatchedDataset(Batches(inner), size)
    batches = [dataset[index] for index in range(len(dataset))]
    assert [len(y) for _, y in batches[:-1]] == [size] * (len(dataset) - 1)
    assert np.array_equal(np.concatenate([x["features"] for x, _ in batches]), X)
    assert np.array_equal(np.concatenate([y for _, y in batches]), Y)


class PerFile(keras.utils.PyDataset):
    def __init__(self, sizes, batch_sizes=None):
        super().__init__()
        self.sizes = sizes
        if batch_sizes is not None:
            self.batch_sizes = batch_sizes

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        start = sum(self.sizes[:index])
        return X[start : start + self.sizes[index]], Y[start : start + self.sizes[index]]


@pytest.mark.parametrize("sizes", [(6, 1, 7, 0, 6), (1, 19), (20,)])
def test_a_py_dataset_that_tells_its_sizes_is_cut_anew_whatever_they_are(sizes):
    dataset = RebatchedDataset(PerFile(sizes, batch_sizes=sizes), 4)
    assert len(dataset) == 5
    assert np.array_equal(np.concatenate([dataset[index][1] for index in range(5)]), Y)


@pytest.mark.parametrize(
    ("sizes", "told", "found"),
    [
        ((6, 6, 2, 6), None, "batch 2 has 2 samples, where 6"),
        ((5, 5, 10), None, "batch 2 has 10 samples"),
        ((0, 10, 10), None, "batch 2 has 10 samples, where 0"),
        ((10, 10), (20,), "2 batches with 1 batch_sizes"),
        ((10, 10), (11, 9), "batch 0 has 10 samples, where 11"),
    ],
)
def test_batches_of_other_sizes_than_expected_are_refused_where_a_model_is_trained(sizes, told, found):
    model = model_for(X)
    feed_by_batches(model, effective_batch_size=4, micro_batch_size=2)
    with pytest.raises(DataError, match=f"{found}.*\n.*\nFix: .*batch_sizes"):
        model.fit(PerFile(sizes, told), shuffle=False, verbose=0)


def test_batches_whose_arrays_differ_in_their_samples_are_not_cut_anew():
    class TwoTargetsEach(PerFile):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x, np.repeat(y, 2, axis=0)

    with pytest.raises(DataError, match=r"\(10, 2\), \(20, 1\)"):
        RebatchedDataset(TwoTargetsEach((10, 10)), 4)


class Spy(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.updates = 0
        self.validation_batches = 0

    def on_train_batch_end(self, batch, logs=None):
        self.updates += 1

    def on_test_batch_end(self, batch, logs=None):
        self.validation_batches += 1


def model_for(x):
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input(x.shape[1:]), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


@pytest.mark.parametrize("with_split", [False, True])
def test_fit_is_given_effective_batches_and_validates_at_the_micro_batch(with_split):
    model, spy = model_for(X), Spy()
    feed_by_batches(model, effective_batch_size=8, micro_batch_size=2)
    options = {"validation_split": 0.5} if with_split else {"validation_data": (X[:10], Y[:10])}
    history = model.fit(X, Y, epochs=1, callbacks=[spy], verbose=0, class_weight=None, **options)
    assert spy.updates == (2 if with_split else 3) and spy.validation_batches == 5

    plain = model_for(X)
    expected = plain.fit(X, Y, batch_size=8, epochs=1, verbose=0, **options)
    assert history.history["loss"] == pytest.approx(expected.history["loss"], rel=1e-5)
    for ours, theirs in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def validation_data(kind):
    """In batches of 6, where they come in batches."""
    if kind == "PyDataset":
        return PerFile((6, 6, 6, 2))
    if kind == "loader":
        torch = pytest.importorskip("torch")
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*map(torch.tensor, (X, Y))), batch_size=6)
    if kind == "arrays":
        return X, Y
    samples = pytest.importorskip("tensorflow").data.Dataset.from_tensor_slices((X, Y)).repeat()
    return samples if kind == "samples" else samples.batch(6)


@pytest.mark.parametrize("kind", ["arrays", "PyDataset", "samples", "batches", "loader"])
@pytest.mark.parametrize("micro_batch_size", [2, 4, 8])
def test_validation_steps_mean_the_same_samples_in_every_trial(kind, micro_batch_size):
    """Counted in micro-batches, each trial would be judged by other samples."""
    model = model_for(X)
    feed_by_batches(model, effective_batch_size=8, micro_batch_size=micro_batch_size)
    options = {"validation_data": validation_data(kind), "validation_batch_size": 6, "validation_steps": 2}
    history = model.fit(X / 40, Y / 20, epochs=1, verbose=0, **options).history
    assert history["val_loss"][-1] == pytest.approx(model.evaluate(X[:12], Y[:12], verbose=0), rel=1e-5)


@pytest.mark.parametrize("kind", ["samples", "batches"])
def test_data_without_an_end_need_a_number_of_steps(kind):
    model = model_for(X)
    feed_by_batches(model, effective_batch_size=8, micro_batch_size=2)
    endless = validation_data(kind)
    for given, steps in (
        ({"x": endless}, "steps_per_epoch"),
        ({"x": X, "y": Y, "validation_data": endless}, "validation_"),
    ):
        with pytest.raises(DataError, match=rf"for ever(.|\n)*Fix: .*{steps}"):
            model.fit(**given, verbose=0)
    model.fit(endless, steps_per_epoch=2, validation_data=endless, validation_steps=1, verbose=0)
    assert int(model.optimizer.iterations) == 2


@pytest.mark.parametrize("reduction", ["sum", "mean_with_sample_weight"])
def test_a_loss_that_is_no_mean_over_samples_is_validated_on_as_many_in_every_trial(reduction):
    """As plain Keras does at that number; on micro-batches, trials would be compared on different scales."""
    options = {"validation_data": (X, Y, np.linspace(0.1, 2, len(X))), "shuffle": False, "verbose": 0}

    def fit(micro_batch_size=None, **given):
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="ones")])
        model.compile(keras.optimizers.SGD(0.0), keras.losses.MeanSquaredError(reduction=reduction), metrics=["mae"])
        if micro_batch_size is not None:
            feed_by_batches(accumulate(model, micro_batch_size), 8, micro_batch_size)
        return model.fit(X, Y, **options, **given).history

    for given in ({}, {"validation_batch_size": 7}):
        plain = fit(batch_size=8, **{"validation_batch_size": 32, **given})
        for micro_batch_size in (2, 4):
            ours = fit(micro_batch_size, **given)
            assert {name: ours[name] for name in plain} == {
                name: pytest.approx(values, rel=1e-5) for name, values in plain.items()
            }


class OfBatches(keras.Sequential):
    """Reports the least number of the last batch, which depends on how many samples share a batch."""

    def test_step(self, *arguments):
        *state, (x, y) = arguments
        least = {"least": keras.ops.min(x)}
        return (least, *state) if keras.backend.backend() == "jax" else least


@pytest.mark.parametrize(("given", "of_plain"), [({}, 3), ({"validation_batch_size": 5}, 5)])
def test_a_test_step_of_its_own_gets_one_size_of_batches_in_all_trials(given, of_plain):
    """Of 17 samples, the last batch of 3 or 5 has two, that of a micro-batch of 2 or 4 has one."""
    found = []
    for micro_batch_size in (2, 4, None):
        model = OfBatches([keras.Input((2,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse", run_eagerly=True)
        sizes = {"validation_batch_size": of_plain} if micro_batch_size is None else given
        if micro_batch_size is not None:
            feed_by_batches(accumulate(model, micro_batch_size), 4, micro_batch_size, test_step_batch_size=3)
        batch = {} if micro_batch_size else {"batch_size": 4}
        history = model.fit(X / 40, Y / 20, **batch, verbose=0, validation_data=(X[:17], Y[:17]), **sizes)
        found.append(history.history["val_least"])
    assert found[0] == found[1] == found[2] == [X[15, 0]]


def test_a_batch_size_of_the_user_gives_way_with_a_warning():
    model, spy = model_for(X), Spy()
    feed_by_batches(model, effective_batch_size=10, micro_batch_size=5)
    with pytest.warns(UserWarning, match="batch_size=4"):
        model.fit(X, Y, batch_size=4, verbose=0, callbacks=[spy])
    assert spy.updates == 2


class Doubling(keras.Sequential):
    """Prepares its data, and knows arrays and a `PyDataset` only."""

    def fit(self, x=None, y=None, batch_size=None, validation_data=None, **kwargs):
        assert batch_size is None or isinstance(x, np.ndarray)
        held_out = validation_data if validation_data is None else (validation_data[0] * 2, validation_data[1])
        if batch_size is None:
            x = [x[index] for index in range(len(x))]
            x, y = (np.concatenate(parts) for parts in zip(*x, strict=True))
        return super().fit(x * 2, y, batch_size=batch_size or 8, validation_data=held_out, **kwargs)


@pytest.mark.parametrize("data", [{"x": X, "y": Y}, {"x": PerFile((5, 5, 5, 5))}], ids=["arrays", "PyDataset"])
def test_a_fit_of_the_models_own_is_given_what_its_user_would_give_it(data):
    """... in effective batches; and validates, accumulating, at the micro-batch."""

    def doubling():
        model = Doubling([keras.Input((2,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        model.set_weights([np.full((2, 1), 0.1, "float32"), np.zeros(1, "float32")])
        return model

    model, spy = doubling(), Spy()
    feed_by_batches(accumulate(model, 2), effective_batch_size=8, micro_batch_size=2)
    options = {"validation_data": (X[:10], Y[:10]), "shuffle": False, "verbose": 0}
    history = model.fit(**data, **options, callbacks=[spy])
    plain = doubling().fit(X, Y, batch_size=8, **options)
    assert spy.updates == 3
    for name in ("loss", "val_loss"):
        assert history.history[name] == pytest.approx(plain.history[name], rel=1e-5)


@pytest.mark.parametrize("x", ["text", X[:0], [X, Y[:3]]])
def test_what_is_no_data_is_refused(x):
    with pytest.raises(DataError):
        first_samples(x, Y, count=2)


def named_model():
    """Its inputs are in the order of their names, which is not that of the data below."""
    series, hour = keras.Input((64, 3), name="series"), keras.Input((64,), name="hour", dtype="int32")
    hours = keras.layers.Embedding(24, 8)(hour)
    return keras.Model({"series": series, "hour": hour}, keras.layers.Concatenate()([series, hours]))


def listed_model():
    first, second = keras.Input((64, 3), name="series"), keras.Input((1,), name="hour")
    return keras.Model([first, second], [first, second])


def taking(*shape, **options):
    return keras.Sequential([keras.Input(*shape, **options), keras.layers.Identity()])


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="a tf.data pipeline")
@pytest.mark.parametrize(
    ("make_model", "features"),
    [
        (named_model, {"series": np.zeros((9, 64, 3)), "hour": np.zeros((9, 64))}),
        (named_model, {"unused": np.zeros((9, 2)), "series": np.zeros((9, 64, 3)), "hour": np.zeros((9, 64))}),
        (listed_model, (np.zeros((9, 64, 3)), np.zeros((9, 1)))),
        (listed_model, {"hour": np.zeros((9, 1)), "series": np.zeros((9, 64, 3))}),
        (partial(taking, (1,)), np.zeros(9)),
        (partial(taking, (1,)), np.zeros((9, 1))),
        (partial(taking, (5, 1)), np.zeros((9, 5))),
        (partial(taking, (32, 32, 3)), np.zeros((9, 40, 36, 3))),
    ],
)
def test_batches_are_told_from_samples(make_model, features):
    import tensorflow as tf

    model = make_model()
    for targets in (np.zeros((9, 1)), np.zeros(9)):
        samples = tf.data.Dataset.from_tensor_slices((features, targets))
        if not isinstance(features, np.ndarray) or features.ndim > 1:
            assert not has_batches(model, samples), samples.element_spec
        for batches in (samples.batch(4), samples.batch(3, drop_remainder=True)):
            assert has_batches(model, batches), batches.element_spec


def tiny():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


def test_fit_by_default_takes_the_effective_batch_where_it_is_told_of_none():
    x, y = np.ones((24, 3), "float32"), np.ones((24, 1), "float32")

    def updates(*args, **kwargs):
        model = fit_by_default(tiny(), 8)
        model.fit(*args, **kwargs, verbose=0)
        return int(model.optimizer.iterations)

    assert updates(x, y) == updates(x=x, y=y) == updates(x, y, None) == updates(x, y, None, 1) == 3
    assert updates(x, y, None, 2) == 6
    assert updates(x, y, 12) == updates(x, y, batch_size=12) == 2
    assert updates([x], y) == 3

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return x[:6], y[:6]

    assert updates(Batches()) == 4


class BringsItsOwn(keras_tuner.HyperModel):
    def fit(self, hp, model, *args, **kwargs):
        try:
            assert kwargs["callbacks"] == [] and kwargs["epochs"] == 1
            rows = hp.Choice("rows", [6, 12])
            return model.fit(np.ones((rows, 3)), y=np.ones((rows, 1)), **kwargs)
        except Exception:
            raise AssertionError("nothing of the user's may handle how it is left") from None


def test_the_data_that_a_fit_of_the_user_s_brings_are_found_without_training():
    model, hp = tiny(), keras_tuner.HyperParameters()
    fit = own_fit(BringsItsOwn())
    given = arguments_of_fit(fit, hp, model, (), {"epochs": 1})
    assert given["x"].shape == (6, 3) and given["y"].shape == (6, 1) and "rows" in hp.values
    assert int(model.optimizer.iterations) == 0
    model.fit(np.ones((4, 3)), np.ones((4, 1)), verbose=0)  # as before
    assert own_fit(keras_tuner.HyperModel()) is None and own_fit(tiny) is None
    with pytest.raises(DataError, match="does not call model.fit"):
        arguments_of_fit(lambda hp, model, **kwargs: {"loss": 0.0}, hp, model, (), {})
