"""The ways to train that `whole_batch_loss.py` compares, each run in a process of its own as `ways.py` says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import ways


def way_to_train(way: str, workload: str, jit: bool, clock: Callable[[], float]) -> ways.Run:
    micro, steps = ways.WORKLOADS[workload]
    model = made(workload, jit)
    return floor(model, micro, steps, clock) if way == "floor" else fit(model, way, micro, steps, clock)


def fit(model: keras.Model, way: str, micro: int, steps: int, clock: Callable[[], float]) -> ways.Run:
    import accumtune

    x, y = ways.data(model, micro * steps)
    if way != "full":
        accumtune.accumulate(model, micro_batch_size=micro, whole_batch_loss=way == "two")

    def train(windows: int) -> list[float]:
        ends = ways.WindowClock(1, clock)
        given = ways.source(x, y, micro * steps, "keras" if way == "full" else "ours", windows)
        model.fit(**given, shuffle=False, verbose=0, callbacks=[ends])
        return ends.times

    return train


def floor(model: keras.Model, micro: int, steps: int, clock: Callable[[], float]) -> ways.Run:
    x, y = ways.data(model, micro)
    passes = {"tensorflow": tensorflow_floor, "jax": jax_floor, "torch": torch_floor}
    forward, backward, update = passes[keras.backend.backend()](model, x, y)

    def train(windows: int) -> list[float]:
        times = []
        for _ in range(windows):
            for _ in range(steps):
                forward()
            for step in range(steps):
                backward(step == 0)
            update()
            times.append(clock())
        return times

    return train


def made(workload: str, jit: bool) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = ways.build(workload)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-4), loss, jit_compile=jit)
    return model


# The floors: a forward pass; a forward and backward pass that adds to sums where they are; an update, waited for


def tensorflow_floor(model: Any, x: Any, y: Any) -> tuple[Callable[..., Any], ...]:
    import tensorflow as tf

    x, y = tf.constant(x), tf.constant(y)
    weights = model.trainable_weights
    model.optimizer.build(weights)
    sums = [tf.Variable(tf.zeros(weight.shape)) for weight in weights]

    def backward(is_first: bool) -> None:
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
        for total, gradient in zip(sums, tape.gradient(loss, weights), strict=True):
            (total.assign if is_first else total.assign_add)(tf.convert_to_tensor(gradient))

    def update() -> None:
        model.optimizer.apply_gradients(zip(sums, weights, strict=True))

    apply = tf.function(update)
    return (
        tf.function(lambda: model(x, training=True)),
        tf.function(backward),
        lambda: (apply(), model.optimizer.iterations.numpy()),
    )


def jax_floor(model: Any, x: Any, y: Any) -> tuple[Callable[..., Any], ...]:
    import jax

    model._symbolic_build(data_batch=(x, y, None))
    state = [variable.value for variable in model.non_trainable_variables]
    trainable, optimizer = ([v.value for v in part] for part in (model.trainable_variables, model.optimizer.variables))
    for variable in (*model.trainable_variables, *model.optimizer.variables):
        variable._value = None
    values, sums = [trainable, optimizer], list[Any]()

    def loss(trainable: Any, state: Any, x: Any, y: Any) -> Any:
        prediction, state = model.stateless_call(trainable, state, x, training=True)
        return model._compile_loss(y, prediction), state

    def gradients(trainable: Any, state: Any, x: Any, y: Any) -> Any:
        return jax.grad(loss, has_aux=True)(trainable, state, x, y)[0]

    def added(sums: Any, trainable: Any, state: Any, x: Any, y: Any) -> Any:
        return [total + one for total, one in zip(sums, gradients(trainable, state, x, y), strict=True)]

    call = jax.jit(lambda trainable, state, x: model.stateless_call(trainable, state, x, training=True))
    first, further = jax.jit(gradients), jax.jit(added, donate_argnums=(0,))
    apply = jax.jit(
        lambda trainable, optimizer, sums: model.optimizer.stateless_apply(optimizer, sums, trainable),
        donate_argnums=(0, 1, 2),
    )

    def backward(is_first: bool) -> None:
        data = (values[0], state, x, y)
        sums[:] = jax.block_until_ready(first(*data) if is_first else further(sums, *data))

    def update() -> None:
        values[:] = jax.block_until_ready(apply(*values, sums))

    return lambda: jax.block_until_ready(call(values[0], state, x)), backward, update


def torch_floor(model: Any, x: Any, y: Any) -> tuple[Callable[..., Any], ...]:
    import torch

    from accumtune.accumulation import optimizers
    from accumtune.accumulation.engines import grouped_update

    x, y = keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(y)
    weights = model.trainable_weights
    model.optimizer.build(weights)

    def forward() -> Any:
        with torch.no_grad():
            return model(x, training=True)

    def backward(is_first: bool) -> None:
        if is_first:
            model.zero_grad()
        model.compute_loss(x, y, model(x, training=True)).backward()  # `.grad` is the sum

    def update() -> None:
        # As accumtune has it: Keras's update of all variables at once takes half as long again.
        with torch.no_grad(), grouped_update.updating_in_groups(optimizers.updating(model.optimizer)):
            model.optimizer.apply([weight.value.grad for weight in weights], weights)

    return forward, backward, update


if __name__ == "__main__":
    ways.main(way_to_train, is_ordered=True)
