"""Memory on TensorFlow: an update keeps the values of one assignment at a time; accumulators keep their addresses."""

import contextlib
import os

import keras
import numpy as np
import pytest

if os.environ["KERAS_BACKEND"] != "tensorflow":
    pytest.skip("TensorFlow's graphs", allow_module_level=True)


def chained_assignments(optimizer, around):
    """For each assignment of an update but the first: whether its value waits for the assignment before it."""
    import tensorflow as tf

    variables = [keras.Variable(np.ones((3, 2))), keras.Variable(np.ones(4))]
    optimizer.build(variables)

    @tf.function
    def update(gradients):
        with around(optimizer):
            optimizer.apply(gradients, variables)

    graph = update.get_concrete_function([tf.ones(variable.shape, tf.float64) for variable in variables]).graph
    held = {variable.value.handle.ref() for variable in [*optimizer.variables[2:], *variables]}  # no counter, no rate
    captured = {inside.ref() for outside, inside in graph.captures if outside.ref() in held}
    assigned = [op for op in graph.get_operations() if "Assign" in op.type and op.inputs[0].ref() in captured]
    return [before in ancestors(after.inputs[1].op) for before, after in zip(assigned, assigned[1:], strict=False)]


def ancestors(op):
    found, open_ends = set(), [op]
    while open_ends:
        one = open_ends.pop()
        if one not in found:
            found.add(one)
            open_ends += [*one.control_inputs, *(tensor.op for tensor in one.inputs)]
    return found


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "Adafactor", "SGD"])
def test_an_assignment_begins_where_the_one_before_has_ended(name):
    from accumtune.accumulation.engines.gradient_sums import one_variable_after_the_other

    def make():
        return keras.optimizers.SGD(0.1, momentum=0.9) if name == "SGD" else getattr(keras.optimizers, name)(0.1)

    chained = chained_assignments(make(), lambda optimizer: one_variable_after_the_other([optimizer], 1))
    assert len(chained) >= 3 and all(chained)
    # The negative control: on its own, TensorFlow may do them all at once.
    assert not all(chained_assignments(make(), lambda optimizer: contextlib.nullcontext()))


def address(total):
    # Through the buffer protocol: `numpy()` makes a copy, which lies elsewhere.
    return np.asarray(memoryview(total.read_value())).ctypes.data


def addresses_after_windows(windows=4, **choice):
    """Where the large accumulators of a small network lie after each of a few windows."""
    import accumtune

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(128), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    accumtune.accumulate(model, micro_batch_size=8, **choice)
    found = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            large = [total for total in self.model.train_function._accumulators if total.shape.num_elements() > 4096]
            found.append([address(total) for total in large])

    x = np.random.default_rng(0).normal(size=(24 * windows, 64))
    model.fit(x, x[:, :1], batch_size=24, verbose=0, callbacks=[Look()])
    return found


def test_accumulators_stay_where_they_are(monkeypatch):
    from accumtune.accumulation.engines import gradient_sums as sums

    found = addresses_after_windows()
    assert found[0] and all(addresses == found[0] for addresses in found)
    # The negative control: taken over, the gradients' memory is another one in each window.
    own = sums.put
    monkeypatch.setattr(sums, "put", lambda total, gradient, in_place: own(total, gradient, in_place=False))
    found = addresses_after_windows()
    assert any(addresses != found[0] for addresses in found)


def test_sums_of_two_passes_are_cleared_where_they_are(monkeypatch):
    from accumtune.accumulation.engines import gradient_sums as sums

    own, asked = sums.clear, []
    monkeypatch.setattr(
        sums, "clear", lambda totals, in_place: asked.append(in_place) or own(totals, in_place=in_place)
    )
    found = addresses_after_windows(whole_batch_loss=True)
    assert found[0] and all(addresses == found[0] for addresses in found)
    assert asked and all(asked)


def test_a_sum_is_cleared_in_its_own_memory():
    import tensorflow as tf

    from accumtune.accumulation.engines import gradient_sums as sums

    def stays(in_place):
        total = sums.accumulator(keras.Variable(np.ones((64, 128))))
        total.assign(tf.ones_like(total))
        before = address(total)
        tf.function(lambda: sums.clear([total], in_place=in_place))()
        assert not np.any(total)
        return address(total) == before

    assert stays(in_place=True)
    # The negative control: zeros that are taken over lie elsewhere. (Whether a window's next sum lies there too is the
    # allocator's choice, so whole windows are no control.)
    assert not stays(in_place=False)
