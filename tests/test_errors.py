"""Every error says what was received, what was expected and how to fix it.

`pytest tests/test_errors.py -v` lists all places where one is raised.
"""

import ast
import inspect
import re
from pathlib import Path

import pytest

import accumtune
from accumtune import errors

PACKAGE = Path(accumtune.__file__).parent
ERRORS = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, errors.AccumtuneError)
}
# What Python itself expects of modules and attributes, and what hooks of a JSON parser raise to the function around it.
PROTOCOLS = {
    ("__init__.py", "AttributeError"),
    ("accumulation/losses/leftovers.py", "AttributeError"),
    ("hypermodel.py", "AttributeError"),
    ("config/schema.py", "ValueError"),
    # What a store answers, and what a trial of a step shows: the function around it makes an error of it.
    ("config/sources.py", "LookupError"),
    ("accumulation/own_step/own_trial.py", "TypeError"),
    ("accumulation/own_step/own_trial_torch.py", "NotPerSampleError"),
    ("accumulation/own_step/own_trial_jax.py", "ConditionError"),
    ("accumulation/own_step/trial_samples.py", "NotPerSampleError"),
    # Keras's own load_weights raises it too, and callers expect that.
    ("worker/trial_weights.py", "ValueError"),
    # What a file holds cannot be written or read: whoever asked says what that means.
    ("tracking/small_files.py", "OSError"),
    ("tracking/tracking_uri.py", "ValueError"),
    ("worker/checkpoint/state_file.py", "TypeError"),
    ("worker/checkpoint/state_file.py", "ValueError"),
}
# An operating system without /proc, which nothing here runs on.
BROKEN_SYSTEM = {("memory/device_torch.py", "RuntimeError")}


def name_of(call):
    return ast.unparse(call.func).rpartition(".")[2]


def calls():
    """Every place that makes one of accumtune's errors."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and name_of(node) in ERRORS:
                yield pytest.param(node, id=f"{path.relative_to(PACKAGE)}:{node.lineno}-{name_of(node)}")


def faults(call):
    """Returns the faults of a call's message that can be seen in its text."""
    texts = [*call.args, *(keyword.value for keyword in call.keywords)]
    if any(isinstance(text, ast.Starred) for text in texts):
        return  # passed on from another process, where it was made
    if len(texts) != 3:
        yield "not three texts: received, expected, fix"
    for text in texts:
        if isinstance(text, ast.Constant) and not str(text.value).strip():
            yield "an empty text"
    received = "".join(str(part.value) for part in ast.walk(texts[0]) if isinstance(part, ast.Constant))
    if not re.match(r"['\"]?[A-Z{]", ast.unparse(texts[0]).removeprefix("f").lstrip("'\"")):
        yield f"no sentence: {received!r}"


@pytest.mark.parametrize("call", calls())
def test_an_error_says_what_was_received_what_was_expected_and_how_to_fix_it(call):
    assert not list(faults(call))


@pytest.mark.parametrize(
    "code, fault",
    [
        ("DataError('Received nothing.', 'at least one sample.')", "not three texts"),
        ("DataError('Received nothing.', '', 'add a sample.')", "an empty text"),
        ("DataError('nothing', 'at least one sample.', 'add a sample.')", "no sentence"),
    ],
)
def test_the_rule_would_notice_a_poor_message(code, fault):
    assert fault in "; ".join(faults(ast.parse(code, mode="eval").body))


def test_what_a_person_can_meet_is_in_the_tree():
    """No bare ValueError or RuntimeError leaves the package."""
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = name_of(node.exc)
                if name.endswith(("Error", "Exception")) and name not in ERRORS:
                    found.add((str(path.relative_to(PACKAGE)), name))
    assert found <= PROTOCOLS | BROKEN_SYSTEM


def test_the_drawing_shows_the_tree():
    drawn = re.findall(r"^(?P<indent> *(?:[│├└─ ]*))(?P<name>[A-Z]\w+Error)\b", errors.__doc__, re.MULTILINE)
    path, parents = [], {}
    for indent, name in drawn:
        depth = (len(indent) - 4) // 4
        path[depth:] = [name]
        parents[name] = path[depth - 1] if depth else "Exception"
    assert parents == {name: value.__bases__[0].__name__ for name, value in ERRORS.items()}


@pytest.mark.parametrize("name", ERRORS)
def test_a_public_error_is_described_and_prints_its_three_parts(name):
    error = ERRORS[name]("Received 3 apples.", "2 pears", "buy pears.")
    assert error.__doc__ and error.__doc__.strip()[0].isupper()
    assert str(error) == "Received 3 apples.\nExpected: 2 pears.\nFix: buy pears."
    assert (error.received, error.expected, error.fix) == ("Received 3 apples.", "2 pears", "buy pears.")


def test_a_text_that_ends_in_code_gets_no_full_stop():
    assert str(errors.DataError("Received 3.", 'one of "a", "b"', "call f(2)")).endswith('"b"\nFix: call f(2)')
