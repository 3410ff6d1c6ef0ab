"""A search over models that train in their own way."""

import dataclasses
import functools

import keras
import numpy as np
import pytest

import accumtune
from accumtune.errors import CustomTrainStepError
from accumtune.tracking.journal import read_search
from accumtune.tracking.mlflow.run_content import search_run


def build(hp, loss="mse", is_over_the_batch=False):
    import tensorflow as tf

    class Stepping(keras.Sequential):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(self(x, training=True) - y))
                loss = tf.sqrt(loss) if is_over_the_batch else loss
            gradients = tape.gradient(loss, self.trainable_weights)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
            return {"loss": loss}

    model = Stepping([keras.Input((4,)), keras.layers.Dense(hp.Choice("units", [4, 8])), keras.layers.Dense(1)])
    model.compile("sgd", loss)
    return model


def build_of_parts(hp):
    """Never called itself, only its networks, as Keras's autoencoders and GANs: to Keras it is never built."""
    import tensorflow as tf

    class OfParts(keras.Model):
        def __init__(self, *parts):
            super().__init__()
            self.first, self.second = parts
            self.mean = keras.metrics.Mean()

        def losses_of(self, data):
            return tf.reduce_mean(tf.square(self.second(self.first(data[0])) - data[1]))

        def train_step(self, data):
            with tf.GradientTape() as tape:
                loss = self.losses_of(data)
            gradients = tape.gradient(loss, self.trainable_weights)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
            return {"loss": loss}

        def test_step(self, data):
            self.mean.update_state(tf.sqrt(self.losses_of(data)))  # an average that depends on the size of batches
            return {"loss": self.mean.result()}

    first = keras.Sequential([keras.layers.Dense(hp.Choice("units", [4, 8]))])
    model = OfParts(first, keras.Sequential([keras.Input((hp.get("units"),)), keras.layers.Dense(1)]))
    model.compile("sgd")
    return model


def make(tmp_path, build, objective="val_loss"):
    return accumtune.RandomSearch(
        build, objective=objective, max_trials=1, memory_budget="1GiB", micro_batch_sizes=(4, 8),
        accumulation_steps=(1, 2), seed=1, directory=tmp_path, project_name="own", tracking_uri=None,
    )  # fmt: skip


def data():
    x = np.random.default_rng(0).normal(size=(48, 4)).astype("float32")
    return x, x[:, :1]


def test_a_step_that_is_certified_is_searched_over_effective_batches(tmp_path, capsys):
    tuner = make(tmp_path, build)
    x, y = data()
    tuner.search(x, y, validation_data=(x, y), epochs=1)
    said = "own train_step was tested on the training data and can be accumulated: its gradients are means"
    assert capsys.readouterr().out.count(said) == 1
    record = read_search(tmp_path / "own")
    assert any(said in text for text in record.advice)
    assert search_run(record, {}, None).params["own_train_step"] == "mean"
    assert tuner.search_over == "effective_batch_size" and tuner.batch_coupled_layers == []
    config = tuner.get_best_config()
    assert config.trial["own_train_step"] == "mean"


@pytest.mark.slow
def test_a_model_that_is_never_called_itself_is_searched_and_comes_back_with_its_weights(tmp_path):
    tuner = make(tmp_path, build_of_parts)
    x, y = data()
    tuner.search(x, y, validation_data=(x, y), epochs=1, verbose=0)
    (trial,) = tuner.record().trials
    assert trial.status == "completed", trial.reason
    model = tuner.get_best_models()[0]
    logs = model.evaluate(x, y, batch_size=4, verbose=0, return_dict=True)
    assert logs["loss"] == pytest.approx(trial.objective_value, rel=1e-5)
    config = tuner.get_best_config()
    assert config.fit_options["validation_batch_size"] == 4
    assert any("test_step gets 4 samples at a time" in text for text in tuner.record().advice)
    model = config.build(build_of_parts)
    model.fit(x, y, **config.fit_arguments(epochs=1, verbose=0))
    for micro_batch_size in (config.effective_batch_size, config.effective_batch_size // 4):
        pair = dataclasses.replace(config, trial={**config.trial, "micro_batch_size": micro_batch_size})
        assert pair.reproduce(build_of_parts, x, y, validation_data=(x, y)).difference < 1e-6
    smaller = config.for_budget("64MiB", build_of_parts, x, y)  # by a profile
    assert smaller.effective_batch_size == config.effective_batch_size and smaller.peak_memory_bytes < 64 * 2**20


def test_a_step_that_is_refused_ends_the_search_before_its_first_trial(tmp_path):
    tuner = make(tmp_path, lambda hp: build(hp, is_over_the_batch=True))
    x, y = data()
    with pytest.raises(CustomTrainStepError, match="not linear") as caught:
        tuner.search(x, y, validation_data=(x, y), epochs=1, verbose=0)
    assert "Stepping" in str(caught.value) and not tuner.oracle.trials


def test_a_step_with_the_only_loss_is_searched_without_validation(tmp_path):
    """As Keras's examples have it: nothing is evaluated that Keras could not."""
    tuner = make(tmp_path, functools.partial(build, loss=None), objective="loss")
    x, y = data()
    tuner.search(x, y, epochs=1, verbose=0)
    assert [trial.status for trial in tuner.record().trials] == ["completed"]
    config = tuner.get_best_config()
    assert config.verify(functools.partial(build, loss=None), x, y).peak_memory_bytes > 0
