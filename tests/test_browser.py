"""MLflow's page at the printed address, in a headless Chromium."""

import html
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import mlflow
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium (.ci/run does)")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(digits):
    """`mlflow ui` on the store of the digits search; gives its address."""
    folder, _ = digits
    port = free_port()
    command = ["-m", "mlflow", "ui", "--backend-store-uri", "sqlite:///mlruns/mlflow.db", "--host", "127.0.0.1"]
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, *command, "--port", str(port), "--workers", "1"],
            cwd=folder, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address + "/health")
        yield address
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:  # of a machine that is busy
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(address):
    deadline = time.monotonic() + 180
    while True:
        try:
            return urllib.request.urlopen(address, timeout=5)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def look(address, tmp_path, *words, tries=3):
    """Returns the text of a page after its scripts have run; waits until it has the expected words."""
    for _ in range(tries):
        page = dump(address, tmp_path)
        if all(word in page for word in words):
            break
    return page


def dump(address, tmp_path):
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'chromium'}", "--window-size=1700,2400",
            "--virtual-time-budget=30000", "--dump-dom", address,
        ],
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    without_scripts = re.sub(r"<(script|style).*?</\1>", "", done.stdout, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", without_scripts)))


def screenshot(address, tmp_path, file, size="1700,1100"):
    subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
            f"--user-data-dir={tmp_path / 'chromium'}", f"--window-size={size}", "--virtual-time-budget=30000",
            f"--screenshot={file}", address,
        ],
        capture_output=True, timeout=180, check=True,
    )  # fmt: skip


def parent_of(folder):
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name("digits")
    (parent,) = client.search_runs([experiment.experiment_id], "tags.`mlflow.runName` = 'digits'")
    return experiment.experiment_id, parent.info.run_id


def printed_address(digits, server):
    _, output = digits
    address = re.search(r"then open (\S+)", output)[1]
    return re.sub(r"http://127\.0\.0\.1:\d+", server, address)


def test_the_printed_address_shows_the_trials_with_their_columns(digits, server, tmp_path):
    columns = (
        "micro_batch_size", "accumulation_steps", "effective_batch_size", "peak_memory_mib",
        "throughput_samples_per_second", "best_val_loss",
    )  # fmt: skip
    words = (*columns, "trial 0:", "trial 1:", "trial 2:")
    page = look(printed_address(digits, server), tmp_path, *words)
    assert [word for word in words if word not in page] == []


@pytest.mark.slow
def test_charts_are_set_up(digits, server, tmp_path):
    words = ("What quality costs", "peak_memory_mib vs. best_val_loss", "Parallel Coordinates", "val_loss")
    page = look(printed_address(digits, server) + "&compareRunsMode=CHART", tmp_path, *words)
    assert [word for word in words if word not in page] == []


def test_the_page_of_the_search_begins_with_the_answer(digits, server, tmp_path):
    experiment, parent = parent_of(digits[0])
    page = look(f"{server}/#/experiments/{experiment}/runs/{parent}", tmp_path, "Train with micro-batch", "Runners-up")
    assert page.index("Train with micro-batch") < page.index("Runners-up")
    for words in ("accumtune.load_config", "Why:", "Memory budget:", "Proposals:", "3 trained"):
        assert words in page, words


def test_the_pictures_are_on_the_page_of_the_search(digits, server, tmp_path):
    experiment, parent = parent_of(digits[0])
    address = f"{server}/#/experiments/{experiment}/runs/{parent}/artifacts"
    pictures = ("pareto.html", "pareto.png", "memory.png", "throughput.png", "effective_batch.png")
    page = look(address, tmp_path, *pictures, "best_config.json", "candidates.csv")
    assert [name for name in pictures if name not in page] == []
    for name in pictures:
        with urllib.request.urlopen(f"{server}/get-artifact?path={name}&run_uuid={parent}", timeout=30) as answer:
            assert len(answer.read()) > 10_000, name


def test_the_interactive_picture_draws_without_a_network(digits, tmp_path):
    """As the file that it is: nothing but the file is there to load."""
    page = digits[0] / "mlruns" / "searches" / "digits" / "report" / "pareto.html"
    shown = dump(f"file://{page}", tmp_path)
    for words in ("peak memory (MiB)", "samples per second", "budget 8.0 MiB", "best val_loss (lower is better)"):
        assert words in shown, words
    assert "effective batch" in shown and shown.count(" × ") >= 3
