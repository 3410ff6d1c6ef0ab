"""The released wheel and sdist run without the repository, and have one version and a licence."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import accumtune

pytest.importorskip("build", reason="pip install -e '.[test]' brings build and hatchling")
pytest.importorskip("hatchling", reason="pip install -e '.[test]' brings build and hatchling")

ROOT = Path(__file__).parent.parent


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=500, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The folder with the sdist and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


@pytest.fixture(scope="module")
def elsewhere(released, tmp_path_factory):
    """An empty folder, and the environment of a process that imports accumtune from the wheel only."""
    site = tmp_path_factory.mktemp("site")
    (wheel,) = released.glob("*.whl")
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel)
    return tmp_path_factory.mktemp("empty"), {**os.environ, "PYTHONPATH": str(site)}


def test_the_version_is_the_package_s(released):
    names = sorted(path.name for path in released.iterdir())
    version = accumtune.__version__
    assert names == [f"accumtune-{version}-py3-none-any.whl", f"accumtune-{version}.tar.gz"]


def test_the_wheel_has_what_runs_and_the_licence(released):
    (wheel,) = released.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (licence,) = [name for name in names if "dist-info/licenses" in name]
        assert "Apache License" in archive.read(licence).decode()
    for name in ("py.typed", "demo.py", "config/training_config.schema.json", "tracking/report/pareto.html"):
        assert f"accumtune/{name}" in names
    outside = [name for name in names if not name.startswith(("accumtune/", "accumtune-"))]
    assert not outside and not [name for name in names if name.startswith("accumtune/docs/")]


def test_the_sdist_has_the_tests_and_the_documentation(released):
    (sdist,) = released.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "pyproject.toml", "tests/test_release.py", "accumtune/docs/mkdocs.yml"} <= names
    assert not [name for name in names if name.startswith("mlruns/") and name != "mlruns/README.md"]


@pytest.mark.slow
def test_the_demo_runs_without_the_repository(elsewhere):
    folder, environment = elsewhere
    where = run(sys.executable, "-c", "import accumtune; print(accumtune.__file__)", cwd=folder, env=environment)
    assert where.startswith(environment["PYTHONPATH"])

    def accumtune_command(*arguments):
        command = "import sys; from accumtune.cli import main; sys.exit(main())"
        return run(sys.executable, "-c", command, *arguments, cwd=folder, env=environment)

    output = accumtune_command("demo", "--trials", "1", "--epochs", "1")
    assert "[1/1]   → val_loss" in output and "Why:" in output and "then open http" in output
    # The same search again, which trains nothing anew.
    told = json.loads(accumtune_command("demo", "--trials", "1", "--epochs", "1", "--json"))
    assert told == json.loads(accumtune_command("best", "--json")) and told["micro_batch_size"] >= 1
    found = json.loads(accumtune_command("candidates", "--json"))
    assert sum(candidate["is_trained"] for candidate in found) == 1
    assert any(candidate["is_on_pareto_front"] for candidate in found)
