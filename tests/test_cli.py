"""The command line, as a person or a pipeline calls it."""

import json
import os
import socket
import subprocess
import sys
import textwrap

import pytest

from accumtune import cli
from accumtune.cli import find_search, load_object
from accumtune.errors import DataError, SearchDirectoryError

MODULE = """
import keras, numpy as np

def build_model(hp):
    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(hp.Choice("width", [64])), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    return model

def load():
    return np.zeros((32, 16), "float32"), np.zeros((32, 1), "float32")

def build_huge(hp):
    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(2**20), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    return model
"""


@pytest.fixture
def call(tmp_path):
    """Runs `accumtune ...` in a folder that has train.py."""
    (tmp_path / "train.py").write_text(textwrap.dedent(MODULE))

    def call(*arguments):
        command = [sys.executable, "-c", "import sys; from accumtune.cli import main; sys.exit(main())", *arguments]
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)

    return call


def test_probe_answers_how_large_a_micro_batch_fits(call):
    arguments = ("probe", "train:build_model", "--data", "train:load", "--memory-budget", "16MiB")
    done = call(*arguments, "--micro-batch-sizes", "4", "16", "--json")
    answer = json.loads(done.stdout)
    assert done.returncode == 0
    assert answer["largest_micro_batch_size"] >= 16
    fits = {row["micro_batch_size"]: row["fits"] for row in answer["sizes"]}
    assert fits[4] and fits[16] and fits[answer["largest_micro_batch_size"]]


def test_exit_code_1_where_nothing_fits(call):
    done = call("probe", "train:build_huge", "--data", "train:load", "--memory-budget", "16MiB")
    assert done.returncode == 1 and "not even 1 fits" in done.stdout, done.stdout + done.stderr


def test_exit_code_2_and_a_way_out_for_wrong_input(call):
    done = call("probe", "train:no_such_thing", "--data", "train:load")
    assert done.returncode == 2 and "no_such_thing" in done.stderr and "Fix:" in done.stderr
    done = call("best")
    assert done.returncode == 2 and "run a search first" in done.stderr


def test_addresses(tmp_path, monkeypatch):
    assert load_object("os:path.join") is os.path.join
    with pytest.raises(DataError):
        load_object("os")
    with pytest.raises(SearchDirectoryError):
        find_search(str(tmp_path))


def test_a_taken_port_is_left_to_whoever_has_it():
    from accumtune.tracking.browsing import free_port

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert free_port(port) not in (port, 0)
    assert free_port(port) == port


def test_ui_of_a_search_on_a_server_needs_no_command(tmp_path, capsys, monkeypatch):
    started = []

    class Served:
        tracking_uri = "http://127.0.0.1:1"
        sync = ui_command = staticmethod(lambda *port: "")
        ui_address = staticmethod(lambda port: "http://127.0.0.1:1/#/experiments/1/runs")

    class Local(Served):
        tracking_uri = "postgresql://me:hunter2@host/mlflow"
        ui_command = staticmethod(lambda port: f"mlflow ui --port {port}")

    monkeypatch.setattr(cli.subprocess, "call", lambda command, env: started.append((command, env)) or 0)
    monkeypatch.setattr(cli, "_tracker", lambda options: Served)
    assert cli.main(["ui"]) == 0 and started == []
    assert capsys.readouterr().out == "Open http://127.0.0.1:1/#/experiments/1/runs\n"
    monkeypatch.setattr(cli, "_tracker", lambda options: Local)
    assert cli.main(["ui", "--print"]) == 0 and started == []
    assert cli.main(["ui", "--port", "5017"]) == 0
    (command, environment), printed = started[0], capsys.readouterr().out
    assert command[-3:] == ["ui", "--port", "5017"] and "then open http" in printed
    assert environment["MLFLOW_BACKEND_STORE_URI"] == Local.tracking_uri, "with its password, which no one else sees"
    assert "hunter2" not in " ".join(command) + printed
