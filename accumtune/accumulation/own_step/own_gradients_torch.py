"""Gradients of a model's own step on torch, summed up as a backward pass leaves them in `.grad`.

The step sees tensors in their place that take no memory, and hands these on: so there is one sum, and at any time one
gradient beside it, as where `.grad` itself adds up. Only for a step that does nothing else with them (see
`Certificate.hands_on_grad`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def seen(parameters: list[Any], left: Callable[[Any], None]) -> Iterator[None]:
    """Calls `left` with each parameter whose `.grad` a backward pass has written, within this context."""
    with contextlib.ExitStack() as stack:
        for parameter in parameters:
            stack.callback(parameter.register_post_accumulate_grad_hook(left).remove)
        yield


class SummedGradients:
    """The sums of a window's gradients, by parameter.

    Args:
        add: `(parameter, sum so far or None, gradient) -> sum`.
    """

    def __init__(self, add: Callable[[Any, Any, Any], Any]) -> None:
        self._add = add
        self._sums: dict[int, Any] = {}
        self._in_place: dict[int, Any] = {}
        self._taken: set[int] = set()

    @contextlib.contextmanager
    def taken(self, parameters: list[Any]) -> Iterator[None]:
        """Sums up what backward passes write to `.grad` within this context; clears `.grad` at its end."""
        self._sums.clear()
        try:
            with seen(parameters, self._take):
                yield
        finally:
            self._sums.clear()
            for parameter in parameters:
                parameter.grad = None

    def begin(self) -> None:
        """Begins a micro-step."""
        self._taken.clear()

    def _take(self, parameter: Any) -> None:
        gradient, key = parameter.grad, id(parameter)
        with torch.no_grad():
            self._sums[key] = self._add(parameter, self._sums.get(key), gradient)
        known = self._in_place.get(key)
        if known is None or (known.shape, known.dtype) != (gradient.shape, gradient.dtype):
            # A step that computes with it gets NaN.
            nothing = torch.full((), torch.nan, dtype=gradient.dtype, device=gradient.device)
            known = self._in_place[key] = nothing.expand(gradient.shape)
        parameter.grad = known
        self._taken.add(key)

    def sum_of(self, parameter: Any, gradient: Any) -> Any:
        """Returns the sum for a gradient that the step passes on; None if it is not one of this micro-step."""
        key = id(parameter)
        return self._sums[key] if key in self._taken and gradient is self._in_place[key] else None
