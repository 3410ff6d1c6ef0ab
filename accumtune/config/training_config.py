"""`TrainingConfig`: the best configuration of a search as a value, its JSON, and its use in production."""

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
    """A configuration for training a model with exact gradient accumulation, with its measured cost and its origin.

    The attributes have the names of the keys of its JSON (`to_json`, `save`, `load_config`), which
    `training_config.schema.json` beside this file describes.

    Args:
        micro_batch_size: samples in one forward and backward pass.
        accumulation_steps: micro-batches per update.
        effective_batch_size: samples per update; `fit`'s `batch_size`.
        hyperparameters: all values for the build function, by name.
        memory_budget_bytes: the search's limit; None for no limit.
        peak_memory_bytes: the highest allocated bytes during training.
        memory_source: what measured that peak.
        throughput_samples_per_second: after warm-up and compilation.
        objective: `{"name": "val_loss", "direction": "min", "value": 0.05}`.
        learning_rate_scaling: None, `"linear"` or `"sqrt"`, ...
        base_effective_batch_size: ... relative to this effective batch.
        ghost_batch_size: the samples that BatchNormalization normalizes together; None: each micro-batch by itself.
        replicas: devices that share an update (`for_replicas`); effective batch = micro-batch × steps × replicas.
        epochs: the number that the winning trial trained.
        seed: of the winning trial; `keras.utils.set_random_seed(config.seed)` before `build` repeats it.
        fit_options: other arguments of `fit` that change the result, such as `class_weight`.
        trial: the training that reached the objective's value: its `micro_batch_size` (another one of the same
            effective batch may be recommended), `peak_memory_bytes`, `executions` and `best_epoch`; the file of its
            `weights`; `not_carried`, what else its result depends on (callbacks, ...); and `own_train_step`, "mean" or
            "sum" over samples: the gradients of the model's own `train_step`.
        precision_policy, backend, versions, device, data_shapes: of the search.
        batch_coupled_layers: what couples the samples of a micro-batch; with none, every micro-batch trains the same.
        whole_batch_loss: whether the loss is computed over the whole effective batch, in two passes; None: "auto", as
            in `accumtune.accumulate`.
        policy, reason: how it was chosen among the candidates, and why it won.
        source: `experiment`, `run_id`, `search_id`, `trial_id` and `tracking_uri` of the search, without passwords.
        schema_version: of the JSON.

    Raises:
        ConfigError: the values are not a valid configuration.

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
    whole_batch_loss: bool | None = None
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
            ConfigError: it is something else, damaged, or from a newer accumtune.
        """
        return cls(**parse(text, origin))

    def to_json(self) -> str:
        """Returns the configuration as JSON; `schema_version` comes first."""
        values = asdict(self)
        return json.dumps({"schema_version": values.pop("schema_version"), **values}, indent=2) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON file, atomically."""
        write_whole(path, self.to_json())

    def fit_arguments(self, **overrides: Any) -> dict[str, Any]:
        """Returns arguments for `model.fit`: `batch_size`, `epochs` if known, and the search's `fit_options`.

        They also suit `dataset(ds)`, because Keras ignores `batch_size` for data that come in batches.

        Args:
            overrides: other values, for example `epochs=100`, or more arguments of `fit`.
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
        """Builds the compiled model of the best hyperparameters, with accumulation over `micro_batch_size`.

        Args:
            build_model: the build function or `keras_tuner.HyperModel` of the search.

        Raises:
            BuildError: it did not return a compiled Keras model.
        """
        from accumtune.config import production

        return production.build(self, build_model)

    def accumulate(self, model: Any) -> Any:
        """Turns on accumulation, as `build` does, in a compiled model that you have built in another way."""
        from accumtune.config import production

        return production.accumulate(self, model)

    def dataset(self, dataset: Any, *, is_batched: bool | None = None) -> Any:
        """Returns the same samples in the same order, in effective batches: `model.fit(config.dataset(ds), ...)`.

        Args:
            dataset: a `tf.data.Dataset` of samples or of batches of any size (dicts, tuples and sample weights as
                `fit` takes them), or a `keras.utils.PyDataset`. Its cardinality is kept if it is known.
            is_batched: whether the elements of a `tf.data.Dataset` are batches. None: decided by `data_shapes`.

        Raises:
            DataError: it is something else, or `data_shapes` do not decide whether its elements are batches.
        """
        from accumtune.config import production

        return production.dataset(self, dataset, is_batched)

    def load_weights(self, model: Any, source: Any = None, *, tracking_uri: str | None = None) -> Any:
        """Loads the best trial's weights into a model, for a warm start; nothing is unpickled or executed.

        The state of an optimizer that is not built yet is not loaded, so that its schedule begins anew.

        Args:
            model: of the same build function and hyperparameters, such as `build(build_model)`.
            source: a `*.weights.h5` or `*.keras` file, or the search's folder. None: the file that the configuration
                names, or else the model that the search has registered in MLflow (`register_as=`).
            tracking_uri: MLflow's tracking URI; default: yours (`MLFLOW_TRACKING_URI`, then
                `sqlite:///mlruns/mlflow.db`). The one in the configuration is not contacted, because MLflow would send
                it your credentials.

        Returns:
            The same model.

        Raises:
            ConfigError: the weights were not found, belong to another search, or do not fit the model.
        """
        from accumtune.config import weights

        return weights.load_weights(self, model, source, tracking_uri)

    def keras_arguments(self) -> KerasArguments:
        """Returns the closest arguments for plain Keras, for a machine without accumtune.

        Returns:
            `.optimizer` (`{"gradient_accumulation_steps": 4}`), `.fit` (`{"batch_size": 8, ...}`),
            `.hyperparameters`, and `.differences`: sentences on how that training differs. It prints as text;
            `to_dict()` is for JSON.
        """
        from accumtune.config import keras_arguments

        return keras_arguments.keras_arguments(self)

    def for_budget(self, budget: int | float | str, build_model: Any, x: Any, y: Any = None) -> TrainingConfig:
        """Adapts the micro-batch to another budget, with the same effective batch and hyperparameters.

        It profiles the model on this machine.

        Args:
            budget: `"1GiB"` or bytes.
            build_model: the build function or `keras_tuner.HyperModel`.
            x, y: training data, as for `accumtune.profile`.

        Returns:
            A configuration with the fastest micro-batch that fits and divides the effective batch.

        Raises:
            BudgetTooSmallError: not even micro-batch 1 fits.
            BuildError: the model could not be built or trained.
        """
        from accumtune.config import moving

        return moving.for_budget(self, budget, build_model, x, y)

    def for_device(self, build_model: Any, x: Any, y: Any = None) -> TrainingConfig:
        """Adapts the micro-batch to this machine's device: `for_budget` with nine tenths of its free memory.

        Args:
            build_model: the build function or `keras_tuner.HyperModel`.
            x, y: training data, as for `accumtune.profile`.

        Raises:
            BudgetError: the GPU's driver does not know its free memory.
            BudgetTooSmallError: not even micro-batch 1 fits.
            BuildError: the model could not be built or trained.
        """
        from accumtune.config import moving

        return moving.for_device(self, build_model, x, y)

    def for_replicas(self, replicas: int) -> TrainingConfig:
        """Splits the effective batch over devices (`tf.distribute.MirroredStrategy`, `DataParallel`).

        `fit_arguments()` then has the batch of all devices together, as Keras requires; `micro_batch_size` and
        `accumulation_steps` are one device's.

        Args:
            replicas: the number of devices; a divisor of the effective batch.

        Raises:
            BatchSizeError: it does not divide the effective batch; the message lists the divisors.
        """
        from accumtune.config import moving

        return moving.for_replicas(self, replicas)

    def verify(self, build_model: Any, x: Any, y: Any = None, *, peak_tolerance: float = 0.1) -> Verification:
        """Trains here like a trial, for two epochs and 200 updates or for five seconds, and compares the peak memory.

        It runs in a process of its own, under the budget.

        Args:
            build_model: the build function or `keras_tuner.HyperModel`.
            x, y: training data, as for `accumtune.profile`.
            peak_tolerance: the relative difference that the peak may have from the configuration's. A peak is the
                highest of all updates: over 240 updates it differed by 2 % from process to process on a CPU, for
                models of an eighth of a MiB and of 2 MiB; over 16 updates by 5 to 10 %.

        Returns:
            The peak and the throughput here and in the configuration, and how this machine differs from the search's.

        Raises:
            VerificationError: it does not fit the budget on this machine, or its peak differs by more.
            BuildError: the model could not be built or trained.
        """
        from accumtune.config import verification

        return verification.verify(self, build_model, x, y, peak_tolerance)

    def reproduce(
        self, build_model: Any, x: Any, y: Any = None, *, validation_data: Any = None, **fit_arguments: Any
    ) -> Reproduction:
        """Trains the winning trial again, in a process of its own under the budget, and compares its results.

        Args:
            build_model: the build function or `keras_tuner.HyperModel`.
            x, y, validation_data: the data of the search.
            fit_arguments: arguments of the search that a configuration cannot hold (`callbacks`, ...).

        Returns:
            Objective and peak memory, here and in the search. With the same data, versions and kind of device the
            objective is the same; on a CPU, to a few units in the last place.

        Raises:
            ConfigError: the configuration does not come from a search.
            VerificationError: it ran out of memory here.
            BuildError: the model could not be built or trained.
        """
        from accumtune.config import verification

        return verification.reproduce(self, build_model, x, y, validation_data, fit_arguments)

    def __repr__(self) -> str:
        return f"TrainingConfig({', '.join(_described(self))})"


def _described(config: TrainingConfig) -> list[str]:
    """Returns the main facts of a configuration, as parts of a line."""
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
