"""`accumtune.profile`: measures the cost of a model, without a search."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accumtune.execution.device_query import current_backend
from accumtune.execution.executors import LocalExecutor
from accumtune.execution.platform_support import require_linux
from accumtune.execution.profiling import Profiler, check_sizes
from accumtune.memory.budget import parse_budget
from accumtune.memory.prediction.profile import Profile
from accumtune.worker.builder import ModelBuilder
from accumtune.worker.transport.payload import dump_payload

DEFAULT_MICRO_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def profile(
    build_model: Any,
    x: Any,
    y: Any = None,
    *,
    sample_weight: Any = None,
    micro_batch_sizes: Sequence[int] | None = None,
    memory_budget: int | float | str | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
    confirm_largest: bool = True,
    on_probe: Callable[[str], None] = lambda line: None,
) -> Profile:
    """Measures a model's peak memory and throughput at a few micro-batch sizes, and predicts them for all others.

    Each size runs a few real updates, in a process of its own under the budget.

    Args:
        build_model: a Keras Tuner build function or `keras_tuner.HyperModel`.
        x, y, sample_weight: training data: arrays (also dicts and tuples of arrays), a `keras.utils.PyDataset`, or
            a function without arguments that returns one of these or a `tf.data.Dataset`.
        micro_batch_sizes: the sizes to choose probes from. Default: powers of two from 1 to 1024.
        memory_budget: `"2GiB"` or bytes; None measures without a limit.
        hyperparameters: values by name, for `build_model`; others have their defaults.
        confirm_largest: with a budget, also run the largest micro-batch that should fit, whether it is listed or not.
        on_probe: called with a line of text after each probe, to show progress.

    Returns:
        A `Profile`: `predict_peak_memory(...)` in bytes, `predict_throughput(...)` in samples per second,
        `largest_micro_batch_size(...)`.

    Raises:
        BudgetError: the budget cannot be read.
        BatchSizeError: a size is below 1.
        BuildError: the model could not be built or did not train; the message has the traceback.
        UnsendableDataError: the data cannot be sent to another process.

    Example:

    >>> profile = accumtune.profile(build_model, x, y, memory_budget="2GiB")  # doctest: +SKIP
    >>> profile.largest_micro_batch_size("2GiB", accumulation_steps=2)  # doctest: +SKIP
    96
    """
    require_linux("accumtune.profile()")
    budget_bytes = None if memory_budget is None else parse_budget(memory_budget)
    sizes = check_sizes("micro_batch_sizes", micro_batch_sizes or DEFAULT_MICRO_BATCH_SIZES)
    values = (
        dict(getattr(hyperparameters, "values", None) or {})
        if not isinstance(hyperparameters, Mapping)
        else dict(hyperparameters)
    )
    with tempfile.TemporaryDirectory(prefix="accumtune-profile-") as folder:
        root = Path(folder)
        payload_file = root / "data" / "payload.pkl"
        builder = build_model if hasattr(build_model, "build_plain") else ModelBuilder(build_model)
        arguments = {"x": x, "y": y, "sample_weight": sample_weight}
        dump_payload({"hypermodel": builder, "fit_args": (), "fit_kwargs": arguments}, payload_file)
        with LocalExecutor(current_backend()) as executor:
            profiler = Profiler(
                executor, payload_file, root / "scratch", root / "profiles",
                memory_budget_bytes=budget_bytes, micro_batch_sizes=sizes, on_probe=on_probe,
            )  # fmt: skip
            proposal: dict[str, Any] = {"space": [], "values": values}
            found = profiler.profile(proposal)
            return profiler.confirm(proposal, found) if confirm_largest and budget_bytes is not None else found
