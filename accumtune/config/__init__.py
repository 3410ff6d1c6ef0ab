"""The package that production imports: a search's best configuration as a small, frozen, versioned value."""

from accumtune.config.sources import load_config
from accumtune.config.training_config import TrainingConfig

__all__ = ["TrainingConfig", "load_config"]
