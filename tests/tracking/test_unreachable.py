"""Stores that are down, silent or hang: no search waits for them, and nothing is lost."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from made_search import report
from stored_runs import Runs, sync, wait_until

from accumtune.errors import TrackingError
from accumtune.tracking.mlflow import server_health as reaching
from accumtune.tracking.mlflow import tracker as tracking
from accumtune.tracking.mlflow.tracker import Tracker, read_cache


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_a_dead_server_harms_nothing(finished, uri):
    address = f"http://me:secret@127.0.0.1:{free_port()}"
    tracker = Tracker(finished.folder, address, interval_seconds=0.05)
    tracker.start()
    message = tracker.stop()
    assert read_cache(finished.folder)["tracking_uri"] == address.replace("me:secret@", ""), "where to sync to, later"
    assert "accumtune sync" in message and "Nothing is lost" in message and "secret" not in message
    assert tracker.parent_run_id is None and tracker.ui_address() == ""
    with pytest.raises(TrackingError, match="does not answer") as error:
        tracker.sync()
    assert "secret" not in str(error.value)
    assert len(sync(finished, uri).by_id) == 6


@pytest.mark.slow
def test_a_server_that_answers_again_is_waited_for_though_a_request_was_silent(
    made, start_server, tmp_path, empty_store, monkeypatch
):
    """As after a restart: MLflow repeats a lost request only after minutes."""
    monkeypatch.setattr(tracking, "_SILENCE_SECONDS", 0.0)
    monkeypatch.setattr(reaching, "_CONNECT_SECONDS", 60.0)
    (tmp_path / "server.db").write_bytes(empty_store.read_bytes())
    port = free_port()
    process = start_server(port)
    made.start()
    made.complete("00", 0)
    tracker = Tracker(made.folder, f"http://127.0.0.1:{port}", interval_seconds=0.05, stop_seconds=300)
    os.killpg(process.pid, signal.SIGSTOP)
    tracker.start()
    made.finish()
    back = threading.Timer(2.0, os.killpg, (process.pid, signal.SIGCONT))
    back.start()
    assert tracker.stop() == ""
    back.join()
    assert set(Runs(tracker.tracking_uri).by_id) == {"parent", "00"}


def test_any_answer_is_one(monkeypatch):
    monkeypatch.setattr(reaching, "_CONNECT_SECONDS", 0.2)
    with silent_server() as address:
        assert not reaching.is_answering(address)
    monkeypatch.setattr(reaching, "_CONNECT_SECONDS", 60.0)
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # answers 501
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert reaching.is_answering(f"http://me:secret@127.0.0.1:{server.server_port}/")
        server.shutdown()
    assert not reaching.is_answering(f"http://127.0.0.1:{free_port()}")
    assert not reaching.is_answering("postgresql://127.0.0.1/mlflow"), "no server that could be asked"


@contextlib.contextmanager
def silent_server():
    """The address of one that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_silent_server_does_not_hold_up_the_end(finished):
    with silent_server() as address:
        tracker = Tracker(finished.folder, address, stop_seconds=0.2)
        tracker.start()
        assert "takes too long" in tracker.stop()


def test_a_server_that_was_silent_for_long_is_not_waited_for(finished, monkeypatch):
    """The limit for a server that answers is an hour, which this test would take otherwise."""
    monkeypatch.setattr(tracking, "_SILENCE_SECONDS", 0.0)
    with silent_server() as address:
        tracker = Tracker(finished.folder, address, stop_seconds=3600)
        tracker.start()
        assert "takes too long" in tracker.stop()


def test_who_is_heard_is_not_silent(monkeypatch):
    now = iter([0.0, 5.0, 7.0, 9.0, 11.0])
    monkeypatch.setattr(reaching.time, "monotonic", lambda: next(now))
    heartbeat = reaching.Heartbeat(is_local=False)  # 0 s
    assert heartbeat.silent_seconds() == 5.0

    class Client:
        number = 3

        def answer(self, value, *, fails=False):
            if fails:
                raise OSError
            return value

    client = reaching.MonitoredClient(Client(), heartbeat)
    with pytest.raises(OSError):
        client.answer(1, fails=True)
    assert client.answer(1) == 1 and client.number == 3  # 7 s
    assert heartbeat.silent_seconds() == 2.0
    assert reaching.Heartbeat(is_local=True).silent_seconds() == 0.0, "a file is slow at worst"


@pytest.mark.parametrize("scheme", ["http", "postgresql+psycopg", "mysql+pymysql"])
def test_a_dead_store_is_known_at_once_whatever_its_kind(scheme):
    """SQLAlchemy's retries would take minutes."""
    with pytest.raises(TrackingError, match="does not answer") as error:
        reaching.check_reachable(f"{scheme}://me:secret@127.0.0.1:{free_port()}/mlflow")
    assert "secret" not in str(error.value)


@pytest.fixture
def start_server(tmp_path):
    processes = []

    def start(port):
        command = [
            sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{tmp_path}/server.db",
            "--artifacts-destination", str(tmp_path / "served"), "--host", "127.0.0.1", "--port", str(port),
            "--workers", "1",
        ]  # fmt: skip
        log = open(tmp_path / "server.log", "ab")
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        log.close()
        processes.append(process)
        wait_until(lambda: _answers(port), 120)
        return process

    yield start
    for process in processes:
        stop_server(process)


def stop_server(process):
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(port):
    import urllib.request

    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except OSError:
        return False


@pytest.mark.slow
def test_a_server_that_hangs_and_comes_back(made, start_server, tmp_path, empty_store, capfd):
    (tmp_path / "server.db").write_bytes(empty_store.read_bytes())
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    process = start_server(port)
    made.start()
    made.complete("00", 0)
    tracker = Tracker(made.folder, uri, interval_seconds=0.05, stop_seconds=1.0)
    tracker.start()
    wait_until(lambda: "log.txt" in Runs(uri).artifacts("00") if Runs(uri).by_id.get("00") else False)
    os.killpg(process.pid, signal.SIGSTOP)  # it takes connections and never answers
    made.complete("01", 1)
    made.finish()
    report(made)
    assert "accumtune sync" in tracker.stop()
    assert capfd.readouterr() == ("", ""), "nothing of MLflow's talk between the lines of the search"
    os.killpg(process.pid, signal.SIGCONT)
    runs = sync(made, uri)
    assert set(runs.by_id) == {"parent", "00", "01"} and runs["parent"].info.status == "FINISHED"
    assert runs.artifacts("parent") == {"note.md", "candidates.csv", "pareto.png"}
    assert len(runs.history("01", "loss")) == 3
    assert Tracker(made.folder, uri).ui_command() == "" and str(port) in Tracker(made.folder, uri).ui_address()
