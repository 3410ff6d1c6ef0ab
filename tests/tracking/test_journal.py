"""Events appended to a journal are read back, whatever happens in between."""

import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accumtune.tracking.journal import Journal, read_search, read_trial, trial_folders

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def same(one, other):
    return json.dumps(one) == json.dumps(other)  # NaN equals NaN here


@settings(max_examples=100, deadline=None)
@given(fields=st.dictionaries(st.text().filter(lambda name: name not in ("event", "time", "self")), VALUES, max_size=4))
def test_what_was_appended_is_read_back(tmp_path_factory, fields):
    journal = Journal(tmp_path_factory.mktemp("journal") / "deep" / "journal.jsonl")
    journal.append("something", **fields)
    journal.append("else")
    first, second = journal.events()
    assert first.pop("event") == "something" and first.pop("time") > 0
    assert same(first, fields)
    assert second["event"] == "else"


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_special_floats_and_numpy_survive(tmp_path, number):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("epoch", logs={"a": number, "b": np.float32(number)}, epoch=np.int64(3), sizes=np.arange(2))
    (event,) = journal.events()
    assert same(event["logs"], {"a": number, "b": number})
    assert event["epoch"] == 3 and event["sizes"] == [0, 1]


def test_a_torn_last_line_is_ignored_and_then_repaired(tmp_path):
    whole = Journal(tmp_path / "whole.jsonl")
    whole.append("one", text="é" * 10)
    whole.append("two")
    content = whole.path.read_bytes()
    for length in range(len(content)):
        journal = Journal(tmp_path / "torn.jsonl")
        journal.path.write_bytes(content[:length])
        read = [event["event"] for event in journal.events()]
        assert read == ["one", "two"][: len(read)]
        # Without its line break a line is complete, too.
        assert len(read) == content[:length].count(b"}")
        journal.append("three")
        assert [event["event"] for event in journal.events()] == [*read, "three"]


def test_rubbish_between_lines_is_passed_over(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("one")
    with open(journal.path, "ab") as file:
        file.write(b"\0\0\0\xff\n[1]\n{}\n" + b"[" * 100_000 + b'\n{"event": 3}\n')
    journal.append("two")
    assert [event["event"] for event in journal.events()] == ["one", "two"]


def test_a_journal_survives_sigkill(tmp_path):
    script = (
        "import sys; from accumtune.tracking.journal import Journal\n"
        "journal = Journal(sys.argv[1])\n"
        "for epoch in range(10**9):\n"
        "    journal.append('epoch', epoch=epoch, filler='x' * 1000)\n"
        "    print(epoch, flush=True)\n"
    )
    path = tmp_path / "journal.jsonl"
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    told = [int(process.stdout.readline()) for _ in range(50)]
    os.kill(process.pid, signal.SIGKILL)
    told += [int(line) for line in process.stdout.read().split()]
    process.wait()
    process.stdout.close()
    epochs = [event["epoch"] for event in Journal(path).events()]
    assert epochs[: len(told)] == told and len(epochs) <= len(told) + 1


def test_a_full_disk_is_an_error_and_loses_nothing(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("/dev/full is Linux's")
    path = tmp_path / "journal.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(OSError):
        Journal(path).append("one")


def test_nothing_there_is_nothing_read(tmp_path):
    assert Journal(tmp_path / "no" / "journal.jsonl").events() == []
    assert trial_folders(tmp_path / "no") == []
    search = read_search(tmp_path / "no")
    assert (search.search_id, search.status, search.trials) == ("", "running", ())
    assert read_trial(tmp_path / "trial_7").trial_id == "7"


def test_a_search_is_read_with_its_trials_by_number(finished):
    search = read_search(finished.folder)
    assert search.name == "made" and search.is_ended and search.objective_direction == "min"
    assert search.micro_batch_sizes == (8, 16, 32, 64)
    assert [trial.status for trial in search.trials] == ["completed", "infeasible", "completed", "failed", "reused"]
    trial = search.with_status("completed")[0]
    assert (trial.effective_batch_size, trial.micro_batch_size, trial.accumulation_steps) == (64, 16, 4)
    assert [epoch.epoch for epoch in trial.epochs] == [0, 1, 2] and trial.objective_value == 0.5
    assert "boom" in search.with_status("failed")[0].traceback
    assert search.with_status("reused")[0].reused_from == "00"


def test_a_new_attempt_supersedes_the_epochs_and_the_end_of_the_one_before(made):
    made.propose("0", micro=32, steps=2)
    made.begin("0", attempt=1)
    made.epoch("0", 0, 1.0, attempt=1)
    made.end("0", "failed", reason="out of memory", objective=None)
    made.propose("0", micro=16, steps=4)
    made.begin("0", attempt=2)
    made.epoch("0", 0, 2.0, attempt=2)
    made.epoch("0", 1, 9.0, attempt=1)  # the process that was given up
    trial = read_trial(made.folder / "trial_0")
    assert (trial.status, trial.reason, trial.attempt, trial.micro_batch_size) == ("running", "", 2, 16)
    assert [epoch.logs["loss"] for epoch in trial.epochs] == [2.0]


def test_a_resumed_search_runs_again(made):
    made.start()
    made.journal.append("advice", text="more")
    made.finish("interrupted", "Ctrl-C")
    assert read_search(made.folder).status == "interrupted"
    made.journal.append("search_resumed", max_trials=9, memory_budget_bytes=None, identity={"epochs": "4"})
    made.journal.append("advice", text="more")
    search = read_search(made.folder)
    assert (search.max_trials, search.memory_budget_bytes, search.identity) == (9, None, {"epochs": "4"})
    assert (search.status, search.reason, search.advice) == ("running", "", ("more",))


def test_fields_and_events_of_a_later_version_are_passed_over(made):
    made.start(later="field", objective="not a mapping")
    made.journal.append("later_event", value=1)
    made.trial("0").append("proposed", trial_id="0", number=0, hyperparameters=None, later=1)
    made.trial("0").append("epoch", attempt=None, epoch="x", logs=3)
    search = read_search(made.folder)
    assert search.objective_name == "val_loss" and search.trials[0].hyperparameters == {}
