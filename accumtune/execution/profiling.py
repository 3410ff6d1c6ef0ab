"""Profiles models in processes of their own: inspects one, probes a few sizes, predicts the rest."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accumtune import errors
from accumtune.accumulation.batch_pair import without_batch
from accumtune.execution.executors import Executor
from accumtune.execution.placement import current_place
from accumtune.execution.timeouts import DEFAULT_SECONDS
from accumtune.memory.budget import format_bytes
from accumtune.memory.cpu_simulation import Trace
from accumtune.memory.device import memory_limit_environment
from accumtune.memory.prediction.confirmation import MOST_FAILURES, MOST_TRIES, next_to_run
from accumtune.memory.prediction.exploration import next_probe_size
from accumtune.memory.prediction.profile import HEADROOM, LARGEST_EXTRAPOLATION, Measurement, Profile
from accumtune.memory.prediction.similar_profile import SimilarProfile
from accumtune.memory.prediction.window_bytes import NO_LOSS
from accumtune.tracking.small_files import write_atomically
from accumtune.worker.transport.outcome import Outcome, finished
from accumtune.worker.transport.task_directory import TaskDirectory

# Peak memory differs only between one step, without accumulators, and several; a longer window's data are computed.
_PROBED_ACCUMULATION_STEPS = (1, 2)
# A loss that should take so many times the budget is not tried.
_CERTAIN = 1.5


@dataclass(frozen=True)
class ModelFacts:
    """The result of `inspect`. Models with the same `signature` share a profile.

    `appeared` are the hyperparameters that were first declared while this model was built: `space` and `values`, as in
    Keras Tuner's configuration. `loss_failure` is why the memory of a loss over the whole effective batch is not known.
    """

    signature: str
    device: str
    static_bytes: int
    sample_bytes: int
    batch_coupled_layers: tuple[str, ...]
    precision_policy: str
    sample_shapes: Any
    appeared: Mapping[str, Any] = field(default_factory=lambda: {"space": [], "values": {}})
    identity: Mapping[str, str] = field(default_factory=dict)
    parameters: int = 0
    loss_bytes: tuple[float, ...] = NO_LOSS
    activation_bytes: int = 0
    loss_failure: str = ""
    validation_bytes: int = 0

    @property
    def kind(self) -> tuple[str, str, str | None]:
        """What decides how many bytes a parameter takes: device, precision and optimizer."""
        return self.device, self.precision_policy, self.identity.get("optimizer")

    def completed(self, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
        """Returns Keras Tuner's configuration of hyperparameters, with those that appeared."""
        return {
            **hyperparameters,
            "space": [*hyperparameters["space"], *self.appeared["space"]],
            "values": {**self.appeared["values"], **hyperparameters["values"]},
        }


class Profiler:
    """Profiles models of one search, each signature once.

    Args:
        executor: where probes run.
        payload_file: the hypermodel and the data (`dump_payload`).
        scratch_folder: for the directories of probes.
        profiles_folder: where profiles are kept between sessions.
        memory_budget_bytes: probes run under it; None for no limit.
        micro_batch_sizes: those that the search uses.
        on_probe: called with a line of text for each probe.
        timeout_seconds: the time limit of a process that builds or probes.
        only_listed: whether no other size will be asked for. Then nothing more is probed once the largest listed size
            has run under the budget.
    """

    def __init__(
        self,
        executor: Executor,
        payload_file: Path,
        scratch_folder: Path,
        profiles_folder: Path,
        *,
        memory_budget_bytes: int | None,
        micro_batch_sizes: Sequence[int],
        on_probe: Callable[[str], None] = lambda line: None,
        timeout_seconds: float = DEFAULT_SECONDS,
        only_listed: bool = False,
    ) -> None:
        self._executor = executor
        self._payload_file = payload_file
        self._scratch_folder = scratch_folder
        self._profiles_folder = profiles_folder
        self._memory_budget_bytes = memory_budget_bytes
        self._micro_batch_sizes = tuple(sorted(micro_batch_sizes))
        self._on_probe = on_probe
        self._timeout_seconds = timeout_seconds
        self._only_listed = only_listed
        self._facts: dict[str, ModelFacts] = {}
        self._profiles: dict[str, Profile] = {}
        self._numbers = itertools.count()
        # One probe at a time: two trials must not both probe a signature, and timed probes would disturb each other.
        self._lock = threading.RLock()

    def inspect(self, hyperparameters: Mapping[str, Any]) -> ModelFacts:
        """Builds the model of these hyperparameters (Keras Tuner's configuration of them) and describes it."""
        key = _key_of(hyperparameters)
        facts = self._facts.get(key)
        if facts is None:  # without the lock, because nothing is timed
            facts = self._facts.setdefault(key, self.inspect_anew(hyperparameters))
            nothing_new = replace(facts, appeared={"space": [], "values": {}})
            self._facts.setdefault(_key_of(facts.completed(hyperparameters)), nothing_new)
        return facts

    def inspect_anew(self, hyperparameters: Mapping[str, Any]) -> ModelFacts:
        """Does the same as `inspect`, even if the model was inspected before."""
        outcome = self._run("inspect", {"hyperparameters": dict(hyperparameters)}, None)
        result = dict(finished(outcome, "The build function").result)
        result["batch_coupled_layers"] = tuple(result["batch_coupled_layers"])
        return ModelFacts(**result)

    def describe_data(self, seed: int, is_ordered: bool) -> dict[str, str]:
        """Describes the data that functions return: shapes and content, by name."""
        outcome = self._run("describe_data", {"seed": seed, "is_ordered": is_ordered}, None)
        return dict(finished(outcome, "The function that returns data").result)

    def profile(self, hyperparameters: Mapping[str, Any]) -> Profile:
        """Returns the profile of the model of these hyperparameters, after probes if need be.

        Raises:
            BuildError: the model could not be built or did not train.
        """
        facts = self.inspect(hyperparameters)
        with self._lock:
            known = self._known(facts.signature)
            if known is None and facts.loss_failure:
                self._on_probe(
                    "The memory of the loss over the whole effective batch is unknown, and so left out of predictions: "
                    f"the loss failed on made-up outputs ({facts.loss_failure})"
                )
            profile = known or Profile(
                measurements=(),
                device=facts.device,
                memory_source="",
                signature=facts.signature,
                memory_budget_bytes=self._memory_budget_bytes,
                sample_bytes=facts.sample_bytes,
                loss_bytes=facts.loss_bytes,
                validation_bytes=facts.validation_bytes,
            )
            similar = None if profile.measurements else self._similar(facts)
            while (size := self._next_size(profile, facts, similar)) is not None:
                measurements, trace = self._probe(hyperparameters, size)
                profile = _grown(profile, measurements, trace)
                profile = replace(profile, memory_source=profile.memory_source or measurements[0].memory_source)
                if similar is not None and len(profile.measured_sizes()) == 1:
                    profile = replace(profile, estimates=similar.estimates(profile, self._micro_batch_sizes[0]))
                self._keep(profile)
            return profile

    def confirm(self, hyperparameters: Mapping[str, Any], profile: Profile) -> Profile:
        """Runs the largest micro-batch that should fit under the budget, to confirm it.

        It runs under a slightly lower limit, so that it fits the next time too.
        """
        budget = self._memory_budget_bytes
        if budget is None:
            return profile
        failures = 0
        for _ in range(MOST_TRIES):
            if not any(measurement.is_feasible for measurement in profile.measurements):
                break
            size = next_to_run(profile, budget, max(_PROBED_ACCUMULATION_STEPS), self._largest_size())
            if size is None or failures == MOST_FAILURES:
                break
            measurements, trace = self._probe(hyperparameters, size, limit_bytes=int((1 - HEADROOM) * budget))
            failures += sum(not measurement.is_feasible for measurement in measurements)
            profile = _grown(profile, measurements, trace)
            self._keep(profile)
        return profile

    def _largest_size(self) -> int:
        return LARGEST_EXTRAPOLATION * self._micro_batch_sizes[-1]

    def measure(
        self, hyperparameters: Mapping[str, Any], signature: str, micro_batch_size: int, accumulation_steps: int
    ) -> Measurement:
        """Runs a few updates of exactly this pair under the budget, and adds the measurement to the model's profile.

        Raises:
            BuildError: the model could not be built or did not train.
        """
        with self._lock:
            (measurement,), _ = self._probe(hyperparameters, micro_batch_size, (accumulation_steps,))
            measurement = replace(measurement, accumulation_steps=accumulation_steps)
            self.learn(signature, measurement)
            return measurement

    def learn(self, signature: str, measurement: Measurement) -> None:
        """Adds the measurement of a trial."""
        with self._lock:
            profile = self._known(signature)
            if profile is not None:
                self._keep(profile.with_measurement(measurement))

    def _similar(self, facts: ModelFacts) -> SimilarProfile | None:
        """Returns this search's profile of a model of the same kind, most similar in parameters and outputs."""
        if not (self._only_listed and self._memory_budget_bytes and facts.static_bytes) or any(facts.loss_bytes):
            return None
        found = [
            SimilarProfile(
                profile,
                facts.static_bytes / other.static_bytes,
                facts.activation_bytes / other.activation_bytes if other.activation_bytes else None,
            )
            for other in list(self._facts.values())
            if other.kind == facts.kind and other.static_bytes and (profile := self._known(other.signature))
            if len(profile.measured_sizes()) > 1
        ]
        return min(found, key=SimilarProfile.distance, default=None)

    def _next_size(self, profile: Profile, facts: ModelFacts, similar: SimilarProfile | None) -> int | None:
        sizes, budget = self._micro_batch_sizes, self._memory_budget_bytes
        if len(sizes) == 1 and any(facts.loss_bytes):
            sizes = (max(1, sizes[0] // 2), *sizes)  # two show what there is without samples, beside their loss
        if budget is not None:
            if max(facts.static_bytes, facts.validation_bytes / _CERTAIN) > budget:
                return None  # the parameters, or validation's samples and their loss, alone are too large
            if similar is not None and not profile.measurements:
                return similar.first_probe_size(budget, sizes)
            largest_that_ran, _ = profile.bracket(max(_PROBED_ACCUMULATION_STEPS), budget)
            if self._only_listed and largest_that_ran >= sizes[-1] and (profile.shows_slope or len(sizes) == 1):
                return None
        size = next_probe_size(profile, budget, sizes)
        if size is None and not any(measurement.is_feasible for measurement in profile.measurements):
            # Not even the smallest listed size fits: probe smaller ones.
            smaller = [2**power for power in range(20) if 2**power < sizes[0]]
            size = next_probe_size(profile, budget, smaller) if smaller else None
        return size

    def _probe(
        self,
        hyperparameters: Mapping[str, Any],
        micro_batch_size: int,
        accumulation_steps: Sequence[int] = _PROBED_ACCUMULATION_STEPS,
        limit_bytes: int | None = None,
    ) -> tuple[list[Measurement], Trace | None]:
        """Runs a few updates in a process of their own, under `limit_bytes` or the budget; returns their trace too."""
        limit = limit_bytes or self._memory_budget_bytes
        arguments = {
            "hyperparameters": dict(hyperparameters),
            "memory_budget_bytes": limit,
            "micro_batch_size": micro_batch_size,
            "accumulation_steps": list(accumulation_steps),
        }
        outcome = self._run("probe", arguments, limit)
        trace = None
        if outcome.ran_out_of_memory:
            measurements = [out_of_memory(micro_batch_size, 1, limit)]
        else:
            result = finished(outcome, "Training a few updates").result
            measurements = [Measurement.from_dict(measurement) for measurement in result["measurements"]]
            if result.get("trace") is not None:
                trace = Trace.from_dict(result["trace"])
        self._on_probe(_describe_probe(micro_batch_size, measurements))
        return measurements, trace

    def _run(self, task: str, arguments: dict[str, Any], limit_bytes: int | None) -> Outcome:
        directory = TaskDirectory(self._scratch_folder / f"{task}_{os.getpid()}_{next(self._numbers):04d}")
        payload = arguments.get("hyperparameters", {}).get("payload") or str(self._payload_file.resolve())
        directory.write_task(task, {"payload": payload, **arguments})
        environment = memory_limit_environment(self._executor.backend, limit_bytes)
        is_limited = limit_bytes is not None
        outcome = self._executor.submit(directory, environment, self._timeout_seconds, is_limited).result()
        if outcome.is_completed:
            shutil.rmtree(directory.path, ignore_errors=True)
        return outcome

    def _known(self, signature: str) -> Profile | None:
        if signature not in self._profiles:
            try:
                content = json.loads(self._file(signature).read_text())
                self._profiles[signature] = Profile.from_dict(content)
            except FileNotFoundError:
                return None
            except (ValueError, KeyError, TypeError):
                return None  # written by another version
        return self._profiles[signature]

    def _keep(self, profile: Profile) -> None:
        self._profiles[profile.signature] = profile
        write_atomically(self._file(profile.signature), json.dumps(profile.to_dict()))

    def _file(self, signature: str) -> Path:
        return self._profiles_folder / f"{signature}.json"


def _key_of(hyperparameters: Mapping[str, Any]) -> str:
    values = without_batch(hyperparameters["values"])
    # With the type of device, which is among the facts.
    return json.dumps([current_place().kind, hyperparameters.get("payload"), values], sort_keys=True, default=repr)


def _grown(profile: Profile, measurements: Sequence[Measurement], trace: Trace | None) -> Profile:
    for measurement in measurements:
        profile = profile.with_measurement(measurement)
    return profile if trace is None else profile.with_trace(trace)


def check_sizes(name: str, sizes: Sequence[int]) -> tuple[int, ...]:
    """Returns the sizes sorted, without repetition.

    Raises:
        BatchSizeError: one of them is not a whole number of at least 1, or there is none.
    """
    import numbers

    listed = list(sizes) if not isinstance(sizes, (int, str)) else [sizes]
    wrong = [size for size in listed if isinstance(size, bool) or not isinstance(size, numbers.Integral) or size < 1]
    if wrong or not listed:
        raise errors.BatchSizeError(
            f"Received {name}={sizes!r}" + (f", in which {wrong[0]!r} is not possible." if wrong else "."),
            "whole numbers of at least 1.",
            f"give, for example, {name}=(8, 16, 32, 64).",
        )
    return tuple(sorted({int(size) for size in listed}))


def out_of_memory(micro_batch_size: int, accumulation_steps: int, limit_bytes: int | None) -> Measurement:
    """Returns the measurement of a size that ran out of memory under a limit: without a peak and a time."""
    return Measurement(
        micro_batch_size=micro_batch_size,
        accumulation_steps=accumulation_steps,
        peak_memory_bytes=None,
        seconds_per_update=None,
        memory_source="out of memory",
        memory_limit_bytes=limit_bytes,
    )


def _describe_probe(micro_batch_size: int, measurements: Sequence[Measurement]) -> str:
    parts = []
    for measurement in measurements:
        if measurement.peak_memory_bytes is None:
            parts.append(f"×{measurement.accumulation_steps} out of memory")
        else:
            parts.append(f"×{measurement.accumulation_steps} {format_bytes(measurement.peak_memory_bytes)}")
    return f"probed micro-batch {micro_batch_size}: " + ", ".join(parts)
