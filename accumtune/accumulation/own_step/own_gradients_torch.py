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
    """While open, each parameter is given to `left` when a backward pass has left something in its `.grad`."""
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
        """While open, what backward passes leave in the `.grad` of these is summed up; after it, they have none."""
        self._sums.clear()
        try:
            with seen(parameters, self._take):
                yield
        finally:
            self._sums.clear()
            for parameter in parameters:
                parameter.grad = None

    def begin(self) -> None:
        """Says that a micro-step begins."""
        self._taken.clear()

    def _take(self, parameter: Any) -> None:
        gradient, key = parameter.grad, id(parameter)
        with torch.no_grad():
            self._sums[key] = self._add(parameter, self._sums.get(key), gradient)
        known = self._in_place.get(key)
        if known is None or (known.shape, known.dtype) != (gradient.shape, gradient.dtype):
            # A step that does anything with it gets no number.
            nothing = torch.full((), torch.nan, dtype=gradient.dtype, device=gradient.device)
            known = self._in_place[key] = nothing.expand(gradient.shape)
        parameter.grad = known
        self._taken.add(key)

    def sum_of(self, parameter: Any, gradient: Any) -> Any:
        """The sum for a gradient that the step hands on; None where that is none of this micro-step."""
        key = id(parameter)
        return self._sums[key] if key in self._taken and gradient is self._in_place[key] else None
