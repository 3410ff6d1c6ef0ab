"""Draws a profile: peak memory and speed against the micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accumtune.memory.budget import format_bytes, mib

# Okabe and Ito's (2008) colours, which colour-blind readers can tell apart; shapes differ too.
_BLUE, _ORANGE, _VERMILLION = "#0072B2", "#E69F00", "#D55E00"


def draw_profile(
    rows: Sequence[Mapping[str, Any]], budget_bytes: int | None, accumulation_steps: int, file: str | Path
) -> None:
    """Draws the table that `accumtune probe` prints; the file's ending selects the format.

    Args:
        rows: by micro-batch: `micro_batch_size`, `predicted_peak_memory_bytes`, `measured_peak_memory_bytes` (or
            None), `fits` (or None) and `throughput_samples_per_second`.
        budget_bytes: None for no budget.
        accumulation_steps: of the rows' predictions.
        file: where to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    sizes = [row["micro_batch_size"] for row in rows]
    axes.plot(sizes, [mib(row["predicted_peak_memory_bytes"]) for row in rows], color=_BLUE, label="predicted")
    for fits, marker, label in ((True, "o", "runs in the budget"), (False, "x", "does not"), (None, "o", "measured")):
        points = [row for row in rows if row["fits"] is fits and row["measured_peak_memory_bytes"] is not None]
        if points:
            axes.scatter(
                [row["micro_batch_size"] for row in points],
                [mib(row["measured_peak_memory_bytes"]) for row in points],
                marker=marker, color=_VERMILLION if fits is False else _BLUE, s=60, zorder=3,
                label=label if fits is None else f"measured, {label}",
            )  # fmt: skip
    if budget_bytes is not None:
        axes.axhline(mib(budget_bytes), color=_VERMILLION, linestyle="--", label=f"budget {format_bytes(budget_bytes)}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("micro-batch size")
    axes.set_ylabel("peak memory (MiB)")
    axes.set_ylim(bottom=0)
    speed = axes.twinx()
    speed.plot(sizes, [row["throughput_samples_per_second"] for row in rows], color=_ORANGE, linestyle=":")
    speed.set_ylabel("samples per second (dotted)")
    speed.set_ylim(bottom=0)
    axes.set_title(f"What fits, with {accumulation_steps} accumulation steps")
    axes.legend(loc="upper left")
    figure.savefig(file, dpi=150)
