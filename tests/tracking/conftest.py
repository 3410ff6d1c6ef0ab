"""Fixtures of made searches and of tracking stores."""

import shutil

import pytest
from made_search import MIB, MadeSearch


@pytest.fixture
def made(tmp_path):
    return MadeSearch(tmp_path / "searches" / "made")


@pytest.fixture
def finished(made):
    """One of everything."""
    made.start()
    made.complete("00", 0, objective=0.5)
    made.complete("01", 1, objective=0.4, micro=8, steps=4, rate=0.02, peak=20 * MIB)
    made.fail("02", 2)
    made.propose("03", 3)
    made.end("03", "reused", reused_from="00", objective=0.5)
    made.infeasible(0)
    made.finish()
    return made


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """An MLflow database without runs. Making one takes seconds, copying it does not."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def new_uri(tmp_path, empty_store):
    """Makes stores that nothing else uses."""
    numbers = iter(range(10**6))

    def make():
        folder = tmp_path / f"store_{next(numbers)}"
        folder.mkdir()
        shutil.copy(empty_store, folder / "mlflow.db")
        return f"sqlite:///{folder / 'mlflow.db'}"

    return make


@pytest.fixture
def uri(new_uri):
    return new_uri()
