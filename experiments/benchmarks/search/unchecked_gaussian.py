"""scikit-learn's Gaussian process without the checks of each call: the same results, four times faster.

Keras Tuner's BayesianOptimization predicts one point at a time, thousands of times per proposal; that is most of the
time of the replayed searches of `search_cost.py`. A test compares the two bit by bit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
from scipy.linalg import solve_triangular
from scipy.spatial.distance import cdist
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Matern

_checked = GaussianProcessRegressor.predict


def predict(model: Any, points: Any, return_std: bool = False, return_cov: bool = False) -> Any:
    """`GaussianProcessRegressor.predict`; its own for all but what Keras Tuner asks."""
    kernel = getattr(model, "kernel_", None)
    if len(points) != 1 or not return_std or return_cov or not isinstance(kernel, Matern) or kernel.nu != 2.5:
        return _checked(model, points, return_std=return_std, return_cov=return_cov)
    scaled = cdist(points / kernel.length_scale, model.X_train_ / kernel.length_scale) * math.sqrt(5)
    covariance = (1.0 + scaled + scaled**2 / 3.0) * np.exp(-scaled)
    mean = model._y_train_std * (covariance @ model.alpha_) + model._y_train_mean
    explained = solve_triangular(model.L_, covariance.T, lower=True, check_finite=False)
    variance = np.maximum(np.ones(1) - np.einsum("ij,ji->i", explained.T, explained), 0.0)
    return mean, np.sqrt(variance * model._y_train_std**2)


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Within this, Keras Tuner's Gaussian process is asked without checks."""
    with patch.object(GaussianProcessRegressor, "predict", predict):
        yield
