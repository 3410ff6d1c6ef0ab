"""Whatever is called before and after `accumulate`, and on whatever data: each training is that of plain Keras."""

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


class Batches(keras.utils.PyDataset):
    def __init__(self, size):
        super().__init__()
        self.size = size

    def __len__(self):
        return -(-SAMPLES // self.size)

    def __getitem__(self, index):
        part = slice(index * self.size, (index + 1) * self.size)
        return X[part], Y[part]


def arrays(size):
    return {"x": X, "y": Y, "batch_size": size}


def generator(size):
    batches = Batches(size)
    return {"x": (batches[index] for index in range(len(batches)))}


def tf_dataset(size):
    tf = pytest.importorskip("tensorflow")
    return {"x": tf.data.Dataset.from_tensor_slices((X, Y)).batch(size)}


def data_loader(size):
    torch = pytest.importorskip("torch")
    samples = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))
    return {"x": torch.utils.data.DataLoader(samples, batch_size=size)}


def py_dataset(size):
    return {"x": Batches(size)}


KINDS = [arrays, py_dataset, generator, tf_dataset, data_loader]


def made():
    return dense(layers=[keras.layers.Dense(3, activation="tanh")], metrics=["mae"])()


def variables(model):
    return [as_array(v) for v in (*model.variables, *model.optimizer.variables)]


class AnyOrder(RuleBasedStateMachine):
    """Two models with the same weights; only `ours` ever accumulates."""

    @initialize(kind=st.sampled_from(KINDS))
    def build(self, kind):
        self.ours, self.plain, self.form = made(), made(), {}
        self.plain.set_weights(self.ours.get_weights())
        self.fit(kind, False)

    def both(self, call):
        ours, plain = call(self.ours), call(self.plain)
        for one, other in zip(keras.tree.flatten(ours), keras.tree.flatten(plain), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-8)
        for one, other in zip(variables(self.ours), variables(self.plain), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-8)

    def fit(self, kind, validates):
        validation = {"validation_data": (X, Y)} if validates else {}

        def call(model):
            steps = self.form.get("accumulation_steps", 1) if model is self.ours else 1
            data = kind(EFFECTIVE // steps)
            return model.fit(**data, **validation, shuffle=False, verbose=0).history

        self.both(call)

    def accumulate(self, form):
        self.form = form
        accumulate(self.ours, **form)

    def stop(self):
        self.form = {}
        stop_accumulating(self.ours)

    def use(self):
        self.both(lambda model: model.train_on_batch(X[:EFFECTIVE], Y[:EFFECTIVE]))
        self.both(lambda model: [model.evaluate(X, Y, batch_size=8, verbose=0), model.predict(X, verbose=0)])
        self.both(lambda model: model.test_on_batch(X, Y))

    def compile(self, all_is_trained):
        for model in (self.ours, self.plain):
            model.layers[0].trainable = all_is_trained
            model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])

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
    max_examples=4,
    stateful_step_count=5,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestAnyOrder = AnyOrder.TestCase


@pytest.mark.parametrize("form", FORMS[1:3], ids=str)
@pytest.mark.parametrize("kind", [arrays, py_dataset])
def test_plain_training_and_then_accumulation(kind, form):
    """Keras's compiled function was left in place: of 6 batches it trained on 2."""
    machine = AnyOrder()
    machine.build(kind)
    for change in (lambda: machine.accumulate(form), machine.use, machine.stop, lambda: machine.accumulate(form)):
        change()
        machine.fit(kind, validates=True)


@pytest.mark.skipif(BACKEND == "jax", reason="Keras's optimizers refuse it on JAX")
def test_trainable_is_looked_at_when_keras_looks_at_it():
    """Without `compile`, a compiled function of TensorFlow goes on as it was; torch sees the change."""

    def run(size):
        keras.utils.set_random_seed(1)
        model = made()
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
    model = accumulate(made(), 3)
    model.fit(X, Y, batch_size=8, verbose=0)
    accumulators = [weakref.ref(accumulator) for accumulator in model.train_function._accumulators]
    gc.disable()
    try:
        end(model)
        assert accumulators and not any(reference() for reference in accumulators)
    finally:
        gc.enable()
