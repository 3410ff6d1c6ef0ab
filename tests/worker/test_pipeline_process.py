"""A `tf.data` pipeline's memory does not count in a trial's budget, and training on it is the same training."""

import itertools
import os
import signal
from collections import OrderedDict
from functools import partial
from pathlib import Path

import keras
import keras_tuner
import numpy as np
import pytest
from running import wait_until_gone

from accumtune.execution.standalone_training import FirstUpdates, train_isolated
from accumtune.hypermodel import AccumulationHyperModel
from accumtune.memory.device import memory_limit_environment
from accumtune.worker.builder import ModelBuilder
from accumtune.worker.transport.payload import dump_payload
from accumtune.worker.transport.task_directory import TaskDirectory

pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="a tf.data pipeline")

BUDGET = 24 * 2**20
SAMPLES, WIDTH = 800, 16384  # 50 MiB
VALUES = {"effective_batch_size": 16, "micro_batch_size": 8, "accumulation_steps": 2}


def build(hp):
    model = keras.Sequential([keras.Input((WIDTH,)), keras.layers.Dense(8), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    return model


def arrays(samples=SAMPLES):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(samples, WIDTH)).astype("float32")
    return x, x[:, :1]


def large():
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(arrays()).shuffle(SAMPLES, seed=1).batch(32)


def unbatched():
    return large().unbatch()


def cached():
    return large().cache().repeat()


class MakesItHere(keras_tuner.HyperModel):
    """Calls the function itself, so that the pipeline is in the trial's own process."""

    def build(self, hp):
        return build(hp)

    def fit(self, hp, model, x, **kwargs):
        return model.fit(x(), **kwargs)


@pytest.fixture
def run(executor, tmp_path):
    def run(task, *data, hypermodel=build, budget=BUDGET, name="task", timeout=120, **kwargs):
        payload = tmp_path / f"data_{name}" / "payload.pkl"
        directory = TaskDirectory(tmp_path / name)
        content = {
            "hypermodel": AccumulationHyperModel(hypermodel),
            "objective": keras_tuner.Objective("loss", "min"),
            "fit_args": data,
            "fit_kwargs": {"epochs": 2, **kwargs},
        }
        dump_payload(content, payload)
        arguments = {
            "train": {"seed": 5, "attempt": 1},
            "probe": {"micro_batch_size": 8, "accumulation_steps": [2]},
        }[task]
        common = {"payload": str(payload), "hyperparameters": {"space": [], "values": VALUES}}
        directory.write_task(task, {**common, "memory_budget_bytes": budget, **arguments})
        environment = memory_limit_environment("tensorflow", budget)
        return executor.submit(directory, environment, is_memory_limited=budget is not None).result(timeout=timeout)

    return run


@pytest.mark.parametrize("pipeline", [large, unbatched, cached])
def test_a_pipeline_larger_than_the_budget_trains_in_what_arrays_take(run, pipeline):
    steps = {"steps_per_epoch": 50} if pipeline is cached else {}
    outcome = run("train", pipeline, validation_data=large, **steps)
    assert outcome.is_completed, outcome.traceback
    expected = run("train", *arrays(), validation_data=arrays(32), name="arrays")
    assert outcome.result["updates"] == expected.result["updates"] == 100
    peak, expected = outcome.result["peak_memory_bytes"], expected.result["peak_memory_bytes"]
    # With arrays only a micro-batch is on the device, with a pipeline the whole window, and one being made.
    window = VALUES["effective_batch_size"] * WIDTH * 4
    assert peak <= BUDGET
    assert expected <= peak <= expected + 3 * window
    # ... as was predicted from a probe.
    probed = run("probe", pipeline, name="probe").result["measurements"][0]["peak_memory_bytes"]
    assert peak == pytest.approx(probed, rel=0.05)


def test_a_configuration_is_verified_on_it_too():
    hypermodel = FirstUpdates(ModelBuilder(build), 8, 16)
    objective = keras_tuner.Objective("loss", "min")
    outcome = train_isolated(
        hypermodel, {"x": large, "y": None}, hyperparameters=VALUES, objective=objective, seed=5,
        memory_budget_bytes=BUDGET,
    )  # fmt: skip
    assert outcome.is_completed, outcome.traceback
    assert outcome.result["peak_memory_bytes"] <= BUDGET


@pytest.mark.slow
def test_the_same_pipeline_in_the_trial_s_own_process_is_more_than_the_budget(run):
    """The control: without a process of its own, the pipeline is in the budget."""
    assert run("train", large, hypermodel=MakesItHere()).status == "out_of_memory"


def small_batches(kind):
    import tensorflow as tf

    x = np.arange(20, dtype="float32").reshape(10, 2)
    if kind == "pair":
        return tf.data.Dataset.from_tensor_slices((x, x[:, 0])).batch(3)
    if kind == "names":
        return tf.data.Dataset.from_tensor_slices(({"b": x, "a": x.astype("int32")}, OrderedDict(z=x))).batch(4)
    if kind == "strings":
        return tf.data.Dataset.from_tensor_slices((np.array([b"a", b"bc"] * 5), x)).batch(3)
    if kind == "uncounted":
        return tf.data.Dataset.from_tensor_slices((x, x)).filter(lambda a, b: a[0] > 3).batch(3)
    if kind == "growing":  # from less than a page to 40 MB, in every kind of number, one of them without any
        lengths = tf.data.Dataset.from_tensor_slices([0, 3, 500, 10**6, 7] * 2)
        types = [tf.float32, tf.bfloat16, tf.bool, tf.uint8, tf.complex64]
        return lengths.map(lambda n: tuple(tf.cast(tf.range(n) % 2, kind) for kind in types)).padded_batch(2)
    return tf.data.Dataset.from_tensor_slices(x).batch(3).repeat()


KINDS = ("pair", "names", "strings", "uncounted", "infinite")


@pytest.mark.parametrize(
    ("kind", "size", "first"),
    [("growing", None, None), *itertools.product(KINDS, (None, 4), (None,)), ("infinite", 4, 2)],
)
def test_its_elements_and_what_is_known_of_them_are_those_of_the_pipeline(executor, tmp_path, kind, size, first):
    def compare(function, size, first):
        import cloudpickle
        import tensorflow as tf

        from accumtune.worker.data.pipeline_process import PipelineProcess, called
        from accumtune.worker.data.rebatch import rebatched
        from accumtune.worker.transport.payload import DataFunction

        payload = Path("payload.pkl")
        payload.touch()
        content = {"fit_args": (), "fit_kwargs": {"x": function}}
        sent = DataFunction("x", cloudpickle.dumps(function), Path("arrays"))
        process = PipelineProcess.of({"x": sent}, payload, seed=1)
        elsewhere = called(process.moved(content)["fit_kwargs"]["x"])
        here = function() if size is None else rebatched(function(), size, first=first)
        there = elsewhere.as_tf_dataset() if size is None else rebatched(elsewhere, size, first=first)
        same = [here.element_spec == there.element_spec, int(here.cardinality()) == int(there.cardinality())]
        for _ in range(2):
            for one, other in zip(here.take(9), there.take(9), strict=True):
                tf.nest.assert_same_structure(one, other)
                pairs = zip(tf.nest.flatten(one), tf.nest.flatten(other), strict=True)
                same += [bool(tf.reduce_all(tf.equal(a, b))) for a, b in pairs]
        return same

    outcome = in_a_process(executor, tmp_path, compare, partial(small_batches, kind), size, first)
    assert outcome.is_completed, outcome.traceback
    assert len(outcome.result["value"]) > 4 and all(outcome.result["value"])


def in_a_process(executor, folder, function, *arguments):
    payload, directory = folder / "data" / "payload.pkl", TaskDirectory(folder / "call")
    dump_payload({"function": function, "arguments": arguments}, payload)
    directory.write_task("call", {"payload": str(payload)})
    # Tasks start where the search runs: this one leaves a file.
    return executor.submit(directory, {}, cwd=str(folder)).result(timeout=120)


class Unreadable(Exception):
    """Cannot be made from its arguments, so not be sent."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def test_an_error_of_the_function_is_the_trial_s_with_its_place(run):
    def broken():
        raise Unreadable("no file", "no data")

    outcome = run("train", broken)
    assert outcome.status == "failed"
    assert "no file and no data" in outcome.reason
    assert "in broken" in outcome.traceback
    assert outcome.traceback.count("In the process of the data pipeline:") == 1


def test_an_error_of_the_pipeline_reaches_the_trial_with_its_text(run):
    def torn():
        import tensorflow as tf

        def check(number, x, y):
            is_whole = tf.debugging.assert_less(number, tf.constant(40, tf.int64), "a torn record")
            with tf.control_dependencies([is_whole]):
                return tf.identity(x), y

        return tf.data.Dataset.from_tensor_slices(arrays(64)).enumerate().map(lambda i, xy: check(i, *xy)).batch(8)

    outcome = run("train", torn)
    assert outcome.status == "failed"
    assert "a torn record" in outcome.reason + outcome.traceback


def test_a_pipeline_s_process_that_dies_is_told_from_a_crash_of_the_model(run):
    def dying():
        import tensorflow as tf

        def die(y):
            os.kill(os.getpid(), signal.SIGKILL)

        source = tf.data.Dataset.from_tensor_slices(arrays(64))
        return source.map(lambda x, y: (x, tf.ensure_shape(tf.numpy_function(die, [y], tf.float32), [1]))).batch(8)

    outcome = run("train", dying)
    assert outcome.status == "failed"
    assert "process of the data pipeline has ended" in outcome.reason + outcome.traceback


def test_its_process_ends_with_the_trial(run, tmp_path):
    note = str(tmp_path / "pid")

    def noted():
        Path(note).write_text(str(os.getpid()))
        return large()

    outcome = run("train", noted)
    assert outcome.is_completed, outcome.traceback
    pid = int(Path(note).read_text())
    assert pid != outcome.pid
    assert wait_until_gone(pid)


def test_a_function_that_gives_arrays_is_called_once_by_each_process_but_the_first(run, tmp_path, executor):
    calls = str(tmp_path / "calls")

    def load():
        with open(calls, "a") as file:
            file.write(f"{os.getpid()}\n")
        return arrays(32)

    assert run("train", load).is_completed
    first = Path(calls).read_text().split()
    assert len(first) == len(set(first)) == 2
    # The same payload again, as the search's next trial has it.
    directory = TaskDirectory(tmp_path / "task")
    directory.write_task(*directory.read_task())
    assert executor.submit(directory, memory_limit_environment("tensorflow", BUDGET)).result(timeout=120).is_completed
    assert len(Path(calls).read_text().split()) == 3
