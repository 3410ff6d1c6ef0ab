"""Files that are broken, hostile or of another version raise one clear error."""

import json
import os
import pickle
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from made_config import config_of

from accumtune.config import TrainingConfig, load_config, schema
from accumtune.errors import AccumtuneError, ConfigError


def text_of(**changes):
    return json.dumps({**json.loads(config_of().to_json()), **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "JSON"),
        ("{", "JSON"),
        (b"\xff\xfe{}", "JSON"),
        ("[" * 100_000, "JSON|deep"),
        ('{"a":' * 100_000, "JSON|deep"),
        ("null", "not a valid"),
        ("[]", "not a valid"),
        ("{}", "required"),
        (text_of(surprise=1), "surprise"),
        (text_of(schema_version=2), "newer version"),
        (text_of(schema_version=1e99), "newer version"),
        (text_of(schema_version="1"), "not a valid"),
        (text_of(effective_batch_size=64), "times"),
        (text_of().replace("0.1234", "NaN"), "NaN"),
        (text_of().replace("0.1234", "1e999"), "finite"),
        (text_of().replace('"policy"', '"epochs"'), "twice"),
        (text_of().replace("0.1234", "1" * 5000), "JSON|digits"),
        ("x" * 2_000_000, "too many"),
        (pickle.dumps({"schema_version": 1}), "JSON"),
    ],
)
def test_broken_and_hostile_files_raise_one_clear_error(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path)
    assert "config.json" in str(error.value) and error.value.fix and len(str(error.value)) < 1000


def test_what_is_no_small_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate(2**40)  # reading it would end this process
    for name, message in (("pipe.json", "not a regular file"), ("large.json", "too many")):
        with pytest.raises(ConfigError, match=message):
            load_config(tmp_path / name)


@pytest.mark.parametrize("place", ["hyperparameters", "objective", "throughput_samples_per_second", "micro_batch_size"])
@pytest.mark.parametrize("number", [10**400, -(10**400), 10**5000], ids=("large", "small", "too_long_to_write"))
def test_whole_numbers_with_which_nothing_can_be_computed_are_refused(place, number):
    value = {"hyperparameters": {"width": number}, "objective": {"name": "x", "value": number}}.get(place, number)
    with pytest.raises(ConfigError):
        config_of(**{place: value})


# What a file could do to whoever loads it. Nothing of this may happen, whatever is in it.
FORBIDDEN = ("pickle.", "marshal.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.", "socket.")
SEEN = []


def watch(event, arguments):
    if event.startswith(FORBIDDEN):
        SEEN.append(event)


sys.addaudithook(watch)  # for good: hooks cannot be taken away


def loaded(content, path):
    """The configuration or the error, and nothing else; nothing was executed or unpickled."""
    path.write_bytes(content)
    SEEN.clear()
    try:
        result = load_config(path)
    except AccumtuneError as error:
        assert error.received and error.expected and error.fix and len(str(error)) < 1500
        result = error
    assert SEEN == []
    return result


def test_the_watch_sees_unpickling():
    SEEN.clear()
    pickle.loads(pickle.dumps(load_config))
    assert "pickle.find_class" in SEEN


BASE = config_of(
    seed=7, fit_options={"class_weight": {"0": 1.0}}, trial={"weights": "w.h5", "not_carried": ["callbacks"]}
).to_json().encode()  # fmt: skip
EDITS = st.lists(st.tuples(st.integers(0, len(BASE)), st.integers(0, 40), st.binary(max_size=12)), max_size=4)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=EDITS)
@example(edits=[(0, 0, b"\xef\xbb\xbf")])
@example(edits=[(0, len(BASE), pickle.dumps(load_config))])
def test_mutated_files_raise_nothing_else(tmp_path, edits):
    text = BASE
    for position, length, inserted in edits:
        text = text[:position] + inserted + text[position + length :]
    assert isinstance(loaded(text, tmp_path / "config.json"), (TrainingConfig, AccumtuneError))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(10**300, 10**320) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(sorted(json.loads(BASE))), value=JSON, inner=st.booleans())
def test_odd_values_are_read_back_as_they_are_or_refused(tmp_path, key, value, inner):
    values = json.loads(BASE)
    if inner and isinstance(values[key], dict) and values[key]:
        values[key][min(values[key])] = value
    else:
        values[key] = value
    config = loaded(json.dumps(values).encode(), tmp_path / "config.json")
    if isinstance(config, TrainingConfig):
        assert TrainingConfig.from_json(config.to_json()) == config
        repr(config), config.fit_arguments(), config.keras_arguments()


# Versions


def from_version_0(values):
    """As a file could have been before version 1: other names, no hyperparameters."""
    batch = {"micro_batch_size": values.pop("micro"), "accumulation_steps": values.pop("steps")}
    batch["effective_batch_size"] = batch["micro_batch_size"] * batch["accumulation_steps"]
    return {**values, **batch, "hyperparameters": {}}


@pytest.fixture
def migrations_from_before(monkeypatch):
    steps = {0: from_version_0, -1: lambda values: {**values, "steps": values["steps"] + 1}}
    monkeypatch.setattr(schema, "MIGRATIONS", steps)


def test_older_versions_are_migrated_step_by_step(tmp_path, migrations_from_before):
    for version, steps in ((0, 4), (-1, 3)):
        text = json.dumps({"schema_version": version, "micro": 8, "steps": steps, "epochs": 5})
        config = loaded(text.encode(), tmp_path / "old.json")
        assert config == TrainingConfig(
            micro_batch_size=8, accumulation_steps=4, effective_batch_size=32, hyperparameters={}, epochs=5
        )
        assert json.loads(config.to_json())["schema_version"] == 1


@pytest.mark.parametrize(
    "values", [{"micro": 8}, {"micro": "8", "steps": 4}, {"micro": 8, "steps": None}, {"micro": [], "steps": {}},
               {"micro": 0, "steps": 4}, {"micro": 8, "steps": 4, "surprise": 1}],
)  # fmt: skip
def test_a_broken_older_file_is_an_error_like_any_other(tmp_path, migrations_from_before, values):
    error = loaded(json.dumps({"schema_version": 0, **values}).encode(), tmp_path / "old.json")
    assert isinstance(error, ConfigError) and "old.json" in str(error)


def test_a_version_without_a_step_is_refused(tmp_path):
    error = loaded(b'{"schema_version": 0, "micro": 8, "steps": 4}', tmp_path / "old.json")
    assert isinstance(error, ConfigError)


def test_loading_imports_no_framework(tmp_path):
    config_of().save(tmp_path / "c.json")
    script = (
        "import sys; from accumtune.config import load_config; load_config(sys.argv[1])\n"
        "print(sorted({'mlflow', 'keras', 'tensorflow', 'jax', 'torch', 'matplotlib'} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", script, str(tmp_path / "c.json")], capture_output=True, text=True)
    assert told.stdout.strip() == "[]", told.stderr
