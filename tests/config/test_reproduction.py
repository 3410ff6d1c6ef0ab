"""A search here, and a fresh process in another folder that has best_config.json and the user's module, no more."""

import json
import os
import shutil
import sys
from dataclasses import replace

import forked
import numpy as np
import pytest
from made_config import config_of

import accumtune
from accumtune.errors import ConfigError

MODULE = """
import keras, numpy as np

def build_model(hp):
    model = keras.Sequential([
        keras.Input((16,)),
        keras.layers.Dense(hp.Choice("width", [128, 256]), activation="relu"),
        keras.layers.Dropout(0.2),
        keras.layers.Dense(2),
    ])
    model.compile(
        keras.optimizers.Adam(hp.Float("learning_rate", 1e-3, 1e-2, sampling="log")),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model

def load():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(330, 16)).astype("float32")
    y = (x[:, 0] * x[:, 1] > 0).astype("int32")
    return x[:250], x[250:], y[:250], y[250:]
"""
# 240 updates: a peak is the highest of all of them, and the first 16 may all stay a tenth below it.
SEARCH = """
import accumtune, train
x, x_val, y, y_val = train.load()
tuner = accumtune.RandomSearch(
    train.build_model, "val_loss", max_trials=2, seed=11, memory_budget="16MiB", micro_batch_sizes=(16, 32),
    accumulation_steps=(2, 4), tracking_uri=False, project_name="small",
)
tuner.search(x, y, validation_data=(x_val, y_val), epochs=60, class_weight={0: 1.0, 1: 1.5}, verbose=0)
tuner.get_best_config(lambda candidates: min((c for c in candidates if c.is_trained), key=lambda c: c.objective)).save(
    "best_config.json"
)
tuner.get_best_config("memory").save("memory.json")
"""
# All that needs the framework, in one process: each costs ten seconds of imports.
FRESH = """
import json, keras, accumtune, train
from dataclasses import replace
from pathlib import Path

x, x_val, y, y_val = train.load()
data = {"x": x, "y": y, "validation_data": (x_val, y_val)}
config = accumtune.load_config("best_config.json")

def best_loss(config):
    keras.utils.set_random_seed(config.seed)
    model = config.build(train.build_model)
    return min(model.fit(**data, verbose=0, **config.fit_arguments()).history["val_loss"])

def warm(source):
    model = config.load_weights(config.build(train.build_model), source)
    return model.evaluate(x_val, y_val, verbose=0)

told = config.reproduce(train.build_model, x, y, validation_data=(x_val, y_val))
folder = Path("SEARCH/mlruns/searches/small")
print(json.dumps({
    "plain": best_loss(config),
    "another seed": best_loss(replace(config, seed=config.seed + 1)),
    "no class weights": best_loss(replace(config, fit_options={})),
    "reproduced": [told.value, told.peak_memory_bytes, told.promised_peak_memory_bytes, str(told)],
    "holds": [told.holds(peak_tolerance=0.03), told.holds(objective_tolerance=-1.0)],
    "warm": [warm(folder), warm(folder / f"trial_{config.source['trial_id']}" / "checkpoint.weights.h5")],
}))
"""


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    (folder / "train.py").write_text(MODULE)
    run(folder, SEARCH)
    return folder


@pytest.fixture(scope="module")
def fresh(search, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fresh")
    for name in ("train.py", "best_config.json"):
        shutil.copy(search / name, folder)
    return json.loads(run(folder, FRESH.replace("SEARCH", str(search))).splitlines()[-1])


def run(folder, script):
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = forked.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_fresh_process_reproduces_the_best_trial(search, fresh):
    promised = accumtune.load_config(search / "best_config.json").objective["value"]
    value, peak, promised_peak, text = fresh["reproduced"]
    assert fresh["plain"] == pytest.approx(promised, abs=1e-6), "build and fit, as a user writes it"
    assert value == pytest.approx(promised, abs=1e-6), "reproduce()"
    assert peak == pytest.approx(promised_peak, rel=0.03)
    assert fresh["holds"] == [True, False] and "val_loss" in text and "peak memory" in text


@pytest.mark.slow
def test_it_is_the_seed_and_the_fit_options_that_do_it(search, fresh):
    """The negative control: without one of them, it is another training."""
    config = accumtune.load_config(search / "best_config.json")
    assert config.seed == 11 and config.fit_options == {"class_weight": {"0": 1.0, "1": 1.5}}
    for broken in ("another seed", "no class weights"):
        assert abs(fresh[broken] - config.objective["value"]) > 1e-4, broken


@pytest.mark.slow
def test_weights_of_the_best_trial_are_a_warm_start(search, fresh):
    config = accumtune.load_config(search / "best_config.json")
    assert fresh["warm"] == pytest.approx([config.objective["value"]] * 2, abs=1e-5)


def test_another_micro_batch_promises_the_trial_of_its_effective_batch(search):
    config = accumtune.load_config(search / "memory.json")
    assert config.trial["micro_batch_size"] in (16, 32) and config.trial["executions"] == 1
    assert config.trial["best_epoch"] in range(60) and config.trial["peak_memory_bytes"] > 0


def test_weights_that_are_nowhere(search, tmp_path, monkeypatch):
    config = accumtune.load_config(search / "best_config.json")
    assert config.trial["weights"].endswith("checkpoint.weights.h5")
    monkeypatch.chdir(tmp_path)
    moved = replace(config, trial={**config.trial, "weights": "elsewhere/checkpoint.weights.h5"})
    with pytest.raises(ConfigError, match="'elsewhere/checkpoint.weights.h5' is not on this machine"):
        moved.load_weights(None)


def test_weights_of_another_search_are_refused(search, tmp_path):
    config = accumtune.load_config(search / "best_config.json")
    folder = search / "mlruns" / "searches" / "small"
    other = replace(config, source={**config.source, "search_id": "another"})
    with pytest.raises(ConfigError, match="not to another"):
        other.load_weights(None, folder)
    with pytest.raises(ConfigError, match="There are no weights in"):
        config.load_weights(None, tmp_path)
    weights = folder / f"trial_{config.source['trial_id']}" / "checkpoint.weights.h5"
    with pytest.raises(ConfigError, match="do not fit the model"):
        config.load_weights(model_of_another_width(), weights)
    (tmp_path / "broken.weights.h5").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="do not fit the model"):
        config.load_weights(model_of_another_width(), tmp_path / "broken.weights.h5")


def model_of_another_width():
    import keras

    layers = [keras.layers.Dense(3), keras.layers.Dropout(0.2), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((16,)), *layers])
    model.compile("adam", "mse")
    return model


def test_what_is_no_search_cannot_be_reproduced():
    with pytest.raises(ConfigError, match="no seed"):
        config_of().reproduce(None, np.zeros(1))
