"""A step's operations run in one order if memory is measured, and train the same as in any order."""

import keras
import numpy as np
import pytest
from equality import BACKEND, FLOAT32, FLOAT64, assert_same_training, train
from precision import set_precision

if BACKEND != "tensorflow":
    pytest.skip("TensorFlow's graphs", allow_module_level=True)

import tensorflow as tf

from accumtune import accumulate
from accumtune.accumulation.engines import engine_tensorflow
from accumtune.memory.cpu_simulation import operation_order

SAMPLES = 12


class Seen(keras.metrics.Metric):
    """Counts the samples that it gets: more than there are if a step is run twice."""

    def __init__(self):
        super().__init__(name="seen")
        self.number = self.add_weight(initializer="zeros", name="number")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.number.assign_add(tf.cast(tf.shape(y_true)[0], self.number.dtype))

    def result(self):
        return tf.identity(self.number)


def branches():
    """Two branches that meet twice, of convolutions wide enough to count, and all that updates do."""
    keras.utils.clear_session()  # the same names again
    layers = keras.layers
    inputs = keras.Input((8, 8, 3))
    first = layers.Conv2D(32, 3, padding="same", activation="relu", kernel_regularizer="l2")(inputs)
    pooled = layers.Conv2D(32, 3, padding="same")(layers.MaxPooling2D()(first))
    pooled = layers.Dropout(0.3, seed=3)(layers.BatchNormalization()(pooled))
    joined = layers.Concatenate()([layers.Conv2DTranspose(24, 2, strides=2)(pooled), first])
    tokens = layers.Reshape((64, 56))(joined)
    recurrent = layers.LSTM(20)(tokens)
    outputs = layers.Dense(2)(layers.Concatenate()([recurrent, layers.GlobalMaxPooling2D()(joined)]))
    model = keras.Model(inputs, outputs)
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.1, global_clipnorm=0.5, use_ema=True)
    model.compile(optimizer, "mse", metrics=["mae", Seen()])
    return model


def data():
    random = np.random.default_rng(0)
    return {"x": random.normal(size=(SAMPLES, 8, 8, 3)), "y": random.normal(size=(SAMPLES, 2))}


def validation():
    """Batches of 4, 4 and 2."""
    return {"validation_data": tuple(value[:10] for value in data().values()), "validation_batch_size": 4}


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are put in order from here on."""
    found = []

    def spy(graph, results):
        put_in_order(graph, results)
        found.append(graph)

    put_in_order = operation_order.put_in_order
    monkeypatch.setattr(operation_order, "put_in_order", spy)
    monkeypatch.setattr(engine_tensorflow, "ordering", operation_order)
    return found


def counted(graph):
    """Operations that take memory and are needed, of kinds that oneDNN does not merge with another."""
    return [
        op
        for op in graph.get_operations()
        if op.type.startswith(("Conv", "MaxPool", "ConcatV2", "Mul", "Sqrt", "Assign", "ResourceStridedSliceAssign"))
        and any(map(operation_order._is_large, (*op.inputs, *op.outputs)))
        and (not op.outputs or any(tensor.consumers() for tensor in op.outputs))
    ]


def order_of(graph):
    """The operations that count in the only order in which they can run, or None where there are several."""
    operations = graph.get_operations()
    depth = {}
    for op in tf_sorted(operations):
        before = [depth[tensor.op] for tensor in op.inputs] + [depth[other] for other in op.control_inputs]
        depth[op] = 1 + max(before, default=0)
    wanted = sorted(counted(graph), key=depth.get)
    for op, following in zip(wanted, wanted[1:], strict=False):
        if not waits_for(following, op):
            return None
    return [op.name for op in wanted]


def tf_sorted(operations):
    done, order = set(), []

    def visit(op):
        stack = [(op, False)]
        while stack:
            op, is_open = stack.pop()
            if is_open:
                order.append(op)
            elif op not in done:
                done.add(op)
                stack.append((op, True))
                stack += [(other, False) for other in (*[t.op for t in op.inputs], *op.control_inputs)]

    for op in operations:
        visit(op)
    return order


def waits_for(op, other):
    seen, open_ones = set(), [op]
    while open_ones:
        for before in {*(tensor.op for tensor in open_ones[-1].inputs), *open_ones.pop().control_inputs} - seen:
            if before is other:
                return True
            seen.add(before)
            open_ones.append(before)
    return False


@pytest.mark.parametrize("size", [12, pytest.param(5, marks=pytest.mark.slow)])
def test_training_in_order_is_the_same_training(graphs, monkeypatch, size):
    ordered = train(branches, data(), micro_batch_size=size, batch_size=12)
    assert graphs
    monkeypatch.setattr(engine_tensorflow, "ordering", None)
    assert_same_training(ordered, train(branches, data(), micro_batch_size=size, batch_size=12), FLOAT64)


def is_of_training(graph):
    return any("Grad" in op.type for op in graph.get_operations())


def test_validation_is_in_order_and_the_same(graphs, monkeypatch):
    ordered = train(branches, data(), micro_batch_size=4, batch_size=12, **validation())
    orders = [order_of(graph) for graph in graphs if not is_of_training(graph)]
    assert orders and all(len(order) > 5 for order in orders)
    assert set(ordered.history["val_seen"]) == {10}
    monkeypatch.setattr(engine_tensorflow, "ordering", None)
    assert_same_training(ordered, train(branches, data(), micro_batch_size=4, batch_size=12, **validation()), FLOAT64)
    # The negative control: what Keras makes may run in several orders.
    monkeypatch.setattr(engine_tensorflow, "ordering", operation_order)
    monkeypatch.setattr(operation_order, "_sequence", lambda operations, waits_for: [])
    graphs.clear()
    train(branches, data(), micro_batch_size=4, batch_size=12, epochs=1, **validation())
    assert None in [order_of(graph) for graph in graphs if not is_of_training(graph)]


def test_an_own_test_step_is_kept(graphs):
    def test_step(batch):
        return {**keras.Model.test_step(model, batch), "own": tf.constant(7.0)}

    model = branches()
    model.test_step = test_step
    accumulate(model, 4)
    history = model.fit(**data(), batch_size=12, verbose=0, **validation()).history
    assert history["val_own"] == [7.0] and model.test_step is test_step


@pytest.mark.slow
def test_there_is_one_order_for_every_size(graphs, monkeypatch):
    orders = []
    for size in (2, 6):
        graphs.clear()
        train(branches, data(), micro_batch_size=size, batch_size=12, epochs=1)
        orders.append([order_of(graph) for graph in graphs])
        assert len(graphs) == 3 and all(len(order) > 10 for order in orders[-1])  # first, further micro-steps, update
    assert orders[0] == orders[1]
    # The negative control: as traced, they may run in several orders.
    monkeypatch.setattr(operation_order, "_sequence", lambda operations, waits_for: [])
    graphs.clear()
    train(branches, data(), micro_batch_size=2, batch_size=12, epochs=1)
    assert [order_of(graph) for graph in graphs] == [None, None, None]


def test_a_gradient_is_summed_before_the_next_one_is_made(graphs):
    train(branches, data(), micro_batch_size=2, batch_size=12, epochs=1)
    order = order_of(graphs[1])  # a further micro-step
    made = [index for index, name in enumerate(order) if name.endswith("BackpropFilter") and "Transpose" not in name]
    added = [index for index, name in enumerate(order) if name.startswith("AssignAdd")]
    assert len(made) > 1
    for first, following in zip(made, made[1:], strict=False):
        assert any(first < index < following for index in added)


def test_what_nobody_needs_is_still_left_out(graphs):
    def function(x):
        tf.linalg.matmul(x, x, name="unused")
        return tf.linalg.matmul(tf.linalg.matmul(x, x, name="used"), x, name="last")

    compiled = operation_order.compiled(function, tf.function)
    compiled(tf.ones([300, 300]))
    (graph,) = graphs
    unused, last = (graph.get_operation_by_name(name) for name in ("unused", "last"))
    assert not waits_for(last, unused) and not waits_for(graph.get_operation_by_name("used"), unused)


def test_where_it_cannot_run_in_order_it_runs_in_any(graphs, monkeypatch):
    """oneDNN makes one operation of a convolution and its bias: what is between them would wait for itself."""
    monkeypatch.setattr(operation_order, "_may_be_merged", lambda op: False)
    monkeypatch.setattr(operation_order, "_VIEWS", frozenset())
    monkeypatch.setattr(operation_order, "_is_large", lambda tensor: True)
    set_precision("float32")  # oneDNN's own

    def build():
        layers = [keras.layers.Conv2D(8, 3, activation="relu") for _ in range(2)]
        model = keras.Sequential([keras.Input((8, 8, 3)), *layers, keras.layers.Flatten(), keras.layers.Dense(2)])
        model.compile("sgd", "mse", metrics=[Seen()])
        return model

    fallen_back = []
    call = operation_order._Ordered.__call__

    def spy(self, *args):
        results = call(self, *args)
        function = "validation" if isinstance(args[0], list | tf.data.Iterator) else "training"
        fallen_back.append((function, self._ordered is self._plain))
        return results

    monkeypatch.setattr(operation_order._Ordered, "__call__", spy)
    ordered = train(build, data(), micro_batch_size=4, batch_size=12, **validation())
    assert {function for function, is_plain in fallen_back if is_plain} >= {"training", "validation"}
    assert set(ordered.history["seen"]) == {12} and set(ordered.history["val_seen"]) == {10}
    monkeypatch.setattr(engine_tensorflow, "ordering", None)
    assert_same_training(ordered, train(build, data(), micro_batch_size=4, batch_size=12, **validation()), FLOAT32)


def test_a_graph_that_makes_variables_is_left_as_it_is(graphs):
    """As the first graph of a train_step of a model's own, whose optimizer makes its slots in it."""
    made = []

    def function(x):
        if not made:
            made.append(tf.Variable(lambda: tf.reshape(tf.ones([4]) * tf.ones([4]), [2, 2])))
        return tf.linalg.matmul(x, x) + made[0]

    operation_order.compiled(function, tf.function)(tf.ones([2, 2]))
    first, second = graphs
    assert any(op.type == "VarIsInitializedOp" for op in first.get_operations())
    assert not any(op.control_inputs for op in first.get_operations() if op.type == "MatMul")
    assert any(op.control_inputs for op in second.get_operations())
