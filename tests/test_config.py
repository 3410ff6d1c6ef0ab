"""What production imports: read back as written, refused in one way when broken, and put to work."""

import copy
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from accumtune.config import TrainingConfig, load_config, production
from accumtune.errors import AccumtuneError, BudgetTooSmallError, ConfigError, VerificationError
from accumtune.tracking.uris import absolute_uri, redacted, without_credentials

MIB = 2**20


def config_of(**values):
    defaults = {
        "micro_batch_size": 8,
        "accumulation_steps": 4,
        "effective_batch_size": 32,
        "hyperparameters": {"width": 16, "learning_rate": 0.01, "kind": "relu", "wide": True, "micro_batch_size": 8},
        "memory_budget_bytes": 64 * MIB,
        "peak_memory_bytes": 40 * MIB,
        "memory_source": "BFC allocator",
        "throughput_samples_per_second": 1234.5,
        "objective": {"name": "val_loss", "direction": "min", "value": 0.1234},
        "epochs": 3,
        "precision_policy": "float32",
        "backend": "tensorflow",
        "versions": {"keras": "3.15.1"},
        "device": "CPU",
        "data_shapes": {"x": [100, 8], "y": None},
        "policy": "quality",
        "reason": "It is the only candidate.",
        "source": {"experiment": "digits", "run_id": "abc", "tracking_uri": "http://me:secret@host:5000"},
    }
    return TrainingConfig(**defaults | values)


# The value


def test_saved_is_loaded(tmp_path):
    config = config_of(micro_batch_size=np.int64(8), peak_memory_bytes=1e6, data_shapes={"x": (np.int32(1), 2)})
    config.save(tmp_path / "deep" / "best_config.json")
    assert load_config(tmp_path / "deep" / "best_config.json") == config
    assert load_config(str(tmp_path / "deep")) == config, "a folder with a best_config.json"
    assert os.listdir(tmp_path / "deep") == ["best_config.json"]
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config) and hash(config) == hash(config)


def test_keys_are_attributes():
    config = config_of()
    values = json.loads(config.to_json())
    assert next(iter(values)) == "schema_version" and values["schema_version"] == 1
    assert {name: getattr(config, name) for name in values} == values


def test_it_reads_well():
    text = repr(config_of())
    for part in ("32 = 8 × 4", "width=16", "peak 40.0 MiB of 64.0 MiB", "1,234 samples/s", "val_loss 0.1234"):
        assert part in text
    assert "micro_batch_size" not in text


def test_a_password_is_left_out():
    assert "secret" not in config_of().to_json() and config_of().source["tracking_uri"] == "http://host:5000"


@pytest.mark.parametrize(
    ("uri", "clean"),
    [
        ("sqlite:///mlruns/mlflow.db", "sqlite:///mlruns/mlflow.db"),
        ("http://host:5000", "http://host:5000"),
        ("https://me:se%40cret@host/x?token=a&b=1", "https://host/x?b=1"),
        ("postgresql://me:p@ss@db:5432/mlflow?password=x", "postgresql://db:5432/mlflow"),
        ("http://[broken", "http://[broken"),
    ],
)
def test_addresses_without_credentials(uri, clean):
    assert without_credentials(uri) == clean


def test_credentials_in_text_are_replaced():
    text = redacted("cannot reach http://me:secret@host, password=secret&x=1, user@example.org")
    assert "secret" not in text and "host" in text and "user@example.org" in text


def test_secrets_of_the_environment_are_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    monkeypatch.setenv("DB_PASSWORD", "hunter2-hunter2")
    monkeypatch.setenv("SERVICE_CREDENTIALS", str(tmp_path))  # where they lie is no secret
    monkeypatch.setenv("KEYBOARD", "a-plain-value")
    text = redacted(f"os.environ: hf_of_nobody 'hunter2-hunter2' {tmp_path} a-plain-value")
    assert text == f"os.environ: ... '...' {tmp_path} a-plain-value"


def test_a_database_stays_the_same_when_the_folder_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("sqlite:///mlruns/mlflow.db") == f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    assert absolute_uri("sqlite:////a/b.db") == "sqlite:////a/b.db" and absolute_uri("http://h") == "http://h"


def test_fit_arguments():
    assert config_of().fit_arguments() == {"batch_size": 32, "epochs": 3}
    assert config_of(epochs=None).fit_arguments() == {"batch_size": 32}
    assert config_of().fit_arguments(epochs=9, verbose=0) == {"batch_size": 32, "epochs": 9, "verbose": 0}


def test_a_ragged_last_micro_batch_is_possible():
    assert config_of(accumulation_steps=4, effective_batch_size=30).effective_batch_size == 30


@pytest.mark.parametrize(
    "values",
    [
        {"micro_batch_size": 0},
        {"micro_batch_size": True},
        {"micro_batch_size": 8.0},
        {"micro_batch_size": "8"},
        {"effective_batch_size": 33},
        {"effective_batch_size": 24},
        {"hyperparameters": {"micro_batch_size": 9}},
        {"hyperparameters": {"width": [1]}},
        {"hyperparameters": {"rate": float("nan")}},
        {"hyperparameters": None},
        {"throughput_samples_per_second": float("inf")},
        {"throughput_samples_per_second": -1},
        {"objective": {"name": "x", "direction": "up"}},
        {"objective": {"other": 1}},
        {"learning_rate_scaling": "sqrt"},
        {"learning_rate_scaling": "cubic", "base_effective_batch_size": 8},
        {"epochs": 2.0},
        {"versions": {"keras": 3}},
        {"source": {"password": "x"}},
        {"schema_version": 0},
        {"data_shapes": object()},
    ],
)
def test_what_makes_no_configuration_is_refused(values):
    with pytest.raises(ConfigError) as error:
        config_of(**values)
    assert error.value.expected and error.value.fix


# Files


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
        (text_of(schema_version=2), "newer accumtune"),
        (text_of(schema_version=1e99), "newer accumtune"),
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


BASE = config_of().to_json().encode()
EDITS = st.lists(st.tuples(st.integers(0, len(BASE)), st.integers(0, 40), st.binary(max_size=12)), max_size=4)


@settings(max_examples=400, deadline=None)
@given(edits=EDITS)
@example(edits=[(0, 0, b"\xef\xbb\xbf")])
def test_mutated_files_raise_nothing_else(edits):
    text = BASE
    for position, length, inserted in edits:
        text = text[:position] + inserted + text[position + length :]
    try:
        assert isinstance(TrainingConfig.from_json(text), TrainingConfig)
    except AccumtuneError:
        pass


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(key=st.sampled_from(sorted(json.loads(BASE))), value=JSON)
def test_odd_values_are_read_back_as_they_are_or_refused(key, value):
    values = {**json.loads(BASE), key: value}
    try:
        config = TrainingConfig.from_json(json.dumps(values))
    except AccumtuneError:
        return
    assert TrainingConfig.from_json(config.to_json()) == config
    repr(config), config.fit_arguments()


def test_loading_imports_no_framework(tmp_path):
    config_of().save(tmp_path / "c.json")
    script = (
        "import sys; from accumtune.config import load_config; load_config(sys.argv[1])\n"
        "print(sorted({'mlflow', 'keras', 'tensorflow', 'jax', 'torch', 'matplotlib'} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", script, str(tmp_path / "c.json")], capture_output=True, text=True)
    assert told.stdout.strip() == "[]", told.stderr


# Sources


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """An MLflow store with one finished search and a registered model, as the tracker leaves them."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("store")
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    number = client.create_experiment("digits", artifact_location=(folder / "artifacts").as_uri())
    parents = []
    for width in (1, 2):
        parent = client.create_run(number, start_time=1000 * width, tags={"accumtune.kind": "search"}).info.run_id
        client.log_text(parent, config_of(hyperparameters={"width": width}).to_json(), "best_config.json")
        client.set_terminated(parent)
        parents.append(parent)
    child = client.create_run(number, tags={"mlflow.parentRunId": parents[0]}).info.run_id
    client.create_registered_model("net")
    client.create_model_version("net", source=f"runs:/{child}/model", run_id=child)
    client.set_registered_model_alias("net", "best", "1")
    return client, f"sqlite:///{folder}/mlflow.db", parents, child


def test_every_source_leads_to_the_configuration(store):
    client, uri, (first, second), child = store
    for source in (
        f"runs:/{first}/best_config.json", f"runs:/{first}", f"runs:/{child}", "models:/net@best", "models:/net/1",
        client.get_run(first), client.get_run(child),
    ):  # fmt: skip
        assert load_config(source, tracking_uri=uri).hyperparameters == {"width": 1}, source
    assert load_config("digits", tracking_uri=uri).hyperparameters == {"width": 2}, "the newest search"


@pytest.mark.parametrize(
    "source",
    ["runs:/none/best_config.json", "models:/none@best", "models:/net@none", "no_experiment", "no/file.json",
     "a\0.json", "x" * 5000, "/" * 5000 + "x.json", ".", 7, None, b"\xff"],
)  # fmt: skip
def test_sources_that_lead_nowhere(store, source):
    with pytest.raises(ConfigError) as error:
        load_config(source, tracking_uri=store[1])
    assert error.value.expected and error.value.fix


def test_an_artifact_that_is_not_there(store):
    for source in (f"runs:/{store[2][0]}/other.json", f"runs:/{store[2][0]}/../../../../etc/passwd"):
        with pytest.raises(ConfigError):
            load_config(source, tracking_uri=store[1])


def test_the_default_store(store, tmp_path, monkeypatch):
    import shutil

    import mlflow

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = store[2][0]
    assert not mlflow.is_tracking_uri_set()
    with pytest.raises(ConfigError, match="no tracking store"):
        load_config(f"runs:/{run}")
    assert os.listdir(tmp_path) == [], "nothing is made by looking"
    (tmp_path / "mlruns").mkdir()
    shutil.copy(store[1].removeprefix("sqlite:///"), tmp_path / "mlruns" / "mlflow.db")
    assert load_config(f"runs:/{run}").hyperparameters == {"width": 1}
    # MLflow's own setting comes first, and what is not there is looked for in the default.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    (tmp_path / "other.db").touch()
    assert load_config(f"runs:/{run}").hyperparameters == {"width": 1}


# Production


def build_model(hp):
    import keras

    model = keras.Sequential([
        keras.Input((64,)),
        keras.layers.Dense(hp.Int("width", 4, 4096, default=4), activation="relu"),
        keras.layers.Dense(1),
    ])  # fmt: skip
    model.compile(keras.optimizers.SGD(hp.Float("learning_rate", 1e-4, 1.0, default=1e-3)), "mse")
    return model


def data(samples=256):
    rng = np.random.default_rng(0)
    return rng.normal(size=(samples, 64)).astype("float32"), rng.normal(size=(samples, 1)).astype("float32")


def test_build_replays_the_hyperparameters_and_accumulates():
    import keras

    config = config_of(hyperparameters={"width": 16, "learning_rate": 0.05})
    x, y = data(64)
    keras.utils.set_random_seed(1)
    model = config.build(build_model)
    assert model.layers[0].units == 16 and float(model.optimizer.learning_rate) == pytest.approx(0.05)
    model.fit(x, y, verbose=0, shuffle=False, **config.fit_arguments(epochs=2))
    assert int(model.optimizer.iterations) == 4, "updates, not micro-steps"
    keras.utils.set_random_seed(1)
    plain = build_model(hyperparameters(config))
    plain.fit(x, y, verbose=0, shuffle=False, batch_size=32, epochs=2)
    for ours, theirs in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def hyperparameters(config):
    import keras_tuner

    hp = keras_tuner.HyperParameters()
    hp.values.update(config.hyperparameters)
    return hp


def test_build_scales_the_learning_rate_as_the_search_did():
    scaled = {"learning_rate_scaling": "sqrt", "base_effective_batch_size": 8}
    config = config_of(hyperparameters={"learning_rate": 0.05}, **scaled)
    assert float(config.build(build_model).optimizer.learning_rate) == pytest.approx(0.05 * 2)


def test_accumulate_takes_a_model_built_elsewhere():
    config = config_of()
    model = config.accumulate(build_model(hyperparameters(config)))
    model.fit(*data(32), verbose=0, **config.fit_arguments(epochs=1))
    assert int(model.optimizer.iterations) == 1


def test_another_precision_is_told():
    with pytest.warns(UserWarning, match="mixed_float16"):
        config_of(precision_policy="mixed_float16").build(build_model)


def profile_of(line=lambda size: 10 * MIB + size * MIB, limit=None, **other):
    """A profile as measurements would make it; sizes whose peak is over the limit ran out of memory."""
    from accumtune.memory.profile import Measurement, Profile

    def measurement(size, steps):
        peak = line(size) + (MIB if steps > 1 else 0)
        is_over = limit is not None and peak > limit
        seconds = None if is_over else steps * (0.01 + size * 0.0001)
        return Measurement(size, steps, None if is_over else peak, seconds, "BFC allocator", limit)

    points = [measurement(size, steps) for size in (1, 8, 16, 32) for steps in (1, 2, 4)]
    return Profile(tuple(points), **{"device": "CPU", "memory_source": "BFC allocator"} | other)


def test_another_budget_changes_the_micro_batch_and_nothing_else():
    config = config_of(micro_batch_size=32, accumulation_steps=1, hyperparameters={"width": 16})
    smaller = production.fitted(config, profile_of(device="GPU"), 32 * MIB, "tensorflow")
    batch = {"effective_batch_size": 32, "micro_batch_size": 16, "accumulation_steps": 2}
    assert {name: getattr(smaller, name) for name in batch} == batch
    assert smaller.hyperparameters == {"width": 16, **batch}
    assert smaller.peak_memory_bytes <= smaller.memory_budget_bytes == 32 * MIB and smaller.device == "GPU"
    assert "predicted" in smaller.memory_source and smaller.epochs == config.epochs
    assert TrainingConfig.from_json(smaller.to_json()) == smaller
    assert production.fitted(config, profile_of(), 1024 * MIB, "tensorflow").micro_batch_size == 32


def test_a_budget_in_which_nothing_fits():
    with pytest.raises(BudgetTooSmallError, match="Not even micro-batch 1 fits in 5.0 MiB on CPU"):
        production.fitted(config_of(), profile_of(), 5 * MIB, "tensorflow")


def test_what_holds_is_told_with_its_differences():
    config = config_of(peak_memory_bytes=19 * MIB, versions={"keras": "1.0", "unheard": "1"}, backend="jax")
    told = production.compared(config, profile_of(), "tensorflow", 0.1)
    assert told.peak_memory_bytes == pytest.approx(19 * MIB, rel=0.05)
    assert [line.split(":")[0] for line in told.differences] == ["backend", "keras"]
    assert "promised 19.0 MiB" in str(told) and "64.0 MiB: kept" in str(told) and "jax in the search" in str(told)


def test_what_does_not_hold_is_an_error():
    with pytest.raises(VerificationError, match="needs 19.0 MiB") as error:
        production.compared(config_of(peak_memory_bytes=15 * MIB), profile_of(), "tensorflow", 0.1)
    assert "10 % more than the 15.0 MiB" in error.value.expected and 'for_budget(\'64.0 MiB\'' in error.value.fix
    assert production.compared(config_of(peak_memory_bytes=15 * MIB), profile_of(), "tensorflow", 0.3)
    tight = config_of(memory_budget_bytes=16 * MIB, peak_memory_bytes=15 * MIB)
    for profile in (profile_of(), profile_of(limit=16 * MIB)):
        with pytest.raises(VerificationError, match="does not fit in 16.0 MiB on CPU"):
            production.compared(tight, profile, "tensorflow", 0.1)
    unlimited = config_of(memory_budget_bytes=None)
    with pytest.raises(VerificationError, match="does not fit in its memory"):
        production.compared(unlimited, profile_of(limit=16 * MIB), "tensorflow", 0.1)


def test_a_real_profile_moves_and_verifies_a_configuration():
    # Few divisors, few probes: each is a process.
    batch = {"micro_batch_size": 3, "accumulation_steps": 1, "effective_batch_size": 3}
    config = config_of(**batch, hyperparameters={"width": 2048, "learning_rate": 0.01}, peak_memory_bytes=None)
    moved = config.for_budget("512MiB", build_model, *data())
    assert moved.effective_batch_size == 3 == moved.micro_batch_size * moved.accumulation_steps
    told = moved.verify(build_model, *data())
    assert told.peak_memory_bytes == pytest.approx(moved.peak_memory_bytes, rel=0.1) and "promised" in str(told)
    assert told.throughput_samples_per_second > 0
