"""What happens inside the process of a task: limit memory, build, probe or train, report.

Each task reads `task.json` in its directory and leaves `outcome.json`. It is run by a process that the fork server
has made, and by nothing else; the search process never builds a model.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accumtune.worker.transport.global_settings import apply_global_settings, gpus_of_tensorflow
from accumtune.worker.transport.hyperparameters import hyperparameters_from
from accumtune.worker.transport.outcome import StopRequested, Superseded, reason_of
from accumtune.worker.transport.payload import is_data_function, load_payload, read_header
from accumtune.worker.transport.task_directory import TaskDirectory

# Of sparse and ragged data, a sample takes what these take on average.
_SAMPLES_OF_UNEQUAL_SIZE = 64


def run_task(path: Path) -> int:
    """Runs the task of a directory and writes its outcome.

    Returns:
        The exit code for the process: 0 unless not even an outcome could be written.
    """
    directory = TaskDirectory(path)
    name, arguments = directory.read_task()
    try:
        result = _TASKS[name](directory, **arguments)
    except StopRequested:
        directory.write_outcome({"status": "stopped", "reason": "the search was stopped; its state is saved"})
    except Superseded:
        pass  # the outcome is another process's to write
    except Exception as error:
        directory.write_outcome(_describe(error))
    else:
        directory.write_outcome({"status": "completed", "result": result})
    return 0


def _describe(error: Exception) -> dict[str, Any]:
    from accumtune.errors import AccumtuneError
    from accumtune.memory.device import is_out_of_memory

    return {
        "status": "out_of_memory" if is_out_of_memory(error) else "failed",
        "reason": reason_of(error),
        "traceback": "".join(traceback.format_exception(error)),
        "error": (
            {"class": type(error).__name__, "arguments": list(error.args)}
            if isinstance(error, AccumtuneError)
            else None
        ),
    }


def discover(directory: TaskDirectory, payload: str, space: dict[str, Any] | None = None) -> dict[str, Any]:
    """Finds the hyperparameters of a build function and whether its models couple the samples of a batch.

    Args:
        space: Keras Tuner's configuration of the hyperparameters that are known; with it, the payload has the data,
            with which the models' own code is tried. None: `hyperparameters` of the payload.

    Follows Keras Tuner's `BaseTuner._activate_all_conditions`: builds until each conditional scope was active once.
    """
    import keras_tuner
    from keras_tuner.engine.oracle import Oracle

    from accumtune.accumulation import accumulate, batch_coupled_layers
    from accumtune.accumulation.coupling.detection import runs_code_of_the_user

    content, _, _ = _open(payload)
    hypermodel = content["hypermodel"]
    coupled: dict[str, None] = {}
    wants_data: set[bool] = set()
    known = content["hyperparameters"] if space is None else hyperparameters_from(space)
    # A bare Oracle and BaseTuner lend their bookkeeping; nothing is searched here.
    oracle = Oracle(objective="val_loss", hyperparameters=known)

    class Recorder:
        def build(self, hp: keras_tuner.HyperParameters) -> None:
            model = hypermodel.build_plain(hp)
            wants_data.add(runs_code_of_the_user(model))
            data = () if space is None or not runs_code_of_the_user(model) else _some_data(model, content, hp)
            coupled.update(dict.fromkeys(str(layer) for layer in batch_coupled_layers(model, *data)))
            accumulate(model, micro_batch_size=1)  # refuses what no trial could train

    class Explorer(keras_tuner.engine.base_tuner.BaseTuner):
        def __init__(self) -> None:
            self.oracle, self.hypermodel = oracle, Recorder()

    hp = oracle.get_space()
    hypermodel.declare_hyperparameters(hp)
    oracle.update_space(hp)
    Explorer()._activate_all_conditions()
    return {
        "hyperparameters": oracle.hyperparameters.get_config(),
        "batch_coupled_layers": list(coupled),
        "wants_data": any(wants_data),
    }


def _some_data(model: Any, content: dict[str, Any], hp: Any) -> tuple[Any, ...]:
    """Some x and y, or nothing where the data cannot be read: that is for the trials to say."""
    try:
        x, y, _ = _samples(model, content, hp)[0](16)
    except Exception:
        return ()
    return x, y


def inspect(directory: TaskDirectory, payload: str, hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """Builds the model of one set of hyperparameters and says what decides its memory.

    And which hyperparameters have appeared: a build function may ask for `units_2` only where there are three layers.
    """
    import keras

    from accumtune.accumulation.data.array_kinds import is_dense
    from accumtune.worker.identity.memory_signature import describe_model
    from accumtune.worker.identity.training_identity import describe_training

    content, device, _ = _open(payload)
    hp = hyperparameters_from(hyperparameters)
    model = content["hypermodel"].build_plain(hp)
    samples, is_pipeline = _samples(model, content, hp)
    sample = samples(1)
    if not all(map(is_dense, keras.tree.flatten(sample))):
        sample = samples(_SAMPLES_OF_UNEQUAL_SIZE)
    if content.get("max_model_size") and not model.built:
        model(sample[0])  # until then nothing can be counted
    facts = describe_model(model, sample, device.name, hp.values, is_pipeline=is_pipeline)
    facts["identity"] = {**describe_training(model, hp.values), "device": device.name}
    return {**facts, "appeared": appeared(hp, hyperparameters)}


def describe_data(directory: TaskDirectory, payload: str, seed: int, is_ordered: bool) -> dict[str, Any]:
    """Describes the data that functions return: with one seed the same in every process, unless they have another."""
    import keras

    from accumtune.worker.data import user_data as data
    from accumtune.worker.identity.training_identity import describe_arrays, describe_pipeline

    keras.utils.set_random_seed(seed)
    content = load_payload(Path(payload))
    validation = content["fit_kwargs"].get("validation_data")
    parts = validation if isinstance(validation, (tuple, list)) else (validation,)
    found: dict[str, str] = {}
    for name, given in (
        ("data", data.input_arguments(content["fit_args"], content["fit_kwargs"])),
        ("validation data", (*parts, None, None)[:3]),
    ):
        if not any(map(is_data_function, given)):
            continue
        x, y, sample_weight = data.resolve(*given)
        if data.is_pipeline(x):
            described = describe_pipeline(x)
        else:
            described = describe_arrays((x, y, sample_weight), is_ordered=is_ordered or name != "data")
        found |= {f"{name}: {part}": text for part, text in described.items()}
    return found


def probe(
    directory: TaskDirectory,
    payload: str,
    hyperparameters: dict[str, Any],
    memory_budget_bytes: int | None,
    micro_batch_size: int,
    accumulation_steps: list[int],
) -> dict[str, Any]:
    """Runs a few real updates at one micro-batch size and measures them."""
    from accumtune.memory import probe as probes

    content, device, _ = _open(payload, memory_budget_bytes, has_pipelines=True)
    recorder = device.recorder() if probes.TRACED_STEPS <= set(accumulation_steps) else None
    hp = hyperparameters_from(hyperparameters)
    model = content["hypermodel"].build_plain(hp)
    samples, is_pipeline = _samples(model, content, hp)

    def report(measurements: Sequence[Any], trace: Any = None) -> dict[str, Any]:
        return {
            "measurements": [measurement.to_dict() for measurement in measurements],
            "device": device.name,
            "trace": trace,
        }

    def end(measurements: Sequence[Any]) -> None:
        directory.write_outcome({"status": "completed", "result": report(measurements)})
        os._exit(0)

    measurements = probes.probe(
        model,
        samples,
        micro_batch_size=micro_batch_size,
        accumulation_steps=tuple(accumulation_steps),
        is_pipeline=is_pipeline,
        device=device,
        on_out_of_memory=end,
        recorder=recorder,
    )
    trace = probes.trace_of(recorder, measurements)
    return report(measurements, trace.to_dict() if trace else None)


def train(
    directory: TaskDirectory,
    payload: str,
    hyperparameters: dict[str, Any],
    memory_budget_bytes: int | None,
    seed: int,
    attempt: int,
    execution: int = 0,
    executions: int = 1,
    earlier: Sequence[dict[str, Any]] = (),
    fit_overrides: dict[str, Any] | None = None,
    initial_weights: str | None = None,
    identity: str = "",
) -> dict[str, Any]:
    """Trains one set of hyperparameters and reports each epoch to the journal.

    Args:
        directory: the trial's.
        payload: the file with hypermodel, data and arguments of `fit`.
        hyperparameters: Keras Tuner's configuration of them.
        memory_budget_bytes: the allocator's limit.
        seed: of the first execution.
        attempt: how often the trial was begun, this time included.
        execution: which of the `executions` trainings of this trial it is (see `execution.repeated_training`).
        earlier: the reports of those before. The best epoch of all of them is kept, as in Keras Tuner.
        fit_overrides: arguments of `fit` that this trial alone has.
        initial_weights: of an earlier trial, to go on from.
        identity: of the search and the model; a saved state of another is not gone on with.
    """
    from accumtune.tracking.journal import Journal
    from accumtune.worker.checkpoint.training_state import CannotContinue
    from accumtune.worker.checkpoint.trial_checkpoint import Continuation
    from accumtune.worker.measured_fit import execute

    content, device, pipelines = _open(payload, memory_budget_bytes, seed + execution, has_pipelines=True)
    content["fit_kwargs"] = {**content["fit_kwargs"], **(fit_overrides or {}), "verbose": 0}
    if execution == 0:
        found = {"device": device.name, "memory_source": device.memory_source}
        Journal(directory.journal_file).append("started", attempt=attempt, pid=os.getpid(), **found)
    numbers = {name: value for name, value in content["fit_kwargs"].items() if isinstance(value, (int, float, str))}
    same_training = {"values": hyperparameters["values"], "seed": seed, "executions": executions, "fit": numbers}
    same_training |= {"identity": identity} if identity else {}

    def continuation() -> Continuation:
        return Continuation(directory, attempt, same_training, execution, earlier, pipelines=pipelines)

    def run(state: Continuation) -> dict[str, Any]:
        hp = hyperparameters_from(hyperparameters)
        try:
            return execute(directory, content, hp, device, state, seed, initial_weights)
        finally:  # a HyperModel's fit, a model that is first called, a callback may ask for more: also where one fails
            found = appeared(hp, hyperparameters)
            if found["space"]:
                Journal(directory.journal_file).append("appeared", **found)

    state = continuation()
    if execution == 0:
        state.repeat_epochs()
    try:
        return state.known_result() or run(state)
    except CannotContinue as error:
        print(f"The saved state is not that of this model ({error}): the training begins anew.")
        directory.checkpoint_file.unlink()
        return run(continuation())


def call(directory: TaskDirectory, payload: str) -> dict[str, Any]:
    """Runs a function of the payload: what tests and tools use to do something in an isolated process.

    No device is opened: that is the function's to do.
    """
    apply_global_settings(read_header(Path(payload)).settings)
    content = load_payload(Path(payload))
    return {"value": content["function"](*content.get("arguments", ()))}


_TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "discover": discover,
    "inspect": inspect,
    "describe_data": describe_data,
    "probe": probe,
    "train": train,
    "call": call,
}


def _samples(model: Any, content: dict[str, Any], hp: Any) -> tuple[Callable[[int], Any], bool]:
    """What gives the first samples of the training data, and whether training will get these as batches."""
    from accumtune.worker.data import user_data as data
    from accumtune.worker.data.hypermodel_fit_data import arguments_of_fit, own_fit

    given = data.input_arguments(content["fit_args"], content["fit_kwargs"])
    fit = own_fit(getattr(content["hypermodel"], "hypermodel", None))
    if given[0] is None and fit is not None:
        own = arguments_of_fit(fit, hp, model, content["fit_args"], content["fit_kwargs"])
        given = own.get("x"), own.get("y"), own.get("sample_weight")
    x, y, sample_weight = data.resolve(*given)
    is_batched = not data.is_tf_dataset(x) or data.has_batches(model, x)

    def first(count: int) -> Any:
        return data.first_samples(x, y, sample_weight, count=count, is_batched=is_batched)

    return first, data.is_pipeline(x)


def _open(
    payload: str, memory_budget_bytes: int | None = None, seed: int | None = None, *, has_pipelines: bool = False
) -> tuple[dict[str, Any], Any, Any]:
    """The content of a payload, the device of this process, and the process of the data's pipelines, if any.

    The user's objects come last: a tensor among them is made when the device is limited, and is in its account.
    """
    import keras

    header = read_header(Path(payload))
    apply_global_settings(header.settings)
    pipelines = None
    if keras.backend.backend() == "tensorflow":
        os.environ.update(gpus_of_tensorflow(header.settings))
        if has_pipelines:
            from accumtune.worker.data.pipeline_process import PipelineProcess

            # A fork: before TensorFlow runs anything.
            pipelines = PipelineProcess.of(header.functions, Path(payload), seed)
    device = _open_device(memory_budget_bytes)
    if pipelines is not None and not device.name.startswith("CPU"):  # what pipelines keep is the host's
        pipelines.close()
        pipelines = None
    content = load_payload(Path(payload))
    return content if pipelines is None else pipelines.moved(content), device, pipelines


def _open_device(memory_budget_bytes: int | None) -> Any:
    """The device of this process, limited; what the limit is to JAX depends on the GPU that is here."""
    import keras

    from accumtune.memory.device import memory_limit_environment, open_device

    os.environ.update(memory_limit_environment(keras.backend.backend(), memory_budget_bytes))
    return open_device(budget_bytes=memory_budget_bytes)


def appeared(hp: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What was asked for and not given: `space` and `values`, as in Keras Tuner's configuration."""
    config = hp.get_config()
    known = len(hyperparameters_from(given).space)
    values = {name: value for name, value in config["values"].items() if name not in given["values"]}
    return {"space": config["space"][known:], "values": values}
