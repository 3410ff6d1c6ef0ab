"""The command line, called as a user or a pipeline does."""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import forked
import pytest
from running import wait_until_gone

from accumtune import cli
from accumtune.commands import demo, ui
from accumtune.commands.addresses import load_data, load_object, load_validation_data
from accumtune.commands.options import functions_here
from accumtune.commands.searches import find_search, tracker_of
from accumtune.errors import DataError, SearchDirectoryError, TrackingError
from accumtune.search.results.selection import Candidate
from accumtune.tracking.records import SearchRecord

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
def call(tmp_path, monkeypatch, capfd):
    """`accumtune ...` in a folder that has train.py."""
    (tmp_path / "train.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "train", raising=False)

    def call(*arguments):
        code = cli.main([*arguments])
        return subprocess.CompletedProcess(arguments, code, *capfd.readouterr())

    yield call
    sys.modules.pop("train", None)


@pytest.mark.slow
def test_probe_answers_how_large_a_micro_batch_fits(tmp_path):
    """As a pipeline calls it: in a process of its own."""
    (tmp_path / "train.py").write_text(textwrap.dedent(MODULE))
    command = [sys.executable, "-c", "import sys; from accumtune.cli import main; sys.exit(main())"]
    command += ["probe", "train:build_model", "--data", "train:load", "--memory-budget", "16MiB"]
    command += ["--micro-batch-sizes", "4", "16", "--json", "--plot", "probe.png"]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}
    done = forked.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    answer = json.loads(done.stdout)
    assert done.returncode == 0
    assert (tmp_path / "probe.png").read_bytes().startswith(b"\x89PNG")
    assert answer["device"]["total_bytes"] > answer["memory_budget_bytes"] == 16 * 2**20
    assert answer["largest_micro_batch_size"] >= 16
    fits = {row["micro_batch_size"]: row["fits"] for row in answer["sizes"]}
    assert fits[4] and fits[16] and fits[answer["largest_micro_batch_size"]]


def test_exit_code_1_where_nothing_fits(call):
    done = call("probe", "train:build_huge", "--data", "train:load", "--memory-budget", "16MiB")
    assert done.returncode == 1 and "not even 1 fits" in done.stdout, done.stdout + done.stderr
    assert "in total" in done.stdout  # the device is named


def test_exit_code_2_and_a_way_out_for_wrong_input(call):
    done = call("probe", "train:no_such_thing", "--data", "train:load")
    assert done.returncode == 2 and "no_such_thing" in done.stderr and "Fix:" in done.stderr
    done = call("best")
    assert done.returncode == 2 and "run a search first" in done.stderr


@pytest.fixture
def config(tmp_path):
    from accumtune.config import TrainingConfig

    values = {"micro_batch_size": 4, "accumulation_steps": 2, "effective_batch_size": 8}
    made = TrainingConfig(**values, hyperparameters={"width": 64, **values}, memory_budget_bytes=16 * 2**20)
    made.save(tmp_path / "best_config.json")
    return made


def test_verify_tells_a_pipeline_whether_to_go_on(call, config, tmp_path):
    arguments = ("verify", "best_config.json", "train:build_model", "--data", "train:load")
    done = call(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["peak_memory_bytes"] < told["memory_budget_bytes"] == 16 * 2**20
    replace(config, peak_memory_bytes=told["peak_memory_bytes"] // 2).save(tmp_path / "best_config.json")
    done = call(*arguments)
    assert done.returncode == 1 and "more than promised" in done.stderr and done.stdout == ""
    done = call("verify", "no_such.json", "train:build_model", "--data", "train:load")
    assert done.returncode == 2 and "cannot be read" in done.stderr and "Traceback" not in done.stderr


def test_export_prints_or_writes_a_configuration(call, config, tmp_path):
    from accumtune.config import load_config

    done = call("export", "best_config.json")
    assert done.returncode == 0 and json.loads(done.stdout) == json.loads(config.to_json())
    assert call("export", "best_config.json", "--output", "copy/config.json").returncode == 0
    assert load_config(tmp_path / "copy" / "config.json") == config
    done = call("export", "best_config.json", "--format", "keras")
    assert "gradient_accumulation_steps=2" in done.stdout and "batch_size=4" in done.stdout
    (tmp_path / "newer.json").write_text(config.to_json().replace('"schema_version": 1', '"schema_version": 2'))
    for wrong in ("newer.json", "train.py", "no_such_experiment"):
        done = call("export", wrong)
        assert done.returncode == 2 and done.stdout == "" and "Fix:" in done.stderr and "Traceback" not in done.stderr


def test_data_as_scikit_learn_and_keras_split_them(tmp_path, monkeypatch):
    (tmp_path / "splits.py").write_text(
        "def four(): return ['x', 'x_val', 'y', 'y_val']\n"
        "def pair(): return 'x', 'y'\n"
        "def three(): return 1, 2, 3\n"
        "def pipeline(): return 'a data set'\n"
        "def keras_datasets(): return ('train', [0, 1, 2, 3, 4]), ('ab', [0, 1])\n"
        "def two_inputs_two_outputs(): return ('abc', 'def'), ('ghi', 'jkl')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_data("splits:four") == ("x", "y") == load_data("splits:pair")
    assert load_validation_data("splits:four") == ("x_val", "y_val")
    assert load_validation_data("splits:pair") is None
    assert load_data("splits:pipeline")[0]() == "a data set", "the function itself: its data cannot be sent"
    assert load_data("splits:keras_datasets") == ("train", [0, 1, 2, 3, 4])
    assert load_validation_data("splits:keras_datasets") == ("ab", [0, 1])
    pairs = ("abc", "def"), ("ghi", "jkl")
    assert load_data("splits:two_inputs_two_outputs") == pairs, "as many rows everywhere: x and y of one data set"
    assert load_validation_data("splits:two_inputs_two_outputs") is None
    with pytest.raises(DataError):
        load_data("splits:three")


def test_addresses(tmp_path, monkeypatch):
    assert load_object("os:path.join") is os.path.join
    with pytest.raises(DataError):
        load_object("os")
    with pytest.raises(SearchDirectoryError):
        find_search(str(tmp_path))


def test_a_search_is_found_by_its_directory_and_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "letters"):
        (tmp_path / "mlruns/searches" / name).mkdir(parents=True)
        (tmp_path / "mlruns/searches" / name / "search.jsonl").touch()
    for given in ("digits", "mlruns/searches/digits", str(tmp_path / "mlruns/searches/digits")):
        assert find_search(given).resolve() == tmp_path / "mlruns/searches/digits"
    with pytest.raises(SearchDirectoryError, match="one of: .*digits"):
        find_search("digit")


def test_a_limit_is_a_number_of_rows(monkeypatch, capsys):
    """Also if untrained candidates of the Pareto front come first."""
    pairs = ((16, 1, True), (8, 2, False), (4, 4, False), (2, 8, False))
    found = [
        Candidate(0.5, 100.0 * micro, 10.0 * micro, micro, steps, 16, {}, "0", is_trained=is_trained)
        for micro, steps, is_trained in pairs
    ]
    monkeypatch.setattr("accumtune.commands.candidates.find_search", lambda search: search)
    monkeypatch.setattr("accumtune.commands.candidates.read_candidates", lambda folder: (SearchRecord(Path()), found))
    for limit, rows in ((None, 4), (2, 2)):
        assert cli.main(["candidates", *(["--limit", str(limit)] if limit else [])]) == 0
        assert sum("×" in line for line in capsys.readouterr().out.splitlines()[2:]) == rows


def test_which_store_a_command_asks(tmp_path, monkeypatch):
    """The caller's own; never one that only the search's folder names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "search.jsonl").touch()
    (tmp_path / "there.db").touch()
    own = f"sqlite:///{tmp_path}/mlruns/mlflow.db"

    def asked(named, given=None):
        (tmp_path / "tracking.json").write_text(json.dumps({"tracking_uri": named}))
        return tracker_of(argparse.Namespace(search=str(tmp_path), tracking_uri=given)).tracking_uri

    for named in (own, None, "", f"sqlite:///{tmp_path}/moved_away.db"):
        assert asked(named) == own
    for named in (f"sqlite:///{tmp_path}/there.db", "http://host:5000", "postgresql://host/x", ["http://host"], 7):
        with pytest.raises(SearchDirectoryError, match="is not contacted"):
            asked(named)
        assert asked(named, "http://given") == "http://given"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:pw@host:5000")
    assert asked("http://host:5000") == "http://me:pw@host:5000", "the same server, with the caller's password"
    with pytest.raises(SearchDirectoryError) as error:
        asked(own.replace("mlruns/mlflow", "there"))
    assert "pw" not in str(error.value)


def test_a_taken_port_is_left_to_whoever_has_it():
    from accumtune.tracking.mlflow.ui import free_port

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

    monkeypatch.setattr(ui, "serve", lambda command, env: started.append((command, env)) or 0)
    monkeypatch.setattr(ui, "tracker_of", lambda options: Served)
    assert cli.main(["ui"]) == 0 and started == []
    assert capsys.readouterr().out == "Open http://127.0.0.1:1/#/experiments/1/runs\n"
    monkeypatch.setattr(ui, "tracker_of", lambda options: Local)
    assert cli.main(["ui", "--print"]) == 0 and started == []
    capsys.readouterr()
    assert cli.main(["ui", "--json", "--port", "5017"]) == 0 and started == []
    told = json.loads(capsys.readouterr().out)
    assert told == {"command": "mlflow ui --port 5017", "address": Local.ui_address(5017)}
    assert cli.main(["ui", "--port", "5017"]) == 0
    (command, environment), printed = started[0], capsys.readouterr().out
    assert command[-3:] == ["ui", "--port", "5017"] and "then open http" in printed
    assert environment["MLFLOW_BACKEND_STORE_URI"] == Local.tracking_uri, "with its password, which no one else sees"
    assert "hunter2" not in " ".join(command) + printed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_ui_that_is_ended_takes_its_server_along(number, tmp_path):
    """MLflow starts a server process and waits for it; ending only MLflow would leave the server running."""
    wait = "import time; time.sleep(60)"
    server = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {wait!r}]); print(p.pid); p.wait()"
    command = [sys.executable, "-u", "-c", server]
    script = f"import os\nfrom accumtune.commands.ui import serve\nserve({command!r}, os.environ)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        started = int(process.stdout.readline())
        process.send_signal(number)
        process.wait(timeout=50)
    assert wait_until_gone(started), "the server runs on"


def test_the_help_has_every_command_and_the_exit_codes(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    page = capsys.readouterr().out
    names = [command.__name__.rpartition(".")[2] for command in cli._COMMANDS]
    assert {"demo", "probe", "best", "ui", "export", "verify", "sync"} <= set(names)
    for words in (*(f"\n    {name}" for name in names), "exit codes:", "register-python-argcomplete"):
        assert words in page
    for name in names:
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        assert "exit codes:" in capsys.readouterr().out


def test_everything_that_prints_a_table_prints_json(capsys):
    for name in ("demo", "probe", "candidates", "best", "ui", "verify", "sync"):
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        assert "--json" in capsys.readouterr().out, name


def test_reading_a_search_does_not_wait_for_a_framework(tmp_path):
    (tmp_path / "mlruns/searches/small").mkdir(parents=True)
    journal = [{"event": "search_started", "search_id": "0" * 32, "name": "small"}, {"event": "search_ended"}]
    lines = "".join(json.dumps(event | {"time": 0.0}) + "\n" for event in journal)
    (tmp_path / "mlruns/searches/small/search.jsonl").write_text(lines)
    script = """
import sys
from accumtune.cli import main
print(main(["candidates"]), sorted({"tensorflow", "keras", "mlflow"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("1 []\n"), done.stdout + done.stderr  # 1: there are no candidates


def test_exit_code_1_where_mlflow_did_not_take_what_a_search_has(monkeypatch, capsys):
    def refuse(options):
        raise TrackingError("Received no answer.", "a store", "mend it.")

    monkeypatch.setattr("accumtune.commands.sync.tracker_of", refuse)
    assert cli.main(["sync"]) == 1 and "Received no answer." in capsys.readouterr().err


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGPIPE, 141)])
def test_an_interrupted_command_says_so_by_its_exit_code_alone(number, code, monkeypatch, capfd):
    def interrupted(options):
        raise KeyboardInterrupt if number == signal.SIGINT else BrokenPipeError

    monkeypatch.setattr("accumtune.commands.searches.find_search", interrupted)
    monkeypatch.setattr("accumtune.commands.candidates.find_search", interrupted)
    monkeypatch.setattr(os, "dup2", lambda *descriptors: None)  # pytest's own output goes on
    assert cli.main(["candidates"]) == code
    assert capfd.readouterr().err == ""


# A user's own code, with all that it may do. It is not imported by the tests themselves.
RUDE = """
import atexit, os, subprocess
print("imported")
atexit.register(print, "ended")

def build_model(hp): ...

def load():
    print("loading")
    os.write(1, b"from C")
    subprocess.run(["echo", "from a child"])
    return [1], [2]
"""
ENDINGS = {
    "syntax": "def (",
    "indented": "  x = 1\n y = 2",
    "name": "no_such_name",
    "exit": "import sys; sys.exit(0)",
    "exit_1": "raise SystemExit(1)",
    "generator": "raise GeneratorExit",
    "missing": "import no_such_module_of_mine",
    "file": "open('no_such_file')",
    "assertion": "assert False",
}


@pytest.fixture
def folder(tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("users_"):
            del sys.modules[name]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("where", ["module", "load"])
def test_whatever_ends_the_users_code_is_no_answer(folder, ending, where, capfd):
    """Exit code 1 would mean that a configuration does not fit, and 0, as of the user's sys.exit(0), that it does."""
    name = f"users_{ending}_{where}"
    lines = [ENDINGS[ending], "def build_model(hp): ...", "def load(): return [1], [2]"]
    if where == "load":
        if ending in ("syntax", "indented"):
            pytest.skip("a function with it is a module with it")
        lines = ["def build_model(hp): ...", f"def load():\n    {ENDINGS[ending]}\n    return [1], [2]"]
    (folder / f"{name}.py").write_text("\n".join(lines))
    assert cli.main(["verify", "best_config.json", f"{name}:build_model", "--data", f"{name}:load"]) == 2
    out, err = capfd.readouterr()
    first, expected, fix = err.strip().splitlines()
    assert out == "" and name in first and expected.startswith("Expected") and fix.startswith("Fix")


def test_the_line_of_the_users_code_is_named(folder, capfd):
    (folder / "users_line.py").write_text("def load():\n    return 1 / 0\n")
    assert cli.main(["probe", "users_line:load", "--data", "users_line:load"]) == 2
    assert re.search(r"ZeroDivisionError: .*users_line.py, line 2", capfd.readouterr().err)


def test_the_standard_output_is_the_answer_alone(folder, monkeypatch, capfd):
    from accumtune.config import TrainingConfig
    from accumtune.config.verification import Verification

    def verify(self, build_model, x, y, peak_tolerance):
        print("while it was verified")
        return Verification(1, None, float("nan"), None, None, "CPU")

    monkeypatch.setattr(TrainingConfig, "verify", verify)
    (folder / "users_rude.py").write_text(RUDE)
    command = ["verify", "best_config.json", "users_rude:build_model", "--data", "users_rude:load", "--json"]
    assert cli.main(command) == 0
    out, err = capfd.readouterr()
    assert json.loads(out, parse_constant=pytest.fail)["throughput_samples_per_second"] is None
    for text in ("imported", "loading", "from C", "from a child", "while it was verified"):
        assert text in err
    assert cli.main(command[:-1]) == 0 and capfd.readouterr().out.startswith("peak memory 1 B")


def test_what_is_written_when_the_interpreter_ends_is_no_answer(tmp_path):
    script = (
        "import atexit, sys; from accumtune import cli; from accumtune.commands import candidates\n"
        "atexit.register(print, 'ended'); sys.argv[1:] = ['candidates']\n"
        "candidates.find_search = lambda path: print('answer') or sys.exit(0)\n"
        "sys.exit(cli.main())"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.stderr) == ("answer\n", "ended\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "best_config.json", "-o", "file/no_folder.json"],
        ["export", "best_config.json", "--format", "keras", "-o", "file/no_folder.txt"],
        ["export", "best_config.json", "--format", "keras", "-o", "."],
        ["probe", "os:getcwd", "--data", "os:getcwd", "--plot", "no_folder/probe.png"],
        ["probe", "os:getcwd", "--data", "os:getcwd", "--plot", "probe.xyz"],
        ["export", "no_such.json"], ["verify", "no_such.json", "a:b", "--data", "a:b"],
    ],
)  # fmt: skip
def test_files_that_cannot_be_read_or_written_are_wrong_input(folder, arguments, capfd):
    (folder / "file").touch()
    assert cli.main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("accumtune: ") and "Traceback" not in err


def test_an_error_of_ours_is_no_answer(monkeypatch, capfd):
    monkeypatch.setattr("accumtune.commands.candidates.find_search", lambda path: 1 / 0)
    assert cli.main(["candidates"]) == 70 and "ZeroDivisionError" in capfd.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["candidates", "--limit", "0"], ["candidates", "--limit", "-1"], ["best", "--tolerance", "nan"],
        ["best", "--tolerance", "-1"], ["demo", "--trials", "0"], ["demo", "--epochs", "0"], ["ui", "--port", "0"],
        ["verify", "c", "a:b", "--data", "a:b", "--peak-tolerance", "nan"],
        ["verify", "c", "a:b", "--data", "a:b", "--peak-tolerance", "inf"],
        ["verify", "c", "a:b", "--data", "a:b", "--objective-tolerance", "nan"],
        ["probe", "a:b", "--data", "a:b", "--micro-batch-sizes", "0"],
        ["probe", "a:b", "--data", "a:b", "--accumulation-steps", "-2"],
    ],
)  # fmt: skip
def test_numbers_that_mean_nothing_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2 and "invalid" in capsys.readouterr().err


def test_a_tolerance_that_is_no_number_accepts_nothing():
    from accumtune.config import TrainingConfig
    from accumtune.config.verification import compared
    from accumtune.errors import VerificationError

    values = {"micro_batch_size": 4, "accumulation_steps": 2, "effective_batch_size": 8}
    config = TrainingConfig(**values, hyperparameters={}, peak_memory_bytes=10)
    with pytest.raises(VerificationError):
        compared(config, {"peak_memory_bytes": 11, "device": "CPU"}, "tensorflow", float("nan"))


def test_functions_are_found_without_running_their_files(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text("raise SystemExit\ndef build_model(hp): ...\ndef load(): ...")
    (tmp_path / "broken.py").write_text("def (")
    monkeypatch.chdir(tmp_path)
    assert list(functions_here()) == ["train:build_model", "train:load"]
    assert list(functions_here("other")) == []


def test_the_demo_is_the_digits_search(monkeypatch):
    """tests/test_release.py runs it from the wheel."""
    started = []
    codes = {"--overwrite": 3, "--json": 1, "--trials": -9}
    monkeypatch.setattr(demo.subprocess, "call", lambda command, stdout: started.append(command) or codes[asked[0]])
    for asked, code in ((["--json"], 70), (["--trials", "2"], 137), (["--overwrite"], 3)):
        assert cli.main(["demo", *asked]) == code
    del started[:-1]
    (command,) = started
    assert os.path.basename(command[2]) == "digits.py" and "--overwrite" in command
