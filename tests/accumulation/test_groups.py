"""Updates on torch in groups of variables: the same numbers, without temporary values of all variables at once."""

import contextlib

import equality
import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accumtune.accumulation.engines import grouped_update as groups

torch_only = pytest.mark.skipif(equality.BACKEND != "torch", reason="torch's optimizers")


@given(st.lists(st.integers(0, 100), min_size=1))
def test_groups_are_neighbours_and_none_is_larger_than_the_largest_variable(sizes):
    parts = groups.groups(sizes)
    assert [index for part in parts for index in range(*part.indices(len(sizes)))] == list(range(len(sizes)))
    assert max(sum(sizes[part]) for part in parts) == max(sizes)


def updated(optimizer, around):
    """Eight matrices and biases after two updates, and the most memory that the second took beside them."""
    import torch

    random = np.random.default_rng(0)
    shapes = [(64, 64), (64,)] * 8
    variables = [keras.Variable(random.normal(size=shape)) for shape in shapes]
    optimizer.build(variables)
    for _ in range(2):
        gradients = [keras.ops.convert_to_tensor(random.normal(size=shape)) for shape in shapes]
        profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        with torch.no_grad(), profile, around([optimizer]):
            optimizer.apply(gradients, variables)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return [equality.as_array(variable) for variable in (*variables, *optimizer.variables)], held.max()


def at_once(optimizers):
    return contextlib.nullcontext()


@torch_only
@pytest.mark.parametrize("name", ["Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "Lion", "Nadam", "RMSprop", "SGD"])
def test_groups_of_variables_are_updated_as_all_of_them(name):
    make = getattr(keras.optimizers, name)
    ours, in_groups = updated(make(0.1), groups.updating_in_groups)
    plain, whole = updated(make(0.1), at_once)
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_array_equal(one, other)
    if name == "Adam":
        assert in_groups < whole / 4  # the negative control: Keras's own holds temporary values of all eight


@torch_only
def test_what_moves_a_number_of_its_own_is_called_once(monkeypatch):
    """The negative control: in groups, Nadam multiplies its product of momenta once for each."""
    plain, _ = updated(keras.optimizers.Nadam(0.1), at_once)
    monkeypatch.setattr(groups, "_ONCE_PER_UPDATE", ("none",))
    wrong, _ = updated(keras.optimizers.Nadam(0.1), groups.updating_in_groups)
    assert any((one != other).any() for one, other in zip(wrong, plain, strict=True))


@torch_only
def test_an_optimizer_of_the_user_keeps_its_own_step():
    class Own(type(keras.optimizers.Adam())):
        calls = 0

        def _parallel_update_step(self, grads, variables, learning_rate):
            Own.calls += 1
            super()._parallel_update_step(grads, variables, learning_rate)

    updated(Own(0.1), groups.updating_in_groups)
    assert Own.calls == 2
