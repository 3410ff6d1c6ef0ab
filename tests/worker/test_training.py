"""What a trial's process trains, or refuses to, and the time that it tells."""

import keras
import keras_tuner
import numpy as np
import pytest

from accumtune.hypermodel import AccumulationHyperModel
from accumtune.tracking.journal import Journal
from accumtune.worker.callbacks import JournalWriter
from accumtune.worker.transport.payload import dump_payload
from accumtune.worker.transport.task_directory import TaskDirectory

X = np.ones((32, 3), "float32")
Y = np.ones((32, 1), "float32")


def build(hp):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


def in_a_loop(model, callbacks, **kwargs):
    """As in keras.io's guide on custom training loops."""
    for callback in callbacks:
        callback.set_model(model)
    for layer in model.layers:
        layer.kernel.assign(0.9 * layer.kernel)
    for callback in callbacks:
        callback.on_epoch_end(0, logs={"score": 1.0})
    return 1.0


def another_model(model, **kwargs):
    return min(build(None).fit(X, Y, **kwargs).history["loss"])


def by_batches(model, **kwargs):
    return float(model.train_on_batch(X, Y))


def by_keras(model, **kwargs):
    return min(model.fit(X, Y, **kwargs).history["loss"])


class Own(keras_tuner.HyperModel):
    def __init__(self, train):
        super().__init__()
        self.train = train

    def build(self, hp):
        return build(hp)

    def fit(self, hp, model, *args, **kwargs):
        return self.train(model, **kwargs)


@pytest.mark.parametrize(
    "train, is_honoured", [(in_a_loop, False), (another_model, False), (by_batches, True), (by_keras, True)]
)
def test_what_no_batch_of_the_search_trains_is_refused(executor, tmp_path, train, is_honoured):
    payload, directory = tmp_path / "data" / "payload.pkl", TaskDirectory(tmp_path / "trial")
    objective = keras_tuner.Objective("score", "min")
    hypermodel = AccumulationHyperModel(Own(train))
    dump_payload(
        {"hypermodel": hypermodel, "objective": objective, "fit_args": (X, Y), "fit_kwargs": {"epochs": 2}}, payload
    )
    values = {"effective_batch_size": 16, "micro_batch_size": 8, "accumulation_steps": 2}
    arguments = {"hyperparameters": {"space": [], "values": values}, "memory_budget_bytes": None, "seed": 1}
    directory.write_task("train", {"payload": str(payload), "attempt": 1, **arguments})
    outcome = executor.submit(directory).result(timeout=240)
    if is_honoured:
        assert outcome.is_completed, outcome.traceback
        assert np.isfinite(outcome.result["metrics"]["score"])
    else:
        assert outcome.error["class"] == "SearchError", outcome
        received, expected, fix = outcome.error["arguments"]
        assert "does not call the fit of the model that it is given" in received and "model.fit" in fix


def test_the_time_of_an_update_never_includes_its_compilation(monkeypatch, tmp_path):
    """A trial with one update has no speed: its only one compiled."""
    clock = iter([0, 9, 10, 12, 20, 21, 30, 34])
    monkeypatch.setattr("accumtune.worker.callbacks.time.perf_counter", lambda: float(next(clock)))
    writer = JournalWriter(Journal(tmp_path / "journal"), attempt=1, execution=0)
    told = [writer.seconds_per_update]
    for update in range(4):
        writer.on_train_batch_begin(update)
        writer.on_train_batch_end(update)
        told.append(writer.seconds_per_update)
    assert told == [None, None, 2, 1, 2.5]
