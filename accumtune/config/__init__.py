"""What production imports: the best configuration of a search as a small, frozen, versioned value."""

from accumtune.config.sources import load_config
from accumtune.config.value import TrainingConfig

__all__ = ["TrainingConfig", "load_config"]
