"""TensorFlow's notes are not printed; important messages are, also the last ones of a process that crashes."""

import subprocess
import sys

import pytest

SAID = [
    "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR",
    "I0000 00:00:1795567725.255646   23617 port.cc:153] oneDNN custom operations are on.",
    "To enable the following instructions: AVX2 FMA, in other operations, rebuild TensorFlow with more flags.",
]
MATTERS = [
    "W0000 00:00:1795567725.255646   23617 device.cc:1] this is slow",
    "E0000 00:00:1795567725.255646   23617 device.cc:2] this is wrong",
    "F0000 00:00:1795567725.255646   23617 device.cc:3] Check failed",
    "Traceback (most recent call last):",
    "I am a person's own line",
]


def said(ending="", before=""):
    script = f"""
import os
{before}
from accumtune.worker.quiet_imports import without_notes
with without_notes():
    for line in {SAID + MATTERS!r}:
        os.write(2, line.encode() + b"\\n")
    {ending or "pass"}
os.write(2, b"afterwards\\nI0000 a note of later\\n")
"""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)


def test_notes_are_dropped_and_the_rest_arrives_in_order():
    assert said().stderr.splitlines() == [*MATTERS, "afterwards", "I0000 a note of later"]


def test_the_last_words_of_a_crash_arrive():
    done = said("os.abort()")
    assert done.returncode < 0 and done.stderr.splitlines()[: len(MATTERS)] == MATTERS


def test_a_process_begun_meanwhile_holds_nothing_up():
    begun = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(30)'], stdout=-3)"
    script = "from accumtune.worker.quiet_imports import without_notes\n"
    script += f"with without_notes():\n    {begun}\nprint('on')"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "on\n" and process.wait(20) == 0


def test_where_tensorflow_is_loaded_already_nothing_is_touched():
    before = "import sys; sys.modules['tensorflow'] = sys"
    assert said(before=before).stderr.splitlines()[: len(SAID)] == SAID


@pytest.mark.slow
def test_importing_tensorflow_is_silent():
    script = "from accumtune.worker.quiet_imports import without_notes\nwith without_notes():\n    import tensorflow"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stderr == ""
