"""Inspects a model before it trains: its hyperparameters, the facts that decide its memory, the cost of an update."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import keras_tuner
from keras_tuner.engine.oracle import Oracle

from accumtune.accumulation import accumulate, batch_coupled_layers, ghost_batch
from accumtune.accumulation.coupling.detection import coupled_with_ghost_batches, runs_code_of_the_user
from accumtune.accumulation.data.array_kinds import bytes_per_row, is_dense
from accumtune.accumulation.losses.whole_batch_loss import is_wanted
from accumtune.accumulation.own_step.own_train_step import certify, has_own_step, has_own_test_step
from accumtune.accumulation.patched_attributes import put
from accumtune.memory import probe as probes
from accumtune.memory.loss_memory import loss_bytes, validation_loss_bytes
from accumtune.worker.data import user_data
from accumtune.worker.data.hypermodel_fit_data import arguments_of_fit, own_fit
from accumtune.worker.identity.data_identity import describe_arrays, describe_pipeline
from accumtune.worker.identity.memory_signature import describe_model
from accumtune.worker.identity.training_identity import describe_training
from accumtune.worker.process_setup import open_payload
from accumtune.worker.transport.hyperparameters import appeared, hyperparameters_from
from accumtune.worker.transport.payload import is_data_function, load_payload
from accumtune.worker.transport.task_directory import TaskDirectory

# The size of a sparse or ragged sample is the mean of so many.
_SAMPLES_OF_UNEQUAL_SIZE = 64


def discover(directory: TaskDirectory, payload: str, space: dict[str, Any] | None = None) -> dict[str, Any]:
    """Finds the hyperparameters of a build function and whether its models couple the samples of a batch.

    Builds models until each conditional scope was active once, as Keras Tuner's `BaseTuner._activate_all_conditions`.

    Args:
        directory: of the task.
        payload: the file with the hypermodel.
        space: Keras Tuner's configuration of the known hyperparameters; the payload then has the data too, and the
            models' own code is tested on them. None: the payload has `hyperparameters`.
    """
    content, _, _ = open_payload(payload)
    hypermodel = content["hypermodel"]
    coupled: dict[str, None] = {}
    whole_batch_loss: set[bool] = set()
    with_ghost_batches: dict[str, None] = {}
    own_train_step: set[str] = set()
    against_ghost_batches: dict[str, None] = {}
    own_test_step: set[bool] = set()
    wants_data: set[bool] = set()
    known = content["hyperparameters"] if space is None else hyperparameters_from(space)
    # Oracle and BaseTuner only keep track of the hyperparameters; nothing is searched here.
    oracle = Oracle(objective="val_loss", hyperparameters=known)

    class Recorder:
        def build(self, hp: keras_tuner.HyperParameters) -> None:
            model = hypermodel.build_plain(hp)
            wants_data.add(runs_code_of_the_user(model))
            own_test_step.add(has_own_test_step(model))
            some = () if space is None or not runs_code_of_the_user(model) else _some_data(model, content, hp)
            accumulate(model, micro_batch_size=1)  # refuses what no trial could train
            if space is not None and has_own_step(model):
                certificate = certify(model, *_samples(model, content, hp)[0](16))
                own_train_step.add(certificate.reduction)
                put(model, {"_accumtune_certificate": certificate})
            found = batch_coupled_layers(model, *some)
            coupled.update(dict.fromkeys(str(layer) for layer in found))
            left = coupled_with_ghost_batches(model, *some) if found else []
            against_ghost_batches.update(dict.fromkeys(ghost_batch.reasons_against(model)))
            with_ghost_batches.update(dict.fromkeys(str(layer) for layer in left))
            whole_batch_loss.add(is_wanted(model))

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
        "whole_batch_loss": any(whole_batch_loss),
        "coupled_with_ghost_batches": list(with_ghost_batches),
        "own_train_step": ", ".join(sorted(own_train_step)) or None,
        "has_own_test_step": any(own_test_step),
        "against_ghost_batches": list(against_ghost_batches),
        "wants_data": any(wants_data),
    }


def inspect(directory: TaskDirectory, payload: str, hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """Builds the model of one set of hyperparameters, and describes what decides its memory and its training.

    Also returns the hyperparameters that have appeared: a build function may declare `units_2` only with three layers.
    """
    content, device, _ = open_payload(payload)
    hp = hyperparameters_from(hyperparameters)
    model = content["hypermodel"].build_plain(hp)
    samples, is_pipeline = _samples(model, content, hp)
    sample = samples(1)
    if not all(map(is_dense, keras.tree.flatten(sample))):
        sample = samples(_SAMPLES_OF_UNEQUAL_SIZE)
    if content.get("max_model_size") and not model.built:
        model(sample[0])  # creates the variables, to count them
    at_once = _samples_validated_at_once(model, content, hp)
    facts = describe_model(model, sample, device.name, hp.values, is_pipeline=is_pipeline, validated_at_once=at_once)
    if is_wanted(model):
        facts["loss_bytes"], facts["loss_failure"] = loss_bytes(model, sample, device)
        if at_once is not None:
            loss = validation_loss_bytes(model, sample, device, at_once, facts["loss_bytes"])
            facts["validation_bytes"] = loss and loss + at_once * sum(map(bytes_per_row, keras.tree.flatten(sample[0])))
    facts["identity"] = {**describe_training(model, hp.values), "device": device.name}
    return {**facts, "appeared": appeared(hp, hyperparameters)}


def describe_data(directory: TaskDirectory, payload: str, seed: int, is_ordered: bool) -> dict[str, Any]:
    """Describes the data that functions return, after seeding all generators, so that processes can be compared."""
    keras.utils.set_random_seed(seed)
    content = load_payload(Path(payload))
    validation = content["fit_kwargs"].get("validation_data")
    parts = validation if isinstance(validation, (tuple, list)) else (validation,)
    found: dict[str, str] = {}
    for name, given in (
        ("data", user_data.input_arguments(content["fit_args"], content["fit_kwargs"])),
        ("validation data", (*parts, None, None)[:3]),
    ):
        if not any(map(is_data_function, given)):
            continue
        x, y, sample_weight = user_data.resolve(*given)
        if user_data.is_pipeline(x):
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
    content, device, _ = open_payload(payload, memory_budget_bytes, has_pipelines=True)
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
        ghost_batch_size=hp.values.get("ghost_batch_size"),
        is_pipeline=is_pipeline,
        validation_batch_size=_samples_validated_at_once(model, content, hp),
        device=device,
        on_out_of_memory=end,
        recorder=recorder,
    )
    trace = probes.trace_of(recorder, measurements)
    return report(measurements, trace.to_dict() if trace else None)


def _some_data(model: Any, content: dict[str, Any], hp: Any) -> tuple[Any, ...]:
    """Returns some x and y, or nothing if the data cannot be read: the trials will fail with the error."""
    try:
        x, y, _ = _samples(model, content, hp)[0](16)
    except Exception:
        return ()
    return x, y


def _samples(model: Any, content: dict[str, Any], hp: Any) -> tuple[Callable[[int], Any], bool]:
    """Returns a function for the first samples of the training data, and whether training gets them as batches."""
    given = _arguments_of_fit(model, content, hp)
    x, y, sample_weight = user_data.resolve(given.get("x"), given.get("y"), given.get("sample_weight"))
    is_batched = not user_data.is_tf_dataset(x) or user_data.has_batches(model, x)

    def first(count: int) -> Any:
        return user_data.first_samples(x, y, sample_weight, count=count, is_batched=is_batched)

    return first, user_data.is_pipeline(x)


def _samples_validated_at_once(model: Any, content: dict[str, Any], hp: Any) -> int | None:
    """Returns the samples of a batch of validation in a trial; None if they are those of a micro-batch."""
    smallest = min(getattr(content["hypermodel"], "micro_batch_sizes", (1,)))
    given = _arguments_of_fit(model, content, hp)
    at_once = user_data.samples_validated_at_once(model, given.get("validation_batch_size"), smallest)
    if at_once is None:
        return None
    most = user_data.most_validation_samples(given)
    return at_once if most is None else min(at_once, most) or None


def _arguments_of_fit(model: Any, content: dict[str, Any], hp: Any) -> dict[str, Any]:
    """Returns the arguments of `model.fit`; without data, those that a HyperModel's own `fit` passes to it."""
    x, y, sample_weight = user_data.input_arguments(content["fit_args"], content["fit_kwargs"])
    fit = own_fit(getattr(content["hypermodel"], "hypermodel", None))
    if x is None and fit is not None:
        return arguments_of_fit(fit, hp, model, content["fit_args"], content["fit_kwargs"])
    return {**content["fit_kwargs"], "x": x, "y": y, "sample_weight": sample_weight}
