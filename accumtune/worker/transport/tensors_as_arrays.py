"""Replaces tensors among a user's data by arrays, so that data at rest do not count towards a trial's memory budget."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np


def as_arrays(tree: Any) -> Any:
    """Replaces each tensor of TensorFlow, JAX or torch in a tree by an array, without importing a framework."""
    if isinstance(tree, Mapping):
        changed = {key: as_arrays(value) for key, value in tree.items()}
        return tree if all(changed[key] is tree[key] for key in changed) else changed
    if isinstance(tree, (tuple, list)):
        items = [as_arrays(value) for value in tree]
        if all(item is value for item, value in zip(items, tree, strict=True)):
            return tree
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return _as_array(tree)


def _as_array(value: Any) -> Any:
    tf, jax, torch = (sys.modules.get(name) for name in ("tensorflow", "jax", "torch"))
    if torch is not None and isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        # NumPy has bfloat16 only through an extension of JAX's.
        return value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
    if tf is not None and isinstance(value, (tf.Tensor, tf.Variable)) and hasattr(value, "numpy"):
        return np.asarray(value.numpy())
    if jax is not None and isinstance(value, jax.Array):
        return np.asarray(value)
    return value
