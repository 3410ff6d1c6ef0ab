"""The ways to train that `accumulation.py` compares, each run in a process of its own.

    python ways.py WAY WORKLOAD JIT CLOCK

reads a number of windows from each line of standard input, trains that many, and answers with a line of JSON: seconds
per window after the first, and the peak of memory in bytes. Memory is counted only without a clock ("none"), for one
line.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import counted_memory
import keras
import numpy as np
from keras import layers

# name: micro-batch size, accumulation steps
WORKLOADS = {"mlp": (32, 8), "cnn": (32, 8), "transformer": (8, 8), "mobilenet": (8, 4), "lstm": (16, 8)}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time, "none": lambda: 0.0}

# Trains so many windows; gives the times at which each ended.
Run = Callable[[int], list[float]]


def build(workload: str) -> keras.Model:
    if workload == "mlp":
        hidden = [layers.Dense(2048, activation="relu") for _ in range(4)]
        return keras.Sequential([keras.Input((784,)), *hidden, layers.Dense(10)])
    if workload == "cnn":
        convolutions = []
        for width in (32, 64, 128, 256):
            convolutions += [layers.Conv2D(width, 3, padding="same", activation="relu"), layers.MaxPooling2D()]
        tail = [layers.Flatten(), layers.Dense(128, activation="relu"), layers.Dense(10)]
        return keras.Sequential([keras.Input((32, 32, 3)), *convolutions, *tail])
    if workload == "transformer":
        inputs = keras.Input((128,), dtype="int32")
        x = layers.Embedding(8000, 256)(inputs)
        for _ in range(3):
            x = layers.LayerNormalization()(x + layers.MultiHeadAttention(4, 64)(x, x))
            x = layers.LayerNormalization()(x + layers.Dense(256)(layers.Dense(1024, activation="gelu")(x)))
        return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling1D()(x)))
    if workload == "mobilenet":
        return keras.applications.MobileNetV2((96, 96, 3), weights=None, classes=10, classifier_activation=None)
    inputs = keras.Input((64,), dtype="int32")
    x = layers.LSTM(128)(layers.Embedding(8000, 128)(inputs))
    return keras.Model(inputs, layers.Dense(10)(x))


def data(model: keras.Model, samples: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    shape = (samples, *model.input_shape[1:])
    is_tokens = "int" in str(model.inputs[0].dtype)
    x = generator.integers(1, 8000, shape, "int32") if is_tokens else generator.normal(size=shape).astype("float32")
    return x, generator.integers(0, 10, samples, "int32")


def way_to_train(way: str, workload: str, jit: bool, clock: Callable[[], float]) -> Run:
    import accumtune

    micro, steps = WORKLOADS[workload]
    keras.utils.set_random_seed(0)
    model = build(workload)
    optimizer = keras.optimizers.Adam(1e-4, gradient_accumulation_steps=steps if way == "keras" else None)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=jit)
    x, y = data(model, micro * steps)
    if way in ("limit", "floor"):
        make = {"tensorflow": tensorflow_passes, "jax": jax_passes, "torch": torch_passes}[keras.backend.backend()]
        forward_and_backward, update = make(model, x[:micro], y[:micro], jit, is_floor=way == "floor")

        def passes(windows: int) -> list[float]:
            times = []
            for _ in range(windows):
                for _ in range(steps - 1):
                    forward_and_backward()
                update()
                times.append(clock())
            return times

        return passes
    size = micro if way == "keras" else micro * steps
    if way == "ours":
        accumtune.accumulate(model, micro_batch_size=micro)

    given = functools.cache(functools.partial(source, x, y, size, way))

    def fit(windows: int) -> list[float]:
        ends = WindowClock(micro * steps // size, clock)
        model.fit(**given(windows), shuffle=False, verbose=0, callbacks=[ends])
        return ends.times

    return fit


def source(x: np.ndarray, y: np.ndarray, size: int, way: str, windows: int) -> dict[str, Any]:
    """The same window again and again, in the form that costs each way the least time and memory.

    Keras puts all arrays on the device under TensorFlow: its own ways get a pipeline.
    """
    if keras.backend.backend() == "tensorflow" and way != "ours":
        import tensorflow as tf

        return {"x": tf.data.Dataset.from_tensor_slices((x, y)).batch(size).repeat(windows)}
    return {"x": np.concatenate([x] * windows), "y": np.concatenate([y] * windows), "batch_size": size}


class WindowClock(keras.callbacks.Callback):
    """When each window had ended, its logs on the host."""

    def __init__(self, batches_per_window: int, clock: Callable[[], float]) -> None:
        super().__init__()
        self.times: list[float] = []
        self.batches_per_window = batches_per_window
        self.clock = clock

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if (batch + 1) % self.batches_per_window == 0:
            float(logs["loss"])
            self.times.append(self.clock())


# The limit of speed (passes and one update, nothing else) and the floor of memory (no update, gradients used up)


def tensorflow_passes(model, x, y, jit: bool, is_floor: bool):
    import tensorflow as tf

    x, y = tf.constant(x), tf.constant(y)
    model.optimizer.build(model.trainable_variables)
    accumulators = [tf.Variable(tf.zeros(v.shape)) for v in model.trainable_variables] if is_floor else []

    def gradients():
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
        return [tf.convert_to_tensor(value) for value in tape.gradient(loss, model.trainable_weights)]

    def update():
        model.optimizer.apply_gradients(zip(gradients(), model.trainable_weights, strict=True))

    if is_floor:
        used_up = tf.function(lambda: [tf.reduce_max(value) for value in gradients()], jit_compile=jit)
        return used_up, lambda: (used_up(), accumulators)
    update = tf.function(update, jit_compile=jit)
    return tf.function(gradients, jit_compile=jit), lambda: (update(), model.optimizer.iterations.numpy())


def jax_passes(model, x, y, jit: bool, is_floor: bool):
    import jax
    import jax.numpy as jnp

    model._symbolic_build(data_batch=(x, y, None))
    state = [v.value for v in model.non_trainable_variables]
    values = [[v.value for v in part] for part in (model.trainable_variables, model.optimizer.variables)]
    for variable in (*model.trainable_variables, *model.optimizer.variables):
        variable._value = None
    accumulators = [jnp.zeros_like(value) for value in values[0]] if is_floor else []

    def loss(trainable, state, x, y):
        prediction, state = model.stateless_call(trainable, state, x, training=True)
        return model._compile_loss(y, prediction), state

    def gradients(trainable, state, x, y):
        found = jax.value_and_grad(loss, has_aux=True)(trainable, state, x, y)[1]
        return [jnp.max(value) for value in found] if is_floor else found

    def apply(trainable, optimizer, state, x, y):
        return model.optimizer.stateless_apply(optimizer, gradients(trainable, state, x, y), trainable)

    gradients_only, apply = jax.jit(gradients), jax.jit(apply, donate_argnums=(0, 1))

    def forward_and_backward():
        jax.block_until_ready(gradients_only(values[0], state, x, y))

    def update():
        if is_floor:
            return forward_and_backward(), accumulators
        values[:] = jax.block_until_ready(apply(*values, state, x, y))

    return forward_and_backward, update


def torch_passes(model, x, y, jit: bool, is_floor: bool):
    import torch

    x, y = keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(y)
    model.optimizer.build(model.trainable_variables)

    def forward_and_backward():
        if not is_floor:  # there `.grad` is the accumulator
            model.zero_grad()
        model.compute_loss(x, y, model(x, training=True)).backward()

    def update():
        forward_and_backward()
        if is_floor:
            return
        weights = model.trainable_weights
        with torch.no_grad():
            model.optimizer.apply([weight.value.grad for weight in weights], weights)

    return forward_and_backward, update


def use_all_cores() -> None:
    """Where this was started on one core: few threads are made, which may then run wherever there is room."""
    keras.ops.ones(1)  # the backend makes its threads
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread), range(os.cpu_count() or 1))


def main(way_to_train: Callable[[str, str, bool, Callable[[], float]], Run], is_ordered: bool = False) -> None:
    """Answers standard input, as the module's docstring says, with what trains in the ways of a script.

    Args:
        is_ordered: whether TensorFlow runs its operations in one order where memory is counted.
    """
    way, workload, jit, clock = sys.argv[1:]
    if not (is_ordered and clock == "none" and keras.backend.backend() == "tensorflow"):  # it has run nothing yet
        use_all_cores()
    counting = counted_memory.counting(is_ordered) if clock == "none" else contextlib.nullcontext(lambda: 0)
    with counting as peak:
        run = way_to_train(way, workload, bool(int(jit)), CLOCKS[clock])
        for line in sys.stdin:
            times = run(int(line))
            seconds = (times[-1] - times[0]) / max(len(times) - 1, 1)
            print(json.dumps([seconds, peak()]), flush=True)


if __name__ == "__main__":
    main(way_to_train)
