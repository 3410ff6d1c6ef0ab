"""No address from a file or a store gets a token: a real server on the loopback records the requests."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from made_config import config_of

from accumtune import cli
from accumtune.config import TrainingConfig, load_config
from accumtune.errors import ConfigError, TrackingError
from accumtune.tracking.mlflow.server_health import refuse_other_server

TOKEN = "token-of-the-caller"


class Recorder(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        status, answer = self.server.answer(self.path)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", answer)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    do_POST = do_PUT = do_PATCH = do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(answer=lambda path: (404, {})):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
        server.asked, server.answer = [], answer
        server.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def caller(tmp_path, monkeypatch):
    """A user with a token, in an empty folder, whose own store does not answer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", TOKEN)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def hostile(address):
    source = {"run_id": "a" * 32, "trial_id": "07", "search_id": "s", "tracking_uri": address}
    return config_of(source=source, trial={"weights": f"{address}/w.weights.h5"})


def test_the_server_that_a_configuration_names_is_not_asked(serve, tmp_path):
    server = serve()
    hostile(server.address).save(tmp_path / "config.json")
    config = load_config(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="not found") as error:
        config.load_weights(None)
    assert server.asked == []
    assert server.address in str(error.value) and "tracking_uri=" in str(error.value), "the way out is told"


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_a_server_that_the_caller_names_is_asked(serve, monkeypatch, how):
    """The control: the recorder does see what MLflow sends."""
    server = serve()
    arguments = {"tracking_uri": server.address} if how == "argument" else {}
    if how == "environment":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    with pytest.raises(ConfigError):
        hostile(server.address).load_weights(None, **arguments)
    assert any(authorization == f"Bearer {TOKEN}" for _, authorization in server.asked)


@pytest.mark.parametrize("command", ["sync", "ui --print", "ui --json"])
def test_the_server_that_a_folder_names_is_not_asked(serve, tmp_path, command, capsys):
    server = serve()
    folder = tmp_path / "a search"
    folder.mkdir()
    (folder / "search.jsonl").write_text(json.dumps({"event": "search_started", "search_id": "s", "name": "x"}) + "\n")
    (folder / "tracking.json").write_text(json.dumps({"tracking_uri": server.address}))
    name, *options = command.split()
    assert cli.main([name, str(folder), *options]) == 2
    assert server.asked == [] and f"--tracking-uri {server.address}" in capsys.readouterr().err
    assert cli.main([name, str(folder), *options, "--tracking-uri", server.address]) == 1
    assert server.asked != [], "whom the caller names is asked"


def store_with_artifacts_at(address):
    info = {
        "run_id": "r", "experiment_id": "1", "status": "FINISHED", "lifecycle_stage": "active",
        "artifact_uri": f"{address}/api/2.0/mlflow-artifacts/artifacts/1",
    }  # fmt: skip
    run = {"info": info, "data": {"tags": []}}
    experiment = {"experiment_id": "1", "name": "digits", "artifact_location": address, "lifecycle_stage": "active"}
    version = {"name": "net", "version": "1", "run_id": "r", "source": f"{address}/model",
               "tags": [{"key": "accumtune.trial_id", "value": "07"}]}  # fmt: skip

    def answer(path):
        if "model-versions/search" in path:
            return 200, {"model_versions": [version]}
        if "alias" in path or "model-versions/get" in path:
            return 200, {"model_version": version}
        if "experiments/get-by-name" in path:
            return 200, {"experiment": experiment}
        return 200, {"runs": [run]} if "runs/search" in path else {"run": run}

    return answer


@pytest.mark.parametrize("scheme", ["http", "mlflow-artifacts"])
@pytest.mark.parametrize("source", ["runs:/r", "models:/net@best", "digits", "weights"])
def test_artifacts_on_a_server_that_the_store_names_are_not_fetched(serve, scheme, source):
    """The author of an experiment chooses the address of its artifacts."""
    other = serve()
    own = serve(store_with_artifacts_at(other.address.replace("http", scheme, 1)))
    with pytest.raises(ConfigError, match="keeps its artifacts at"):
        if source == "weights":
            hostile(own.address).load_weights(None, tracking_uri=own.address)
        else:
            load_config(source, tracking_uri=own.address)
    assert own.asked != [] and other.asked == []


def test_a_redirect_takes_no_token_along(serve):
    """MLflow follows it; requests leaves the token behind where host or port are others."""
    other = serve()
    own = serve(lambda path: (302, other.address + path))
    with pytest.raises(ConfigError):
        load_config("runs:/r", tracking_uri=own.address)
    assert [authorization for _, authorization in own.asked] == [f"Bearer {TOKEN}"] * len(own.asked) != []
    assert [authorization for _, authorization in other.asked] == [None] * len(other.asked)


def test_a_host_that_the_caller_allows_is_asked(serve, monkeypatch):
    other = serve()
    own = serve(store_with_artifacts_at(other.address))
    monkeypatch.setenv("ACCUMTUNE_ARTIFACT_HOSTS", "127.0.0.1")
    with pytest.raises(ConfigError, match="cannot be downloaded"):
        load_config("runs:/r", tracking_uri=own.address)
    assert other.asked != []


@pytest.mark.parametrize(
    ("artifacts", "is_ours"),
    [
        ("mlflow-artifacts:/1/r", True), ("mlflow-artifacts://host:5000/1", True), ("http://host:5000/api", True),
        ("file:///data/1", True), ("/data/1", True), ("s3://bucket/1", True), ("gs://bucket/1", True),
        ("dbfs:/x", True), ("mlflow-artifacts://other:5000/1", False), ("http://host:5001/x", False),
        ("https://host/x", False), ("sftp://me:pw@host2/x", False), ("ftp://other/x", False),
        ("HTTP://other/x", False), ("http://host:5000@other/x", False), ("http://host:bad/x", False),
    ],
)  # fmt: skip
def test_whose_artifacts_are_fetched(artifacts, is_ours):
    if is_ours:
        return refuse_other_server("http://me:pw@host:5000", artifacts)
    for store in ("http://me:pw@host:5000", "sqlite:///mlflow.db"):
        with pytest.raises(TrackingError) as error:
            refuse_other_server(store, artifacts)
        assert "pw" not in str(error.value) and "ACCUMTUNE_ARTIFACT_HOSTS" in str(error.value)


def test_reading_a_hostile_configuration_asks_nobody(serve):
    server = serve()
    config = TrainingConfig.from_json(hostile(server.address).to_json())
    repr(config), config.keras_arguments(), config.for_replicas(2), config.fit_arguments()
    assert server.asked == []
