"""Nothing is traced or compiled again for a ragged window."""

import keras
import numpy as np
import pytest
from equality import BACKEND, EFFECTIVE, dense, regression

from accumtune.accumulation import accumulate

# Windows of 8, 8 and 5 samples.
RAGGED = [({"micro_batch_size": 3}, EFFECTIVE), ({"accumulation_steps": 2}, EFFECTIVE // 2)]


class CountsTraces(keras.layers.Layer):
    traces = 0

    def call(self, inputs):
        type(self).traces += 1
        return inputs


@pytest.mark.skipif(BACKEND == "torch", reason="torch runs eagerly")
@pytest.mark.parametrize(("how", "batch_size"), RAGGED)
def test_nothing_is_traced_again_for_the_ragged_window_of_each_epoch(how, batch_size):
    CountsTraces.traces = 0
    model = accumulate(dense(layers=[CountsTraces()])(), **how)
    model.fit(**regression(), batch_size=batch_size, epochs=1, verbose=0)
    after_one = CountsTraces.traces
    model.fit(**regression(), batch_size=batch_size, epochs=3, verbose=0)
    assert CountsTraces.traces == after_one
    assert after_one <= 8


def traces(model):
    """How often the functions of a window were traced so far: of one micro-batch, to begin, to go on, to update."""
    count = {"tensorflow": "experimental_get_tracing_count", "jax": "_cache_size"}[BACKEND]
    engine = model.train_function
    begin = engine._begin.values() if BACKEND == "jax" else [engine._first]
    groups = [engine._only], begin, [engine._next], [engine._update]
    return [sum(getattr(function, count)() for function in functions) for functions in groups]


@pytest.mark.skipif(BACKEND == "torch", reason="see the next test")
@pytest.mark.parametrize("layers", [[], [keras.layers.BatchNormalization, lambda: keras.layers.Dropout(0.2)]])
@pytest.mark.parametrize(("how", "batch_size"), RAGGED)
def test_each_function_is_traced_once_per_shape(how, batch_size, layers):
    """Micro-batches of 3 + 3 + 2 and 3 + 2, or of 4 + 4 and 4 + 1: further ones have two shapes, first ones one.

    On JAX first ones run the program of further ones; before, a small one makes sums of 0.
    """
    model = accumulate(dense(layers=[make() for make in layers], metrics=["mae"])(), **how)
    for epochs in (1, 3):
        model.fit(**regression(), batch_size=batch_size, epochs=epochs, verbose=0)
        assert traces(model) == [0, 1, 2, 1]


@pytest.mark.skipif(BACKEND != "jax", reason="elsewhere the first micro-step has a function of its own")
def test_an_own_step_has_one_program_for_all_micro_steps_but_the_last():
    class OwnStep(keras.Sequential):
        def train_step(self, *arguments):
            return super().train_step(*arguments)

    model = OwnStep([keras.Input((4,)), keras.layers.BatchNormalization(), keras.layers.Dense(2)])
    model.compile("sgd", "mse", metrics=["mae"])
    accumulate(model, 2).fit(**regression(EFFECTIVE), batch_size=EFFECTIVE, epochs=3, verbose=0)
    engine = model.train_function
    functions = engine._first, *engine._begin.values(), engine._next, engine._last
    assert [function._cache_size() for function in functions] == [0, 1, 1, 1]


def counting_compiler(monkeypatch):
    import torch
    from torch._dynamo.testing import CompileCounter

    counter, compiled = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiled(function, backend=counter))
    return counter


@pytest.mark.skipif(BACKEND != "torch", reason="see the test before")
def test_torch_compiles_nothing_again_for_what_a_micro_batch_counts_for(monkeypatch):
    """Whether the micro-batches' weights differ or are all equal, the compiled code is the same."""
    counted = []
    for weights in (np.ones(EFFECTIVE), np.linspace(0.1, 2.0, EFFECTIVE)):
        counter = counting_compiler(monkeypatch)
        loss = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
        model = accumulate(dense(loss, jit_compile=True)(), 2)
        model.fit(**regression(EFFECTIVE, sample_weight=weights), batch_size=EFFECTIVE, epochs=2, verbose=0)
        counted.append(counter.frame_count)
        monkeypatch.undo()
    assert counted[0] == counted[1] > 0


@pytest.mark.skipif(BACKEND != "torch", reason="see the test before")
def test_torch_compiles_nothing_again_for_the_ragged_window_of_each_epoch(monkeypatch):
    """With a compiler that only counts: torch's own wants one for C++."""
    counter = counting_compiler(monkeypatch)
    model = accumulate(dense(jit_compile=True)(), 3)
    model.fit(**regression(), batch_size=EFFECTIVE, epochs=1, verbose=0)
    after_one = counter.frame_count
    model.fit(**regression(), batch_size=EFFECTIVE, epochs=3, verbose=0)
    assert counter.frame_count == after_one > 0
    model.fit(*(array[:7] for array in regression().values()), batch_size=7, verbose=0)  # a shape that is new
    assert counter.frame_count > after_one
