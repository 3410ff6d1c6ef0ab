"""Loads the weights of the best trial from the search's folder, or from MLflow's registry."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accumtune.config.sources import download, open_store, store_uris
from accumtune.errors import ConfigError
from accumtune.tracking.journal import SEARCH_JOURNAL, read_search_journal
from accumtune.tracking.mlflow.run_content import TRIAL_TAG
from accumtune.tracking.redaction import error_line
from accumtune.tracking.tracking_uri import absolute_uri, without_credentials
from accumtune.worker import trial_weights

if TYPE_CHECKING:
    from accumtune.config.training_config import TrainingConfig

_EXPECTED = "the weights of the configuration's trial"
_FIX = (
    'give the search\'s folder, config.load_weights(model, "<search folder>"), or a file *.weights.h5 or *.keras. A '
    "search with register_as= keeps its best model in MLflow's registry."
)


def load_weights(config: TrainingConfig, model: Any, source: Any, tracking_uri: str | None) -> Any:
    """See `TrainingConfig.load_weights`."""
    with _found(config, source, tracking_uri) as file:
        try:
            trial_weights.load_weights(model, file)
        except (ValueError, OSError, KeyError) as error:
            raise ConfigError(
                f"The weights in {str(file)!r} do not fit the model: {error_line(error)}",
                "a model of the same build function and hyperparameters, whose variables exist.",
                "use model = config.build(build_model); call a subclassed model on a batch first.",
            ) from error
    return model


@contextlib.contextmanager
def _found(config: TrainingConfig, source: Any, tracking_uri: str | None) -> Iterator[Path]:
    if source is not None:
        yield _in(Path(source), config)
        return
    recorded = config.trial.get("weights")
    if recorded and Path(recorded).is_file():
        yield _of_the_search(Path(recorded), config)
        return
    with tempfile.TemporaryDirectory(prefix="accumtune-") as folder:
        yield _registered(config, tracking_uri, folder)


def _in(place: Path, config: TrainingConfig) -> Path:
    """Returns the weights file at a place: the file itself, or the trial's in the search's folder."""
    if place.is_dir():
        place = place / f"trial_{config.source.get('trial_id')}" / "checkpoint.weights.h5"
    if not place.is_file():
        raise ConfigError(f"There are no weights in {str(place)!r}.", _EXPECTED, _FIX)
    return _of_the_search(place, config)


def _of_the_search(file: Path, config: TrainingConfig) -> Path:
    """Returns the file, unless its folder belongs to another search, whose trials may have the same names."""
    folder, search_id = file.parent.parent, config.source.get("search_id")
    if search_id and (folder / SEARCH_JOURNAL).exists():
        found = read_search_journal(folder).search_id
        if found != search_id:
            raise ConfigError(f"{str(file)!r} belongs to search {found}, not to {search_id}.", _EXPECTED, _FIX)
    return file


def _registered(config: TrainingConfig, tracking_uri: str | None, folder: str) -> Path:
    recorded = config.trial.get("weights")
    where = f"{recorded!r} is not on this machine" if recorded else "the configuration names no file"
    try:
        file = _downloaded(config, tracking_uri, folder)
    except Exception as error:  # MLflow raises what its store raises
        file, where = None, f"{where}; the registry says: {error_line(error)}"
    if file is None:
        raise ConfigError(
            f"The weights were not found: {where}, and no registered model is known{_elsewhere(config, tracking_uri)}.",
            _EXPECTED,
            _FIX,
        )
    return file


def _elsewhere(config: TrainingConfig, tracking_uri: str | None) -> str:
    """Returns a note on the tracking URI in the configuration, which is not contacted: anybody may have written it."""
    named = config.source.get("tracking_uri")
    if not named or tracking_uri is not None or named in map(_written, store_uris(None)):
        return ""
    return f" (its search was tracked in {named}, which was not asked; if you trust it, pass it as tracking_uri=)"


def _written(uri: str) -> str:
    """Returns a tracking URI in the form in which a configuration has it."""
    return without_credentials(absolute_uri(uri))


def _downloaded(config: TrainingConfig, tracking_uri: str | None, folder: str) -> Path | None:
    """Downloads the Keras file of the search's registered model, if that is the trial's; otherwise None."""
    run_id, trial_id = config.source.get("run_id"), config.source.get("trial_id")
    for uri in store_uris(tracking_uri) if run_id else ():
        client = open_store(uri)
        for version in client.search_model_versions(f"run_id = '{run_id}'"):
            if version.tags.get(TRIAL_TAG) == trial_id:
                path = str(version.source).rstrip("/").rpartition("/")[2]
                return download(client, str(run_id), f"{path}/data/model.keras", folder)
    return None
