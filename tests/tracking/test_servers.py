"""Real MLflow servers on SQLite and on PostgreSQL, and servers that fail in every way."""

import glob
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import forked
import mlflow
import pytest

from accumtune.tracking.mlflow.tracker import Tracker

SECRET = "s3cret-of-the-database"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`mlflow server` on a free port of the loopback."""

    def __init__(self, folder, store):
        self.folder, self.store, self.port, self.process = folder, store, free_port(), None

    @property
    def address(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        command = [
            sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self.store, "--host", "127.0.0.1",
            "--port", str(self.port), "--workers", "1", "--artifacts-destination", str(self.folder / "artifacts"),
        ]  # fmt: skip
        with open(self.folder / "server.log", "a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 180
        while True:
            try:
                return urllib.request.urlopen(self.address + "/health", timeout=5)
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline, (
                    self.folder / "server.log"
                ).read_text()
                time.sleep(0.3)

    def stop(self):
        if self.process is not None:
            # The group: the server's own workers are its children.
            os.killpg(self.process.pid, 9)
            self.process.wait(timeout=30)


@pytest.fixture
def served(tmp_path, empty_store):
    folder = tmp_path / "server"
    folder.mkdir()
    shutil.copy(empty_store, folder / "mlflow.db")
    server = Server(folder, f"sqlite:///{folder / 'mlflow.db'}")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def postgres():
    """A PostgreSQL of its own, as the user postgres, on a free port; gives the URI of an empty database."""
    programs = sorted(glob.glob("/usr/lib/postgresql/*/bin"))
    if not programs:
        pytest.skip("no PostgreSQL here: apt-get install postgresql (.ci/run does)")
    if os.getuid() != 0:
        pytest.skip("starting PostgreSQL as the user postgres needs root")
    pytest.importorskip("psycopg", reason="pip install -e '.[test]' brings psycopg")
    # Not among pytest's folders: each new session of root's closes these to everyone else.
    folder = Path(tempfile.mkdtemp(prefix="accumtune-postgres-"))
    folder.chmod(0o755)
    data, port = folder / "data", free_port()
    shutil.chown(folder, "postgres")
    (folder / "password").write_text(SECRET)
    shutil.chown(folder / "password", "postgres")

    def run(name, *arguments):
        command = ["runuser", "-u", "postgres", "--", f"{programs[-1]}/{name}", *map(str, arguments)]
        environment = {**os.environ, "PGPASSWORD": SECRET}
        # Into a file: a pipe would be held open by the server that stays.
        with open(folder / "log", "a") as log:
            done = subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log)
        assert done.returncode == 0, (folder / "log").read_text()

    run("initdb", "-D", data, "-A", "scram-sha-256", f"--pwfile={folder / 'password'}", "--no-sync")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    run("pg_ctl", "-D", data, "-w", "-l", folder / "server.log", "-o", options, "start")
    try:
        run("createdb", "-h", "127.0.0.1", "-p", port, "mlflow")
        yield f"postgresql+psycopg://postgres:{SECRET}@127.0.0.1:{port}/mlflow"
    finally:
        run("pg_ctl", "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(folder)


def everything(uri):
    """What a store holds of the made search: statuses and curves by trial."""
    client = mlflow.MlflowClient(uri, uri)
    experiment = client.get_experiment_by_name("made")
    runs = client.search_runs([experiment.experiment_id])
    return {
        run.data.tags.get("accumtune.trial_id", "parent"): (
            run.info.status, len(run.data.params),
            # As text: a NaN is not even equal to itself.
            [(m.step, repr(m.value)) for m in client.get_metric_history(run.info.run_id, "val_loss")],
        )
        for run in runs
    }, len(runs)  # fmt: skip


def wait_until_synced(uri, trial_id):
    """Then nothing is under way; a request that a dying server leaves open is repeated by MLflow for minutes."""
    client = mlflow.MlflowClient(uri)
    deadline = time.monotonic() + 120
    while True:
        experiment = client.get_experiment_by_name("made")
        query = f"tags.`accumtune.trial_id` = '{trial_id}' and tags.`accumtune.synced` != ''"
        if experiment is not None and client.search_runs([experiment.experiment_id], query):
            return time.sleep(1.0)  # the saved view comes last
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.2)


@pytest.mark.slow
def test_a_server_is_stopped_started_and_wiped_and_everything_arrives_once(made, served, empty_store):
    made.start()
    made.complete("00", 0)
    tracker = Tracker(made.folder, served.address, interval_seconds=0.05, stop_seconds=150)
    tracker.start()
    wait_until_synced(served.address, "00")
    served.stop()
    made.complete("01", 1)  # nobody listens
    time.sleep(0.5)
    served.start()
    made.complete("02", 2)
    made.finish()
    assert tracker.stop() == ""
    Tracker(made.folder, served.address).sync()
    found, count = everything(served.address)
    assert count == 4 and set(found) == {"parent", "00", "01", "02"}
    assert all(status == "FINISHED" for status, *_ in found.values())
    assert [len(curve) for name, (_, _, curve) in sorted(found.items()) if name != "parent"] == [3, 3, 3]

    # Wiped: an empty database in the place of the server's own, while it runs.
    with sqlite3.connect(empty_store) as empty, sqlite3.connect(served.folder / "mlflow.db") as database:
        empty.backup(database)
    assert mlflow.MlflowClient(served.address).get_experiment_by_name("made") is None
    Tracker(made.folder, served.address).sync()
    again, count = everything(served.address)
    assert again == found and count == 4


@pytest.mark.slow
def test_postgres_behind_a_server_and_directly(finished, postgres, tmp_path):
    """And the password of its address is written down nowhere."""
    from accumtune.tracking.mlflow.tracker import read_cache

    Tracker(finished.folder, postgres).sync()
    Tracker(finished.folder, postgres).sync()
    direct, count = everything(postgres)
    assert count == 6 and direct["00"][0] == "FINISHED" and len(direct["00"][2]) == 3
    folder = tmp_path / "server"
    folder.mkdir()
    server = Server(folder, postgres)
    server.start()
    try:
        Tracker(finished.folder, server.address).sync()
        served, count = everything(server.address)
    finally:
        server.stop()
    assert served == direct and count == 6, "the same database: nothing is doubled"
    assert "127.0.0.1" in str(read_cache(finished.folder))
    tracker = Tracker(finished.folder, postgres)
    assert SECRET not in tracker.ui_command() + tracker.ui_address()
    client = mlflow.MlflowClient(postgres, postgres)
    experiment = client.get_experiment_by_name("made")
    for run in client.search_runs([experiment.experiment_id]):
        assert SECRET not in str(run.to_dictionary())
    for path in finished.folder.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


@pytest.fixture
def silent():
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://me:{SECRET}@127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def refusing():
    """A server that answers every request with an error, in which the address stands."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def serve():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(4096)
                    body = f"http://me:{SECRET}@127.0.0.1:{port} forbidden".encode()
                    head = b"HTTP/1.1 403 Forbidden\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
                    connection.sendall(head + body)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://me:{SECRET}@127.0.0.1:{port}"
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("kind", ["silent", "refusing", "dead"])
def test_a_server_that_does_not_serve_holds_nothing_up(kind, made, new_uri, request):
    uri = f"http://me:{SECRET}@127.0.0.1:{free_port()}" if kind == "dead" else request.getfixturevalue(kind)
    made.start()
    tracker = Tracker(made.folder, uri, interval_seconds=0.05, stop_seconds=1.0)
    tracker.start()
    made.complete("00", 0)  # each of these returns at once, or this test would hang
    made.finish()
    message = tracker.stop()
    assert "Nothing is lost" in message and "accumtune sync" in message and SECRET not in message
    for path in made.folder.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    if kind == "silent":
        return  # its thread is still waiting and holds the lock, as in a search that ends
    store = new_uri()
    Tracker(made.folder, store).sync()
    found, count = everything(store)
    assert count == 2 and found["00"][0] == "FINISHED" and len(found["00"][2]) == 3


@pytest.mark.slow
def test_two_searches_write_into_one_new_database_at_once(tmp_path):
    """Two processes that both have to make it."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from made_search import MadeSearch\n"
        "from accumtune.tracking.mlflow.tracker import Tracker\n"
        "made = MadeSearch(Path(sys.argv[2]), search_id=sys.argv[3] * 32).start()\n"
        "tracker = Tracker(made.folder, sys.argv[4], interval_seconds=0.01); tracker.start()\n"
        "for number in range(4): made.complete(f'{number:02}', number)\n"
        "made.finish(); message = tracker.stop(); assert message == '', message\n"
    )
    uri = f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
    here = os.path.dirname(__file__)
    processes = [
        forked.Popen([sys.executable, "-c", script, here, str(tmp_path / name), name, uri], stderr=subprocess.PIPE)
        for name in "ab"
    ]
    for process in processes:
        _, error = process.communicate(timeout=180)
        assert process.returncode == 0, error.decode()
    client = mlflow.MlflowClient(uri, uri)
    experiment = client.get_experiment_by_name("made")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 10 and {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        if "mlflow.parentRunId" in run.data.tags:
            assert len(client.get_metric_history(run.info.run_id, "val_loss")) == 3
