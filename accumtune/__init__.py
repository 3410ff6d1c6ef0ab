"""Micro-batch size and gradient accumulation steps as tunable hyperparameters under a memory budget."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The module of each public name, imported at its first use: `import accumtune` alone loads no framework.
_MODULES = {
    "accumulate": "accumtune.accumulation",
    "batch_coupled_layers": "accumtune.accumulation",
    "GradientNoiseScale": "accumtune.accumulation.callbacks",
    "profile": "accumtune.execution.standalone_profile",
    "RandomSearch": "accumtune.tuners",
    "BayesianOptimization": "accumtune.tuners",
    "Hyperband": "accumtune.tuners",
    "GridSearch": "accumtune.tuners",
    "OptunaSearch": "accumtune.tuners",
    "Tuner": "accumtune.search.tuner",
    "AccumulationHyperModel": "accumtune.hypermodel",
    "Candidate": "accumtune.search.results.selection",
    "TrainingConfig": "accumtune.config",
    "load_config": "accumtune.config",
    "errors": "accumtune.errors",
}

__all__ = [
    "AccumulationHyperModel",
    "BayesianOptimization",
    "Candidate",
    "GradientNoiseScale",
    "GridSearch",
    "Hyperband",
    "OptunaSearch",
    "RandomSearch",
    "TrainingConfig",
    "Tuner",
    "accumulate",
    "batch_coupled_layers",
    "errors",
    "load_config",
    "profile",
]

if TYPE_CHECKING:
    from accumtune import errors as errors
    from accumtune.accumulation import accumulate as accumulate
    from accumtune.accumulation import batch_coupled_layers as batch_coupled_layers
    from accumtune.accumulation.callbacks import GradientNoiseScale as GradientNoiseScale
    from accumtune.config import TrainingConfig as TrainingConfig
    from accumtune.config import load_config as load_config
    from accumtune.execution.standalone_profile import profile as profile
    from accumtune.hypermodel import AccumulationHyperModel as AccumulationHyperModel
    from accumtune.search.results.selection import Candidate as Candidate
    from accumtune.search.tuner import Tuner as Tuner
    from accumtune.tuners import BayesianOptimization as BayesianOptimization
    from accumtune.tuners import GridSearch as GridSearch
    from accumtune.tuners import Hyperband as Hyperband
    from accumtune.tuners import OptunaSearch as OptunaSearch
    from accumtune.tuners import RandomSearch as RandomSearch


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'accumtune' has no attribute {name!r}")
    module = importlib.import_module(_MODULES[name])
    value = module if name == "errors" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
