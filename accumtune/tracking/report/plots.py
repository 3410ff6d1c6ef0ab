"""Draws the pictures of a search as PNG files, with Matplotlib but without pyplot: no global state, no display.

Colours are Okabe and Ito's (2008) and viridis, which colour-blind readers can tell apart; shapes differ too.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from accumtune.memory.budget import format_bytes, mib
from accumtune.tracking.records import SearchRecord, TrialRecord
from accumtune.tracking.report.noise_scale_note import noise_scale_of

_BLACK, _ORANGE, _BLUE, _VERMILLION, _GREY = "#222222", "#E69F00", "#0072B2", "#D55E00", "#9A9A9A"


def draw_all(
    record: SearchRecord,
    candidates: Sequence[Any],
    front: Sequence[Any],
    best: Any | None,
    profile_points: Sequence[Mapping[str, Any]],
) -> dict[str, bytes]:
    """Returns the pictures by file name; those without data are left out.

    Args:
        record: the search.
        candidates, front, best: as in `accumtune.tracking.report.writer.write_report`.
        profile_points: the profile's predictions for the chosen candidate's model.
    """
    drawn: dict[str, bytes] = {}
    shown = [item for item in candidates if _is_number(item.objective) and _is_number(item.peak_memory_bytes)]
    if shown:
        drawn["pareto.png"] = _pareto(record, shown, [it for it in front if it in shown], best)
        drawn["effective_batch.png"] = _effective_batch(record, [it for it in shown if it.is_trained], best)
    measured = [trial for trial in record.trials if trial.micro_batch_size and _is_number(trial.peak_memory_bytes)]
    signature = _signature(record, best)
    if measured or profile_points:
        drawn["memory.png"] = _against_micro_batch(
            record, measured, profile_points, signature, "peak_memory_bytes", "peak memory (MiB)", 1 / 2**20
        )
    timed = [trial for trial in measured if _is_number(trial.throughput_samples_per_second)]
    if timed:
        drawn["throughput.png"] = _against_micro_batch(
            record, timed, profile_points, signature, "throughput_samples_per_second", "samples per second", 1.0
        )
    return drawn


def _pareto(record: SearchRecord, shown: Sequence[Any], front: Sequence[Any], best: Any | None) -> bytes:
    figure, axes = _figure()
    trained = [item for item in shown if item.is_trained]
    # Of the many untrained candidates, only those on the front are of interest.
    profiled = [item for item in front if not item.is_trained]
    speeds = [item.throughput_samples_per_second for item in shown if item.throughput_samples_per_second]
    scale = _speed_scale(speeds)
    for items, marker, size, label in ((profiled, "s", 34, "predicted"), (trained, "o", 62, "trained")):
        if items:
            axes.scatter(
                [mib(item.peak_memory_bytes) for item in items], [item.objective for item in items],
                c=[item.throughput_samples_per_second or math.nan for item in items], cmap="viridis", norm=scale,
                plotnonfinite=True, marker=marker, s=size, edgecolors="white", linewidths=0.6, zorder=3,
                label=label,
            )  # fmt: skip
    outline = sorted((mib(item.peak_memory_bytes), item.objective) for item in front)
    if outline:
        axes.scatter(*zip(*outline, strict=True), s=150, facecolors="none", edgecolors=_BLACK, linewidths=1.1, zorder=4,
                     label="on the Pareto front")  # fmt: skip
    _staircase(axes, outline, record.objective_direction)
    if best is not None and _is_number(best.peak_memory_bytes):
        where = (mib(best.peak_memory_bytes), best.objective)
        axes.scatter(*where, marker="*", s=420, color=_ORANGE, edgecolors=_BLACK, linewidths=0.9, zorder=5,
                     label=f"chosen: {_batch(best)}")  # fmt: skip
    _budget_line(axes, record, vertical=True)
    _objective_axis(axes, record, [item.objective for item in shown])
    axes.set_xlabel("peak memory (MiB)")
    axes.set_title(f"{record.name}: quality, memory and speed")
    if speeds:
        from matplotlib.cm import ScalarMappable

        bar = figure.colorbar(ScalarMappable(norm=scale, cmap="viridis"), ax=axes, pad=0.015)
        bar.set_label("samples per second")
        bar.ax.yaxis.set_major_formatter("{x:,.0f}")
        bar.ax.yaxis.set_minor_formatter("{x:,.0f}")
    _legend(figure, axes)
    return _png(figure)


def _staircase(axes: Any, outline: Sequence[tuple[float, float]], direction: str) -> None:
    """Draws the best objective that each amount of memory allows."""
    sign = -1 if direction == "max" else 1
    steps: list[tuple[float, float]] = []
    for memory, objective in outline:
        if not steps or sign * objective < sign * steps[-1][1]:
            steps.append((memory, objective))
    if len(steps) > 1:
        axes.step(*zip(*steps, strict=True), where="post", color=_BLACK, linewidth=1.0, alpha=0.5, zorder=2)


def _effective_batch(record: SearchRecord, trained: Sequence[Any], best: Any | None) -> bytes:
    figure, axes = _figure()
    axes.scatter([item.effective_batch_size for item in trained], [item.objective for item in trained],
                 s=55, color=_BLUE, edgecolors="white", linewidths=0.6, zorder=3, label="trained")  # fmt: skip
    pick = min if record.objective_direction != "max" else max
    sizes = sorted({item.effective_batch_size for item in trained})
    tops = [pick(item.objective for item in trained if item.effective_batch_size == size) for size in sizes]
    axes.plot(sizes, tops, color=_BLUE, linewidth=1.2, alpha=0.6, zorder=2, label="best of each")
    if best is not None:
        axes.scatter(best.effective_batch_size, best.objective, marker="*", s=420, color=_ORANGE, edgecolors=_BLACK,
                     linewidths=0.9, zorder=5, label=f"chosen: {_batch(best)}")  # fmt: skip
    _noise_line(axes, record, best, sizes)
    _objective_axis(axes, record, [item.objective for item in trained])
    _power_axis(axes, sizes, "effective batch (samples per update)")
    axes.set_title(f"{record.name}: quality against effective batch")
    _legend(figure, axes)
    return _png(figure)


def _against_micro_batch(
    record: SearchRecord,
    trials: Sequence[TrialRecord],
    points: Sequence[Mapping[str, Any]],
    signature: str | None,
    name: str,
    label: str,
    factor: float,
) -> bytes:
    """Draws memory or throughput against the micro-batch: predictions as a line, measurements as dots."""
    figure, axes = _figure()
    predicted = sorted(
        (point["micro_batch_size"], point[f"predicted_{name}"] * factor)
        for point in points
        if _is_number(point.get(f"predicted_{name}"))
    )
    if predicted:
        axes.plot(*zip(*predicted, strict=True), color=_BLUE, linewidth=1.6, marker="_", markersize=9, zorder=2,
                  label="predicted, chosen model in 2 steps")  # fmt: skip
    same = [trial for trial in trials if signature is None or trial.signature == signature]
    others = [trial for trial in trials if trial not in same]
    for group, color, text in ((others, _GREY, "measured, other models"), (same, _ORANGE, "measured, chosen model")):
        if group:
            sizes, values = zip(*((it.micro_batch_size, getattr(it, name) * factor) for it in group), strict=True)
            axes.scatter(sizes, values, s=58, color=color, edgecolors=_BLACK, linewidths=0.6, zorder=3,
                         label=text)  # fmt: skip
    if name == "peak_memory_bytes":
        _budget_line(axes, record, vertical=False)
    else:
        axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(bottom=0)
    axes.set_ylabel(label)
    ticks = {trial.micro_batch_size for trial in trials} | {size for size, _ in predicted}
    _power_axis(axes, sorted(size for size in ticks if size), "micro-batch (samples in one pass)")
    axes.set_title(f"{record.name}: {label.split(' (')[0]} against micro-batch")
    _legend(figure, axes)
    return _png(figure)


def _signature(record: SearchRecord, best: Any | None) -> str | None:
    if best is None:
        return None
    return next((trial.signature for trial in record.trials if trial.trial_id == best.trial_id), None)


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 5.0), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(True, color="#e6e6e6", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    content = io.BytesIO()
    # Without Matplotlib's version in the file, the same search gives the same bytes.
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def _speed_scale(speeds: Sequence[float]) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    low, high = min(speeds, default=1.0), max(speeds, default=1.0)
    return LogNorm(low, high) if 0 < low and high > 10 * low else Normalize(low, high if high > low else low + 1.0)


def _objective_axis(axes: Any, record: SearchRecord, values: Sequence[float]) -> None:
    better = "higher" if record.objective_direction == "max" else "lower"
    axes.set_ylabel(f"best {record.objective_name} ({better} is better)")
    if values and min(values) > 0 and max(values) > 10 * min(values):
        from matplotlib.ticker import LogLocator, NullFormatter

        # Otherwise one diverged trial would flatten all others into a line.
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def _power_axis(axes: Any, sizes: Sequence[int], label: str) -> None:
    axes.set_xlabel(label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(sizes), labels=[str(size) for size in sizes], minor=False)
    axes.set_xticks([], minor=True)
    if len(sizes) > 10:
        axes.tick_params(axis="x", labelrotation=45)


def _noise_line(axes: Any, record: SearchRecord, best: Any | None, sizes: Sequence[int]) -> None:
    """Draws the noise scale; if it is far from the effective batches that were searched, only in the legend."""
    noise = noise_scale_of(record, best)
    if noise is None or not sizes:
        return
    label = f"gradient noise scale {noise}: beyond it, little gain"
    is_near = sizes[0] / 2 <= noise.samples <= sizes[-1] * 2
    draw = axes.axvline if is_near else lambda _, **style: axes.plot([], [], **style)
    draw(noise.samples, color=_GREY, linestyle=":", linewidth=1.8, zorder=1, label=label)


def _budget_line(axes: Any, record: SearchRecord, vertical: bool) -> None:
    budget = record.memory_budget_bytes
    if budget is None:
        return
    draw = axes.axvline if vertical else axes.axhline
    label = f"budget {format_bytes(budget)}"
    draw(mib(budget), color=_VERMILLION, linestyle="--", linewidth=1.5, zorder=1, label=label)


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        # Below the axes, where it hides no point.
        legend = figure.legend(
            handles, labels, loc="outside lower center", ncols=min(len(handles), 5), frameon=False,
            fontsize=9, columnspacing=1.4, handletextpad=0.5,
        )  # fmt: skip
        for handle in legend.legend_handles:
            if hasattr(handle, "set_sizes"):
                handle.set_sizes([60])


def _batch(candidate: Any) -> str:
    return f"{candidate.effective_batch_size} = {candidate.micro_batch_size} × {candidate.accumulation_steps}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
