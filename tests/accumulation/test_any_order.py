"""Random sequences of calls around `accumulate`, with all kinds of data: each training equals plain Keras's."""

import gc
import weakref

import keras
import numpy as np
import pytest
from equality import BACKEND, as_array, dense, numbers
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from accumtune.accumulation import accumulate, stop_accumulating

SAMPLES, EFFECTIVE = 20, 8  # windows of 8, 8 and 4; in batches of 4 and of 2 they are joined alike
X, Y = numbers(SAMPLES, 4), numbers(SAMPLES, 2, seed=1)
FORMS = [{"micro_batch_size": 3}, {"micro_batch_size": 8}, {"accumulation_steps": 2}, {"accumulation_steps": 4}]


def rows(structure, part):
    return keras.tree.map_structure(lambda array: array[part], structure)


class Batches(keras.utils.PyDataset):
    def __init__(self, data, size):
        super().__init__()
        self.data, self.size = data, size

    def __len__(self):
        return -(-SAMPLES // self.size)

    def __getitem__(self, index):
        return rows(self.data, slice(index * self.size, (index + 1) * self.size))


def arrays(data, size):
    return {"x": data[0], "y": data[1], "batch_size": size}


def generator(data, size):
    batches = Batches(data, size)
    known = {"x": (batches[index] for index in range(len(batches)))}
    if BACKEND == "tensorflow":
        # Else a compiled function of Keras's finds the end in the middle of a step, which may have counted an update.
        known["steps_per_epoch"] = -(-SAMPLES // EFFECTIVE)
    return known


def tf_dataset(data, size):
    tf = pytest.importorskip("tensorflow")
    return {"x": tf.data.Dataset.from_tensor_slices(data).batch(size)}


def data_loader(data, size):
    torch = pytest.importorskip("torch")
    samples = [rows(data, index) for index in range(SAMPLES)]

    def collated(samples):  # torch makes lists of tuples, which are tensors to tf.data
        return keras.tree.map_structure(lambda *leaves: torch.tensor(np.stack(leaves)), *samples)

    return {"x": torch.utils.data.DataLoader(samples, batch_size=size, collate_fn=collated)}


def py_dataset(data, size):
    return {"x": Batches(data, size)}


KINDS = [arrays, py_dataset, generator, tf_dataset, data_loader]


class Dropout(keras.layers.Dropout):
    """Draws its masks as accumulation does, for parts of a batch one after the other; all at once if `size` is None."""

    size = None

    def call(self, inputs, training=False):
        if self.size is None or not training:
            return super().call(inputs, training=training)
        parts = [inputs[start : start + self.size] for start in range(0, len(inputs), self.size)]
        return keras.ops.concatenate([super(Dropout, self).call(part, training=True) for part in parts])


class OneArray:
    """A model and its data."""

    data = X, Y
    draws = False
    validation = {}

    def made(self):
        return dense(layers=[keras.layers.Dense(3, activation="tanh")], metrics=["mae"])()

    def compile(self, model):
        model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])


OUTPUTS = {"sum": 1, "both": 2}


class Dicts(OneArray):
    data = {"one": X[:, :3], "other": X[:, 3:]}, {"sum": Y[:, :1], "both": Y}
    # On TensorFlow, Keras averages the losses of each output over batches, whatever their size.
    validation = {"validation_batch_size": 4} if BACKEND == "tensorflow" else {}

    def made(self):
        inputs = {"one": keras.Input((3,)), "other": keras.Input((1,))}
        hidden = keras.layers.Dense(3, activation="tanh")(inputs["one"])
        hidden = keras.layers.Concatenate()([hidden, inputs["other"]])
        model = keras.Model(inputs, {name: keras.layers.Dense(n, name=name)(hidden) for name, n in OUTPUTS.items()})
        self.compile(model)
        return model

    def compile(self, model):
        losses = {"sum": "mse", "both": "mae"}
        model.compile(keras.optimizers.Adam(0.01), losses, {"sum": 2.0, "both": 1.0}, metrics={"both": ["mae"]})


class TuplesAndDropout(OneArray):
    data = (X[:, :3], X[:, 3:]), Y
    draws = True

    def made(self):
        inputs = keras.Input((3,)), keras.Input((1,))
        hidden = keras.layers.Dense(4, activation="tanh")(inputs[0])
        hidden = Dropout(0.5, seed=3)(keras.layers.Concatenate()([hidden, inputs[1]]))
        model = keras.Model(inputs, keras.layers.Dense(2)(Dropout(0.2, seed=4)(hidden)))
        self.compile(model)
        return model


MODELS = [OneArray(), Dicts(), TuplesAndDropout()]


def variables(model):
    return [as_array(v) for v in (*model.variables, *model.optimizer.variables)]


class AnyOrder(RuleBasedStateMachine):
    """Two models with the same weights; only `ours` ever accumulates."""

    @initialize(kind=st.sampled_from(KINDS), case=st.sampled_from(MODELS))
    def build(self, kind, case):
        self.case, self.form = case, {}
        self.ours, self.plain = case.made(), case.made()
        self.plain.set_weights(self.ours.get_weights())
        # Compiled on TensorFlow, a layer would not know how many samples it gets.
        self.plain.run_eagerly = case.draws and BACKEND == "tensorflow"
        self.fit(kind, False)

    def both(self, call):
        ours, plain = call(self.ours), call(self.plain)
        for one, other in zip(keras.tree.flatten(ours), keras.tree.flatten(plain), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-8)
        for one, other in zip(variables(self.ours), variables(self.plain), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-8)

    def draws_in_parts_of(self, size):
        """Makes the plain model draw as micro-batches of this size do, from now on."""
        for layer in self.plain.layers if self.case.draws else ():
            if isinstance(layer, Dropout) and layer.size != size:
                layer.size, self.plain.train_function = size, None

    def fit(self, kind, validates):
        validation = {"validation_data": self.case.data, **self.case.validation} if validates else {}
        steps = self.form.get("accumulation_steps", 1)
        self.draws_in_parts_of(self.form.get("micro_batch_size", EFFECTIVE // steps))

        def call(model):
            data = kind(self.case.data, EFFECTIVE // steps if model is self.ours else EFFECTIVE)
            return model.fit(**data, **validation, shuffle=False, verbose=0).history

        self.both(call)

    def accumulate(self, form):
        self.form = form
        accumulate(self.ours, **form)

    def stop(self):
        self.form = {}
        stop_accumulating(self.ours)

    def use(self):
        x, y = self.case.data
        batch = keras.tree.map_structure(keras.ops.convert_to_tensor, rows(self.case.data, slice(EFFECTIVE)))
        self.draws_in_parts_of(self.form.get("micro_batch_size", EFFECTIVE))
        self.both(lambda model: model.train_on_batch(*batch))
        self.both(lambda model: [model.evaluate(x, y, batch_size=8, verbose=0), model.predict(x, verbose=0)])
        self.both(lambda model: model.test_on_batch(*batch))

    def compile(self, all_is_trained):
        for model in (self.ours, self.plain):
            next(layer for layer in model.layers if layer.weights).trainable = all_is_trained
            self.case.compile(model)
        self.plain.run_eagerly = self.case.draws and BACKEND == "tensorflow"

    # One rule: of several, hypothesis leaves out some in each example, and few examples would miss what matters.
    @rule(
        what=st.sampled_from(["accumulate", "compile", "stop", "use", "fit"]),
        kind=st.sampled_from(KINDS),
        form=st.sampled_from(FORMS),
        flag=st.booleans(),
    )
    def step(self, what, kind, form, flag):
        if what == "accumulate":
            self.accumulate(form)
        elif what == "compile":
            self.compile(flag)
        elif what == "stop":
            self.stop()
        if what == "use":
            self.use()
        else:
            self.fit(kind, flag)


AnyOrder.TestCase.settings = settings(
    max_examples=3 if BACKEND == "tensorflow" else 5,
    stateful_step_count=4,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestAnyOrder = AnyOrder.TestCase


@pytest.mark.parametrize(
    ("kind", "case", "form"),
    [
        (arrays, MODELS[0], FORMS[1]),
        pytest.param(py_dataset, MODELS[0], FORMS[2], marks=pytest.mark.slow),
        (py_dataset, MODELS[1], FORMS[0]),
        (data_loader, MODELS[1], FORMS[2]),
        pytest.param(arrays, MODELS[2], FORMS[0], marks=pytest.mark.slow),
        pytest.param(generator, MODELS[2], FORMS[2], marks=pytest.mark.slow),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else getattr(value, "__name__", type(value).__name__),
)
def test_plain_training_and_then_accumulation(kind, case, form):
    """Keras's compiled function must be replaced: otherwise it would train on 2 of 6 batches."""
    machine = AnyOrder()
    machine.build(kind, case)
    for change in (lambda: machine.accumulate(form), machine.use, machine.stop, lambda: machine.accumulate(form)):
        change()
        machine.fit(kind, validates=True)


def test_the_comparison_would_notice_other_masks():
    """Micro-batches of 3 draw other numbers than those of 4."""
    machine = AnyOrder()
    machine.build(arrays, MODELS[2])
    machine.accumulate({"micro_batch_size": 3})
    machine.form = {"micro_batch_size": 4}
    with pytest.raises(AssertionError):
        machine.fit(arrays, validates=False)


@pytest.mark.skipif(BACKEND == "jax", reason="Keras's optimizers refuse it on JAX")
def test_trainable_is_looked_at_when_keras_looks_at_it():
    """Without `compile`, TensorFlow's compiled function does not see the change; torch does."""

    def run(size):
        keras.utils.set_random_seed(1)
        model = MODELS[0].made()
        if size:
            accumulate(model, size)
        model.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
        before = as_array(model.layers[0].kernel)
        model.layers[0].trainable = False
        model.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
        changed = bool(np.abs(as_array(model.layers[0].kernel) - before).max() > 0)
        return changed, [as_array(v) for v in model.variables]

    (changed, plain), (ours_changed, ours) = run(None), run(3)
    assert changed is ours_changed is (BACKEND == "tensorflow")
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere no variable outlives a window")
@pytest.mark.parametrize("end", [stop_accumulating, lambda model: accumulate(model, 2)])
def test_accumulators_are_given_back_without_waiting_for_a_garbage_collection(end):
    model = accumulate(MODELS[0].made(), 3)
    model.fit(X, Y, batch_size=8, verbose=0)
    accumulators = [weakref.ref(accumulator) for accumulator in model.train_function._accumulators]
    gc.disable()
    try:
        end(model)
        assert accumulators and not any(reference() for reference in accumulators)
    finally:
        gc.enable()
