"""Denominators that can be found with predictions without values, and those that cannot."""

import numpy as np
import pytest
from equality import BACKEND

if BACKEND != "torch":
    pytest.skip("the other backends leave out what is not needed", allow_module_level=True)

import torch

from accumtune.accumulation.losses.blank_predictions import BlankPredictions

X = {"tokens": torch.zeros((3, 4)), "absent": None}


def blank(y_pred=None, x=X):
    predictions = BlankPredictions()
    predictions.learn(x, {"one": torch.ones((3, 2), dtype=torch.float64)} if y_pred is None else y_pred)
    return predictions


def test_what_does_not_depend_on_values_is_counted_for_any_number_of_samples():
    def count(y_pred):
        one = y_pred["one"]
        assert one.dtype == torch.float64
        return [torch.tensor(float(one.shape[0])), torch.ones_like(one).shape[1]]

    assert blank().counts({"tokens": torch.zeros((7, 4)), "absent": None}, count) == [7.0, 2.0]
    assert blank().counts({"tokens": torch.zeros((3, 5)), "absent": None}, count) is None  # never seen


def written(one):
    known = torch.zeros((3, 2), dtype=torch.float64)
    known[:] = one
    return known.sum()


def added(one):
    return torch.zeros((), dtype=torch.float64).add_(one.sum())


def given_out(one):
    known = torch.zeros((3, 2), dtype=torch.float64)
    torch.add(one, one, out=known)
    return known.sum()


LOOKS = {
    "unknown": lambda one: one.sum(),
    "item": lambda one: torch.tensor(one.sum().item()),
    "branch": lambda one: torch.tensor(1.0 if one.sum() > 1 else 2.0),
    "numpy": lambda one: torch.tensor(np.asarray(one).sum()),
    "written": written,
    "added": added,
    "out": given_out,
    "fails": lambda one: one[7],
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_what_depends_on_values_takes_the_models_own_predictions(look):
    assert blank().counts(X, lambda y_pred: [look(y_pred["one"])]) is None


def test_predictions_without_an_axis_of_samples_are_not_learnt():
    predictions = blank({"one": torch.ones((3, 2)), "all": torch.ones(())})
    assert predictions.counts(X, lambda y_pred: [torch.tensor(1.0)]) is None
