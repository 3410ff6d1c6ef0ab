"""Steps of Keras's examples: equal to their own training at the effective batch, or refused."""


from pathlib import Path

import keras
import numpy as np
import pytest
from draws_in_parts import draws_in_parts
from example_steps import EXACT, EXACT_BUT_FOR_NORMALIZATION
from keras import ops
from own_steps import BACKEND
from refused_steps import REFUSED

import accumtune
from accumtune.accumulation import accumulate
from accumtune.accumulation.own_step import own_train_step
from accumtune.errors import CustomTrainStepError

ALL_EXACT = (*EXACT, *EXACT_BUT_FOR_NORMALIZATION)
PARTS = {12: (5, 5, 2)}


def made(example, *normalization, eager=False):
    keras.utils.set_random_seed(7)
    model = example.step(*normalization)
    model.compile(optimizer=keras.optimizers.SGD(0.05, momentum=0.9), run_eagerly=eager)
    return model


def trained(model, data):
    history = model.fit(**data, batch_size=12, verbose=0, shuffle=False).history
    variables = [*model.variables, *model.optimizer.variables]
    return [(one.path, ops.convert_to_numpy(one.value)) for one in variables], history


def assert_equal(found, expected, tolerance=1e-7):
    for (name, value), (_, other) in zip(expected, found, strict=True):
        np.testing.assert_allclose(other, value, rtol=tolerance, atol=tolerance / 10, err_msg=name)


def rows_of_the_page():
    """The table of the documentation: names, what is special in the step, what came of it."""
    outcomes = [(one, "exact" if one.reduction == "mean" else "exact, a sum") for one in ALL_EXACT]
    outcomes += [(one, "refused") for one in REFUSED]
    rows = []
    for example, outcome in outcomes:
        special = example.step.__doc__.split(": ", 1)[1].split("\n")[0].rstrip(".")
        with_it = ", with BatchNormalization in ghost batches" if example in EXACT_BUT_FOR_NORMALIZATION else ""
        rows.append(f"| {', '.join(example.names)} | {special} | {outcome}{with_it} |")
    return rows


def test_the_table_of_the_documentation_is_that_of_these_tests():
    page = Path(accumtune.__file__).parent / "docs" / "pages" / "concepts" / "own-train-step.md"
    table = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    assert table[1:] == rows_of_the_page()  # below the titles
    assert sum(len(example.names) for example in ALL_EXACT) == 25


def ids(examples):
    return [example.names[0].replace(" ", "-") for example in examples]


@pytest.mark.parametrize("example", ALL_EXACT, ids=ids(ALL_EXACT))
def test_an_example_is_exact_with_its_draws(example):
    """With dropout and noise on: the plain training draws, for each micro-batch of a batch, what that one draws."""
    data = example.data()
    model = made(example, eager=BACKEND == "tensorflow")
    with draws_in_parts(PARTS, example.draws):
        expected, history = trained(model, data)
    model = accumulate(made(example), micro_batch_size=5)
    found, logs = trained(model, data)
    assert_equal(found, expected)
    for name in history:
        np.testing.assert_allclose(logs[name], history[name], rtol=1e-6, atol=1e-7, err_msg=name)
    assert own_train_step.certificate_of(model).reduction == example.reduction


@pytest.mark.parametrize("example", EXACT_BUT_FOR_NORMALIZATION, ids=ids(EXACT_BUT_FOR_NORMALIZATION))
def test_an_example_with_batch_normalization_is_one_training_in_ghost_batches(example):
    """Whatever the micro-batch, here all 12 samples or one ghost batch of 4."""
    whole = made(example, keras.layers.BatchNormalization(), eager=BACKEND == "tensorflow")
    whole = accumulate(whole, micro_batch_size=12, ghost_batch_size=4)
    with draws_in_parts({12: (4, 4, 4)}, example.draws):
        expected, _ = trained(whole, example.data())
    model = accumulate(made(example, keras.layers.BatchNormalization()), micro_batch_size=4, ghost_batch_size=4)
    if BACKEND == "jax" and example.names[0] in ("siamese_network", "simsiam"):
        with pytest.raises(CustomTrainStepError, match="several times"):
            trained(model, example.data())
        return
    assert_equal(trained(model, example.data())[0], expected)


@pytest.mark.parametrize("example", REFUSED, ids=ids(REFUSED))
def test_an_example_is_refused_by_name(example):
    model, data = made(example), example.data()
    with pytest.raises(CustomTrainStepError, match=example.words) as caught:
        own_train_step.certify(model, *data.values())
    assert example.step.__name__ in str(caught.value) and "Fix:" in str(caught.value)
