"""A configuration is read back as it was written, and invalid values are refused."""

import copy
import json
import os
import pickle

import numpy as np
import pytest
from made_config import config_of

from accumtune.config import TrainingConfig, load_config
from accumtune.errors import ConfigError
from accumtune.tracking.tracking_uri import absolute_uri, redacted, without_credentials


def test_saved_is_loaded(tmp_path):
    config = config_of(micro_batch_size=np.int64(8), peak_memory_bytes=1e6, data_shapes={"x": (np.int32(1), 2)})
    config.save(tmp_path / "deep" / "best_config.json")
    assert load_config(tmp_path / "deep" / "best_config.json") == config
    assert load_config(str(tmp_path / "deep")) == config, "a folder with a best_config.json"
    assert os.listdir(tmp_path / "deep") == ["best_config.json"]
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config) and hash(config) == hash(config)


def test_saving_goes_through_a_link(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    config_of().save(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink() and load_config(tmp_path / "real.json") == config_of()


def test_keys_are_attributes():
    config = config_of()
    values = json.loads(config.to_json())
    assert next(iter(values)) == "schema_version" and values["schema_version"] == 1
    assert {name: getattr(config, name) for name in values} == values


def test_it_reads_well():
    text = repr(config_of())
    for part in ("32 = 8 × 4", "width=16", "peak 40.0 MiB of 64.0 MiB", "1,234 samples/s", "val_loss 0.1234"):
        assert part in text
    assert "micro_batch_size" not in text and "\n" not in text and text.endswith("on CPU)")
    assert repr(config_of(hyperparameters={"learning_rate": 0.005023407808814854})).count("0.005023,") == 1
    bare = TrainingConfig(micro_batch_size=8, accumulation_steps=1, effective_batch_size=8, hyperparameters={})
    assert repr(bare) == "TrainingConfig(effective batch 8 = 8 × 1)"


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
        {"replicas": 0},
        {"replicas": 2},
        {"replicas": 4, "effective_batch_size": 130},
        {"seed": -1},
        {"seed": 1.0},
        {"fit_options": {"callbacks": []}},
        {"fit_options": {"class_weight": {"a": 1.0}}},
        {"fit_options": {"shuffle": "yes"}},
        {"trial": {"executions": 0}},
        {"trial": {"not_carried": "text"}},
        {"batch_coupled_layers": [1]},
        {"data_shapes": object()},
    ],
)
def test_what_makes_no_configuration_is_refused(values):
    with pytest.raises(ConfigError) as error:
        config_of(**values)
    assert error.value.expected and error.value.fix
