"""Every private name of Keras that is used is checked before a model accumulates."""

import ast
import re
from pathlib import Path

import keras
import numpy as np
import pytest

import accumtune
from accumtune.accumulation import compatibility
from accumtune.accumulation.data import batches
from accumtune.errors import CompatibilityError

PACKAGE = Path(accumtune.__file__).parent
TREES = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
DECLARED = {name.path for name in compatibility.NAMES}


@pytest.fixture(autouse=True)
def looked_at_anew():
    compatibility.faults.cache_clear()
    yield
    compatibility.faults.cache_clear()


def small_model():
    model = keras.Sequential([keras.Input((2,)), keras.layers.BatchNormalization(), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


def test_the_installed_keras_has_them_all():
    assert compatibility.faults(keras.backend.backend()) == ()


def test_a_missing_name_is_refused_before_anything_trains(monkeypatch):
    """Without `_moments` the moving statistics would be lost, and nothing would say so."""
    monkeypatch.delattr(keras.layers.BatchNormalization, "_moments")
    with pytest.raises(
        CompatibilityError, match=rf"Keras {keras.__version__}.*BatchNormalization\._moments is missing"
    ):
        accumtune.accumulate(small_model(), 2)


def test_a_name_that_is_there_but_not_used_is_refused(monkeypatch):
    monkeypatch.setattr(keras.layers.BatchNormalization, "call", lambda self, inputs, training=None, mask=None: inputs)
    with pytest.raises(CompatibilityError, match="does not use _moments"):
        accumtune.accumulate(small_model(), 2)


@pytest.mark.parametrize(
    "signature", ["def _symbolic_build(self, batch): ...", "def _symbolic_build(self, data_batch, iterator): ..."]
)
def test_a_changed_signature_is_refused(monkeypatch, signature):
    scope = {}
    exec(signature, scope)
    monkeypatch.setattr(keras.Model, "_symbolic_build", scope["_symbolic_build"])
    with pytest.raises(CompatibilityError, match="_symbolic_build takes"):
        accumtune.accumulate(small_model(), 2)


def update_state(self, y_true, y_pred, sample_weight=None): ...


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            lambda patch: patch.setitem(compatibility._INSTANCES, "a CompileLoss", ("_gone",)),
            "a CompileLoss has no _gone",
        ),
        (
            lambda patch: patch.setattr(keras.metrics.MeanMetricWrapper, "update_state", update_state),
            "MeanMetricWrapper.update_state does not use _fn",
        ),
        (lambda patch: patch.setattr(batches, "keras_fit", lambda: update_state), "not use _eval_epoch_iterator"),
    ],
    ids=["instance", "metric", "fit"],
)
def test_what_instances_lack_and_code_does_not_use_is_refused(monkeypatch, change, fault):
    change(monkeypatch)
    with pytest.raises(CompatibilityError, match=fault):
        accumtune.accumulate(small_model(), 2)


def test_a_model_that_accumulates_already_goes_on():
    """What accumulation itself replaces on a model is not taken for a change of Keras's."""
    model = accumtune.accumulate(small_model(), 2)
    model.fit(np.ones((4, 2)), np.ones((4, 1)), batch_size=4, verbose=0)
    accumtune.accumulate(model, 1)


def imports_of_keras_src(tree):
    """`module:name` of what is imported from inside Keras."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("keras.src"):
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", [path for path in TREES if "accumulation" in path.parts], ids=lambda path: path.stem)
def test_each_import_from_inside_keras_is_declared(path):
    declared = {part for name in DECLARED for part in (name, name.partition(":")[0])}
    for module, name in imports_of_keras_src(TREES[path]):
        known = (
            f"{module}:{name}" in declared
            or f"{module}.{name}" in declared
            or any(entry.startswith((f"{module}:{name}.", f"{module}.{name}:")) for entry in declared)
        )
        assert known, f"{path.name} uses {name} of {module}: declare it in compatibility.py"


def test_each_private_attribute_that_is_not_our_own_is_declared():
    """Own ones are defined somewhere in the package; those of `self`, torch and TensorFlow are not looked at."""
    nodes = [node for path, tree in TREES.items() if "accumulation" in path.parts for node in ast.walk(tree)]
    own = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    used = {node for node in nodes if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr)}
    own |= {node.attr for node in used if isinstance(node.value, ast.Name) and node.value.id == "self"}
    own |= {"_add_control_input", "_control_flow_context", "_is_stateful", "_foreach_norm", "_replace"}
    own |= {"_set_global_seed", "_rng", "_seed"}  # TensorFlow's eager context
    text = Path(compatibility.__file__).read_text()
    foreign = {node.attr for node in used if not node.attr.startswith("_accumtune")} - own
    assert {name for name in foreign if not re.search(rf"\b{name}\b", text)} == set()
