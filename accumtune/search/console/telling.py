"""What a search tells its user, its journal and MLflow when it begins and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accumtune.execution.placement import Place
from accumtune.memory.budget import format_bytes
from accumtune.search.chronicle import Best, Chronicle
from accumtune.search.console.display import Display


class Telling:
    """Tells of one call of `search`.

    Args:
        chronicle: the search's.
        display: what the user sees.
    """

    def __init__(self, chronicle: Chronicle, display: Display) -> None:
        self._chronicle = chronicle
        self._display = display

    def begin(self, description: Callable[[], Mapping[str, Any]], lines: Sequence[str], advice: Sequence[str]) -> bool:
        """Writes down and tells what begins; whether it is the search's first session.

        Args:
            description: of the search, for its journal.
            lines: what the user sees of every session.
            advice: what the user sees once.
        """
        is_first = self._chronicle.begin(description)
        for line in lines:
            self._display.line(line)
        self.advise(advice)
        self._chronicle.start_tracking()
        return is_first

    def advise(self, texts: Sequence[str]) -> None:
        """Tells the user what matters, once: a resumed search does not say it again."""
        self._chronicle.advise(texts, self._display.line)

    def end(self, status: str, reason: str, best: Best | None, save: Callable[[], None], *, is_hurried: bool) -> None:
        """Writes the end down, the report and MLflow's, and says where to look.

        Args:
            status, reason: how it ended.
            best: what was found; None to look for it.
            save: saves Keras Tuner's state.
            is_hurried: somebody waits for the end: what MLflow lacks comes with the next session, or `accumtune sync`.
        """
        try:
            save()
            if not is_hurried:
                self._chronicle.write_report(best, status, reason)
        finally:
            # After the report: MLflow gets it before the search's run is said to have ended.
            self._chronicle.end(status, reason)
            if is_hurried:
                self._chronicle.tracker = None
            message = self._chronicle.stop_tracking()
            if message:
                self._display.line(message)
        address, command = self._chronicle.ui_address, self._chronicle.ui_command
        if address:
            self._display.line(f"Browse it: {address}" + (f"\n  once this runs: {command}" if command else ""))


def greeting(
    project_name: str,
    tuner_name: str,
    memory_budget_bytes: int | None,
    effective_batch_sizes: Sequence[int],
    places: Sequence[Place],
) -> list[str]:
    """The first lines of a session: what is searched, within what, on what."""
    budget = "no memory budget" if memory_budget_bytes is None else format_bytes(memory_budget_bytes)
    sizes = ", ".join(map(str, effective_batch_sizes))
    lines = [f'Search "{project_name}": {tuner_name}, {budget}, effective batches {sizes}']
    if len(places) > 1:
        on = ", ".join(dict.fromkeys(place.description for place in places if place.description))
        lines.append(f"{len(places)} trials at once" + (f": {on}" if on else ""))
    return lines
