"""A configuration put to work: built, moved to another budget, and verified on the machine at hand."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from accumtune.config.validation import BATCH_HYPERPARAMETERS
from accumtune.config.value import TrainingConfig
from accumtune.errors import BudgetTooSmallError, VerificationError
from accumtune.memory.budget import format_bytes, parse_budget

if TYPE_CHECKING:
    from accumtune.memory.profile import Profile

# Predicted throughputs closer than this are the same to anyone: then the smaller micro-batch, which needs less.
_SAME_SPEED = 0.02


@dataclass(frozen=True)
class Verification:
    """What a configuration costs on this machine beside what it promised.

    Args:
        peak_memory_bytes, promised_peak_memory_bytes: the highest allocated bytes during training.
        throughput_samples_per_second, promised_throughput_samples_per_second: after warm-up.
        memory_budget_bytes: the limit it ran under.
        device: of this machine.
        differences: between this machine and the search's, each in one sentence.
    """

    peak_memory_bytes: int
    promised_peak_memory_bytes: int | None
    throughput_samples_per_second: float | None
    promised_throughput_samples_per_second: float | None
    memory_budget_bytes: int | None
    device: str
    differences: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"peak memory {_against(self.peak_memory_bytes, self.promised_peak_memory_bytes, format_bytes)}"]
        if self.throughput_samples_per_second is not None:
            speed = self.throughput_samples_per_second, self.promised_throughput_samples_per_second
            lines.append(f"throughput {_against(*speed, lambda value: f'{value:,.0f} samples/s')}")
        if self.memory_budget_bytes is not None:
            lines.append(f"memory budget {format_bytes(self.memory_budget_bytes)}: kept")
        return "\n".join([*lines, *self.differences])


def build(config: TrainingConfig, build_model: Any) -> Any:
    """See `TrainingConfig.build`."""
    import keras
    import keras_tuner

    from accumtune.trials.builder import ModelBuilder

    if config.precision_policy not in (None, keras.config.dtype_policy().name):
        warnings.warn(
            f"The search trained with the precision policy {config.precision_policy!r}, here it is "
            f"{keras.config.dtype_policy().name!r}; keras.config.set_dtype_policy({config.precision_policy!r}) before "
            "building makes them equal.",
            stacklevel=3,
        )
    hp = keras_tuner.HyperParameters()
    # Keras Tuner takes a value that is there already instead of a hyperparameter's default.
    hp.values.update({**config.hyperparameters, **_batch(config.micro_batch_size, config.effective_batch_size)})
    builder = ModelBuilder(
        build_model,
        learning_rate_scaling=config.learning_rate_scaling,
        base_effective_batch_size=config.base_effective_batch_size,
    )
    return config.accumulate(builder.build_plain(hp))


def for_budget(config: TrainingConfig, budget: int | float | str, build_model: Any, x: Any, y: Any) -> TrainingConfig:
    """See `TrainingConfig.for_budget`."""
    from accumtune.trials import profiling

    budget_bytes = parse_budget(budget)
    profile = profiling.profile(
        build_model, x, y,
        micro_batch_sizes=_divisors(config.effective_batch_size), memory_budget=budget_bytes,
        hyperparameters=config.hyperparameters,
    )  # fmt: skip
    return fitted(config, profile, budget_bytes, profiling.current_backend())


def fitted(config: TrainingConfig, profile: Profile, budget_bytes: int, backend: str) -> TrainingConfig:
    """The same training with the fastest micro-batch that a profile says fits.

    Raises:
        BudgetTooSmallError: none does.
    """
    effective = config.effective_batch_size
    fitting = [size for size in _divisors(effective) if profile.fits(size, effective // size, budget_bytes)]
    if not fitting:
        raise BudgetTooSmallError(
            f"Not even micro-batch 1 fits in {format_bytes(budget_bytes)} on {profile.device}.",
            "a memory budget in which one sample can be trained",
            "raise the budget, or search a smaller model.",
        )
    speed = {size: profile.predict_throughput(size, effective // size) for size in fitting}
    micro = min(size for size in fitting if speed[size] >= max(speed.values()) * (1 - _SAME_SPEED))
    batch = _batch(micro, effective)
    return replace(
        config,
        **batch,
        hyperparameters={**config.hyperparameters, **batch},
        memory_budget_bytes=budget_bytes,
        peak_memory_bytes=profile.predict_peak_memory(micro, effective // micro),
        memory_source=f"predicted from {profile.memory_source}",
        throughput_samples_per_second=speed[micro],
        device=profile.device,
        backend=backend,
        versions=installed_versions(),
        reason=f"The fastest micro-batch for effective batch {effective} within {format_bytes(budget_bytes)} on "
        f"{profile.device}.",
    )


def verify(config: TrainingConfig, build_model: Any, x: Any, y: Any, peak_tolerance: float) -> Verification:
    """See `TrainingConfig.verify`."""
    from accumtune.trials import profiling

    profile = profiling.profile(
        build_model, x, y,
        micro_batch_sizes=[config.micro_batch_size], memory_budget=config.memory_budget_bytes,
        hyperparameters=config.hyperparameters,
    )  # fmt: skip
    return compared(config, profile, profiling.current_backend(), peak_tolerance)


def compared(config: TrainingConfig, profile: Profile, backend: str, peak_tolerance: float) -> Verification:
    """What a configuration promised beside what a profile of this machine says.

    Raises:
        VerificationError: it does not fit the budget, or needs more memory than promised.
    """
    micro, steps, budget_bytes = config.micro_batch_size, config.accumulation_steps, config.memory_budget_bytes
    differences = tuple(_differences(config, profile.device, backend))
    what = f"Micro-batch {micro} × {steps}"
    told = f" What differs from the search: {'; '.join(differences)}." if differences else ""
    fix = f"config.for_budget({_budget_text(config)}, build_model, x, y) finds the micro-batch that does, here."
    promised = config.peak_memory_bytes
    did_run = any(it.micro_batch_size == micro and it.is_feasible for it in profile.measurements)
    if not did_run or (budget_bytes is not None and not profile.fits(micro, steps, budget_bytes)):
        within = "in its memory" if budget_bytes is None else f"in {format_bytes(budget_bytes)}"
        before = "unknown size" if promised is None else format_bytes(promised)
        raise VerificationError(
            f"{what} does not fit {within} on {profile.device}.{told}",
            f"a peak of {before}, as the search measured",
            fix,
        )
    peak = profile.predict_peak_memory(micro, steps)
    if promised is not None and peak > promised * (1 + peak_tolerance):
        raise VerificationError(
            f"{what} needs {format_bytes(peak)} on {profile.device}.{told}",
            f"at most {100 * peak_tolerance:.0f} % more than the {format_bytes(promised)} that the search measured",
            f"{fix} Or accept it: config.verify(..., peak_tolerance={peak / promised - 0.99:.2f}).",
        )
    return Verification(
        peak_memory_bytes=peak,
        promised_peak_memory_bytes=promised,
        throughput_samples_per_second=profile.predict_throughput(micro, steps),
        promised_throughput_samples_per_second=config.throughput_samples_per_second,
        memory_budget_bytes=budget_bytes,
        device=profile.device,
        differences=differences,
    )


def installed_versions() -> dict[str, str]:
    """The versions that decide what a training step costs, as far as they are installed."""
    from importlib import metadata

    versions = {}
    for name in ("accumtune", "keras", "tensorflow", "jax", "torch", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _differences(config: TrainingConfig, device: str, backend: str) -> list[str]:
    import keras

    here = {"backend": backend, "device": device, "precision policy": keras.config.dtype_policy().name}
    there = {"backend": config.backend, "device": config.device, "precision policy": config.precision_policy}
    versions = installed_versions()
    for name, version in config.versions.items():
        # Only what both know: a package that is missing here matters only where it is the backend, named above.
        if name in versions:
            here[name], there[name] = versions[name], version
    differing = [name for name in here if there[name] not in (None, here[name])]
    return [f"{name}: {there[name]} in the search, {here[name]} here" for name in differing]


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _batch(micro_batch_size: int, effective_batch_size: int) -> dict[str, Any]:
    sizes = (micro_batch_size, -(-effective_batch_size // micro_batch_size), effective_batch_size)
    return dict(zip(BATCH_HYPERPARAMETERS, sizes, strict=True))


def _budget_text(config: TrainingConfig) -> str:
    budget = config.memory_budget_bytes or config.peak_memory_bytes
    return repr(format_bytes(budget)) if budget else '"<budget>"'


def _against(measured: float, promised: float | None, write: Any) -> str:
    if not promised:
        return f"{write(measured)} (nothing was promised)"
    return f"{write(measured)}, promised {write(promised)} ({100 * (measured / promised - 1):+.1f} %)"
