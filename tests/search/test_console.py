"""The printed output: lines in a file, a live view on a terminal, nothing with verbose=0."""

import io
import os
import pty
import threading

import pytest

from accumtune.search.session.console import Console, Progress, duration
from accumtune.search.trial.trial_result import TrialResult

VALUES = {"effective_batch_size": 16, "micro_batch_size": 8, "accumulation_steps": 2, "rate": 0.1}
REPORT = {"peak_memory_bytes": 2**20, "throughput_samples_per_second": 100.0}


def completed(value=0.5):
    return TrialResult("completed", VALUES, metrics={"val_loss": value}, report=REPORT)


def play(console):
    with console:
        console.trial_started(1, VALUES, 2**20)
        console.trial_ended(1, completed())
        console.trial_started(2, VALUES, 2**20)
        if console._live is not None:
            console._live.refresh()
        console.trial_ended(2, TrialResult("failed", VALUES, reason="[red]boom[/red] ValueError"))
        console.trial_ended(3, TrialResult("reused", VALUES, reason="the same training as trial 0"))


def on_a_terminal(verbose):
    """What a terminal receives."""
    leader, follower = pty.openpty()
    received = bytearray()

    def read():
        while True:
            try:
                chunk = os.read(leader, 4096)
            except OSError:  # Linux says EIO once the other side is closed
                return
            received.extend(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    with open(follower, "w") as stream:
        play(Console("val_loss", 5, verbose, stream))
    reader.join(timeout=30)
    os.close(leader)
    return received.decode()


def test_a_file_gets_plain_lines():
    stream = io.StringIO()
    play(Console("val_loss", 5, stream=stream))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[1/5] effective batch 16 = 8 × 2, rate=0.1, predicted peak 1.0 MiB"
    assert lines[1].startswith("[1/5]   → val_loss 0.5, peak 1.0 MiB, 100 samples/s")
    assert lines[3].endswith("failed: [red]boom[/red] ValueError") and len(lines) == 5
    assert "\x1b" not in stream.getvalue()


def test_a_terminal_gets_the_lines_and_a_live_view(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    text = on_a_terminal(verbose=1)
    assert "\x1b[" in text and "1/5 trials" in text and "1 running" in text
    assert "best val_loss 0.5 (effective batch 16 = 8 × 2)" in text
    assert "[red]boom[/red]" in text, "what a trial says is not markup"


def test_verbose_decides(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    assert on_a_terminal(verbose=0) == ""
    lines_only = on_a_terminal(verbose=2)
    assert "\x1b" not in lines_only and "[1/5]" in lines_only


def test_progress_counts_what_counts():
    progress = Progress("val_loss", "min", max_trials=6, workers=2)
    progress.remember("completed", 0.7, VALUES)  # of an earlier session: counted, but no clock ran
    assert progress.seconds_left(0.0) is None
    progress.started(2, VALUES, now=0.0)
    progress.ended(2, "completed", 0.5, VALUES, now=10.0)
    progress.started(3, VALUES, now=10.0)
    for status in ("reused", "infeasible"):
        progress.ended(9, status, 0.1, VALUES, now=12.0)
    progress.started(4, VALUES, now=14.0)
    # 4 of 6 left at 10 s each, of which 4 s are done, two at once
    assert progress.seconds_left(14.0) == pytest.approx((4 * 10 - 4) / 2)
    assert progress.summary(14.0) == (
        "2/6 trials · 2 running · 1 reused · 1 infeasible · best val_loss 0.5 (effective batch 16 = 8 × 2) · 18 s left"
    )
    # A trial that takes longer than the others does not make the rest negative.
    assert progress.seconds_left(1000.0) == pytest.approx((4 * 10 - 20) / 2)
    progress.ended(3, "failed", None, VALUES, now=1000.0)
    assert progress.trained == 3 and "1 failed" in progress.summary(1000.0)


@pytest.mark.parametrize("direction, best", [("min", 0.2), ("max", 0.9)])
def test_the_best_so_far(direction, best):
    progress = Progress("score", direction)
    for value in (0.5, float("nan"), 0.9, 0.2):
        progress.remember("completed", value, VALUES)
    progress.remember("reused", 0.0 if direction == "min" else 1.0, VALUES)
    assert progress.best[0] == best and progress.seconds_left(1.0) is None
    assert duration(45) == "45 s" and duration(700) == "12 min" and duration(12600) == "3.5 h"
