"""`TrainingConfig`: the best configuration of a search as a value, its JSON, and what production does with it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Self

from accumtune.accumulation.batch_pair import without_batch
from accumtune.config.schema import SCHEMA_VERSION, parse, plain, validated
from accumtune.memory.budget import format_bytes
from accumtune.tracking.small_files import write_whole
from accumtune.tracking.tracking_uri import without_credentials

if TYPE_CHECKING:
    from accumtune.config.keras_arguments import KerasArguments
    from accumtune.config.verification import Reproduction, Verification

# A predicted peak has fractions of a byte.
_BYTES = ("memory_budget_bytes", "peak_memory_bytes")


@dataclass(frozen=True, repr=False, kw_only=True)
class TrainingConfig:
    """How to train a model with exact gradient accumulation, what it was measured to cost, and where that is from.

    The attributes are named as the keys of its JSON (`to_json`, `save`, `load_config`), described by
    `training_config.schema.json` beside this file.

    Args:
        micro_batch_size: samples in one forward and backward pass.
        accumulation_steps: micro-batches per update.
        effective_batch_size: samples per update; `fit`'s `batch_size`.
        hyperparameters: every value that the build function asks for, by name.
        memory_budget_bytes: what the search had to keep within; None for no limit.
        peak_memory_bytes: the highest allocated bytes during training.
        memory_source: who measured that peak.
        throughput_samples_per_second: after warm-up and compilation.
        objective: `{"name": "val_loss", "direction": "min", "value": 0.05}`.
        learning_rate_scaling: None, `"linear"` or `"sqrt"`, ...
        base_effective_batch_size: ... relative to this effective batch.
        ghost_batch_size: the samples that BatchNormalization normalizes together, whatever the micro-batch; None: those
            of a micro-batch.
        replicas: devices that share an update (`for_replicas`); effective batch = micro-batch × steps × replicas.
        epochs: how many the winning trial trained.
        seed: of the winning trial; `keras.utils.set_random_seed(config.seed)` before `build` repeats it.
        fit_options: what else `fit` was given that changes the result, such as `class_weight`.
        trial: the training that the objective's value is of: its `micro_batch_size` (another one of the same
            effective batch may be recommended), `peak_memory_bytes`, `executions`, `best_epoch`, where its `weights`
            are, in `not_carried` what else its result depends on (callbacks, ...), and in `own_train_step` how the
            gradients of a `train_step` of the model's own were certified, "mean" or "sum".
        precision_policy, backend, versions, device, data_shapes: what it was measured with.
        batch_coupled_layers: where the samples of a micro-batch meet; with none, every micro-batch trains the same.
        whole_batch_loss: whether the loss is that of the whole effective batch, in two passes.
        policy, reason: how it was chosen among the candidates, and why it won.
        source: `experiment`, `run_id`, `search_id`, `trial_id` and `tracking_uri` it came from; a password in the
            URI is left out.
        schema_version: of the JSON.

    Raises:
        ConfigError: the values make no configuration.

    Example:

    >>> config = accumtune.load_config("best_config.json")
    >>> model = config.build(build_model)
    >>> model.fit(x, y, **config.fit_arguments())
    """

    micro_batch_size: int
    accumulation_steps: int
    effective_batch_size: int
    hyperparameters: Mapping[str, Any] = field(hash=False)
    memory_budget_bytes: int | None = None
    peak_memory_bytes: int | None = None
    memory_source: str | None = None
    throughput_samples_per_second: float | None = None
    objective: Mapping[str, Any] = field(default_factory=dict, hash=False)
    learning_rate_scaling: str | None = None
    base_effective_batch_size: int | None = None
    ghost_batch_size: int | None = None
    replicas: int = 1
    epochs: int | None = None
    seed: int | None = None
    fit_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    trial: Mapping[str, Any] = field(default_factory=dict, hash=False)
    precision_policy: str | None = None
    backend: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict, hash=False)
    device: str | None = None
    data_shapes: Any = field(default=None, hash=False)
    batch_coupled_layers: Sequence[str] = field(default=(), hash=False)
    whole_batch_loss: bool = False
    policy: str | None = None
    reason: str | None = None
    source: Mapping[str, str | None] = field(default_factory=dict, hash=False)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        values = {item.name: plain(getattr(self, item.name)) for item in fields(self)}
        for name in _BYTES:
            if isinstance(values[name], float) and math.isfinite(values[name]):
                values[name] = int(values[name])
        validated(values, "The TrainingConfig")
        if values["source"].get("tracking_uri"):
            values["source"]["tracking_uri"] = without_credentials(values["source"]["tracking_uri"])
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_json(cls, text: str | bytes, origin: str = "The text") -> Self:
        """Reads what `to_json` wrote.

        Raises:
            ConfigError: it is something else, broken, or from a newer accumtune.
        """
        return cls(**parse(text, origin))

    def to_json(self) -> str:
        """JSON for people and programs; `schema_version` comes first."""
        values = asdict(self)
        return json.dumps({"schema_version": values.pop("schema_version"), **values}, indent=2) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON file in one move: a reader sees the old file or the new one, never half of it."""
        write_whole(path, self.to_json())

    def fit_arguments(self, **overrides: Any) -> dict[str, Any]:
        """Arguments for `model.fit`: `batch_size`, `epochs` where the number is known, and the search's `fit_options`.

        With `dataset(ds)` too: Keras passes over `batch_size` where the data come as batches.

        Args:
            overrides: what you want otherwise, for example `epochs=100`, or more of `fit`'s arguments.
        """
        arguments: dict[str, Any] = {"batch_size": self.effective_batch_size, "epochs": self.epochs, **self.fit_options}
        if "class_weight" in arguments:  # the keys of JSON are text
            arguments["class_weight"] = {int(key): value for key, value in arguments["class_weight"].items()}
        return {name: value for name, value in arguments.items() if value is not None} | overrides

    @property
    def own_hyperparameters(self) -> dict[str, Any]:
        """The hyperparameters without the batch sizes."""
        own = without_batch(self.hyperparameters)
        return {name: value for name, value in own.items() if name != "ghost_batch_size"}

    def build(self, build_model: Any) -> Any:
        """A compiled model with the best hyperparameters that accumulates over `micro_batch_size`.

        Args:
            build_model: the build function or `keras_tuner.HyperModel` that was searched.

        Raises:
            BuildError: it did not return a compiled Keras model.
        """
        from accumtune.config import production

        return production.build(self, build_model)

    def accumulate(self, model: Any) -> Any:
        """The same for a compiled model that production builds in its own way."""
        from accumtune.config import production

        return production.accumulate(self, model)

    def dataset(self, dataset: Any, *, is_batched: bool | None = None) -> Any:
        """The same samples in the same order, in batches of the effective size: `model.fit(config.dataset(ds), ...)`.

        Args:
            dataset: a `tf.data.Dataset` of samples or of batches of any size (dicts, tuples and sample weights as
                `fit` takes them), or a `keras.utils.PyDataset`. Its cardinality is kept where it can be known.
            is_batched: whether the elements of a `tf.data.Dataset` are batches. None: told by `data_shapes`.

        Raises:
            DataError: it is something else, or it cannot be told whether its elements are batches.
        """
        from accumtune.config import production

        return production.dataset(self, dataset, is_batched)

    def load_weights(self, model: Any, source: Any = None, *, tracking_uri: str | None = None) -> Any:
        """Loads the best trial's weights into a model, for a warm start; nothing is unpickled or executed.

        Args:
            model: of the same build function and hyperparameters, such as `build(build_model)`.
            source: a `*.weights.h5` or `*.keras` file, or the search's folder. None: where the search says it kept
                them, else the model that it registered in MLflow (`register_as=`).
            tracking_uri: MLflow's; default: yours (`MLFLOW_TRACKING_URI`, then `sqlite:///mlruns/mlflow.db`). The one
                that stands in the configuration is not contacted: who wrote it would get your credentials.

        Returns:
            The same model.

        Raises:
            ConfigError: the weights were not found, belong to another search, or do not fit the model.
        """
        from accumtune.config import weights

        return weights.load_weights(self, model, source, tracking_uri)

    def keras_arguments(self) -> KerasArguments:
        """What comes closest in plain Keras, for those who cannot install accumtune.

        Returns:
            `.optimizer` (`{"gradient_accumulation_steps": 4}`), `.fit` (`{"batch_size": 8, ...}`),
            `.hyperparameters`, and `.differences`: sentences on where that training is another one. Printed, it reads
            as text; `to_dict()` is for JSON.
        """
        from accumtune.config import keras_arguments

        return keras_arguments.keras_arguments(self)

    def for_budget(self, budget: int | float | str, build_model: Any, x: Any, y: Any = None) -> TrainingConfig:
        """The same training (effective batch, hyperparameters) within another budget, as measured on this machine.

        Args:
            budget: `"1GiB"` or bytes.
            build_model: the build function or `keras_tuner.HyperModel`.
            x, y: training data, as for `accumtune.profile`.

        Returns:
            A configuration with the micro-batch, a divisor of the effective batch, that is the fastest within it.

        Raises:
            BudgetTooSmallError: not even micro-batch 1 fits.
            BuildError: the model could not be built or trained.
        """
        from accumtune.config import moving

        return moving.for_budget(self, budget, build_model, x, y)

    def for_device(self, build_model: Any, x: Any, y: Any = None) -> TrainingConfig:
        """The same training on the device of this machine: `for_budget` with nine tenths of what it has free now.

        Args:
            build_model: the build function or `keras_tuner.HyperModel`.
            x, y: training data, as for `accumtune.profile`.

        Raises:
            BudgetError: the driver of the GPU does not say what is free.
            BudgetTooSmallError: not even micro-batch 1 fits.
            BuildError: the model could not be built or trained.
        """
        from accumtune.config import moving

        return moving.for_device(self, build_model, x, y)

    def for_replicas(self, replicas: int) -> TrainingConfig:
        """The same effective batch split over devices (`tf.distribute.MirroredStrategy`, `DataParallel`).

        `fit_arguments()` then has the batch of all devices together, as Keras wants it; `micro_batch_size` and
        `accumulation_steps` are one device's.

        Args:
            replicas: how many devices; a divisor of the effective batch.

        Raises:
            BatchSizeError: it does not divide the effective batch; the error says what does.
        """
        from accumtune.config import moving

        return moving.for_replicas(self, replicas)

    def verify(self, build_model: Any, x: Any, y: Any = None, *, peak_tolerance: float = 0.1) -> Verification:
        """Trains here as a trial would, for two epochs and 200 updates or for five seconds, and compares.

        It runs in a process of its own, under the budget.

        Args:
            build_model: the build function or `keras_tuner.HyperModel`.
            x, y: training data, as for `accumtune.profile`.
            peak_tolerance: the share by which the measured peak may differ from the promised one. A peak is the
                highest of all updates: after 240 of them it differed by 2 % from process to process on a CPU, for
                models of an eighth of a MiB and of 2 MiB, after 16 by 5 to 10 %.

        Returns:
            What was measured and promised, and what differs between this machine and the search's.

        Raises:
            VerificationError: it does not fit the budget on this machine, or its peak is not the promised one.
            BuildError: the model could not be built or trained.
        """
        from accumtune.config import verification

        return verification.verify(self, build_model, x, y, peak_tolerance)

    def reproduce(
        self, build_model: Any, x: Any, y: Any = None, *, validation_data: Any = None, **fit_arguments: Any
    ) -> Reproduction:
        """Trains the winning trial once more, whole, in a process of its own under the budget, and compares.

        Args:
            build_model: the build function or `keras_tuner.HyperModel`.
            x, y, validation_data: the data of the search.
            fit_arguments: what the search was given and a configuration cannot carry (`callbacks`, ...).

        Returns:
            Objective and peak memory, here and as the search had them. With the same data, versions and kind of
            device the objective is the same; on a CPU to a few units of the last place.

        Raises:
            ConfigError: the configuration is not one of a search.
            VerificationError: it ran out of memory here.
            BuildError: the model could not be built or trained.
        """
        from accumtune.config import verification

        return verification.reproduce(self, build_model, x, y, validation_data, fit_arguments)

    def __repr__(self) -> str:
        return f"TrainingConfig({', '.join(_described(self))})"


def _described(config: TrainingConfig) -> list[str]:
    """What a person wants to know of a configuration first, in parts of a line."""
    batch = f"{config.effective_batch_size} = {config.micro_batch_size} × {config.accumulation_steps}"
    if config.replicas > 1:
        batch += f" × {config.replicas} replicas"
    parts = [f"effective batch {batch}"]
    parts += [f"{name}={_short(value)}" for name, value in config.own_hyperparameters.items()]
    if config.peak_memory_bytes is not None:
        budget = "" if config.memory_budget_bytes is None else f" of {format_bytes(config.memory_budget_bytes)}"
        parts.append(f"peak {format_bytes(config.peak_memory_bytes)}{budget}")
    if config.throughput_samples_per_second is not None:
        parts.append(f"{config.throughput_samples_per_second:,.0f} samples/s")
    if config.objective.get("value") is not None:
        parts.append(f"{config.objective.get('name', 'objective')} {config.objective['value']:.4g}")
    if config.device is not None:
        parts.append(f"on {config.device}")
    return parts


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else repr(value)
