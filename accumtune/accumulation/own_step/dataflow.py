"""Checks the operations of a training step: are its gradients linear in the samples?

Numbers alone cannot tell: a clipping that does not clip today, or a mean over tokens of samples that have equally many,
is exact on one batch and not on the next. So every operation that leads to the gradients is checked. Once samples have
been added up, only linear operations may follow, and no sum may flow back into the samples. Comparing numbers finds
smooth nonlinear functions too; only this check finds those that are piecewise linear.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """One operation of a step: the keys and shapes of its inputs and outputs, and which inputs depend on samples.

    Args:
        precision: the dtype of its first output, such as "float32".
    """

    name: str
    inputs: tuple[Any, ...]
    input_shapes: tuple[Shape, ...]
    depends: tuple[bool, ...]
    outputs: tuple[Any, ...]
    output_shapes: tuple[Shape, ...]
    precision: str


@dataclass(frozen=True)
class Rules:
    """The names of a backend's operations, by what they do to sums over samples.

    Args:
        linear: linear in all inputs together.
        products: linear in each input alone.
        linear_in: linear in one input alone, given by its position; a derivative is, in its incoming gradient.
        choices: linear in all inputs but the first.
        reductions: add up samples (derivatives do too, whatever their name).
        only_shapes: the results depend on the inputs' shapes, not on their values.
        decisions: return a number to Python, whose code may depend on it.
    """

    linear: frozenset[str]
    products: frozenset[str]
    linear_in: Mapping[str, int]
    choices: frozenset[str]
    reductions: frozenset[str]
    only_shapes: frozenset[str]
    decisions: frozenset[str] = frozenset()


def positions(*names: str) -> dict[str, int]:
    """Returns the position of the linear input for each name; `names[i]` lists those that are linear in input i."""
    return {name: index for index, together in enumerate(names) for name in together.split()}


@dataclass
class Recording:
    """The operations of one run, in their order."""

    rules: Rules
    operations: list[Operation] = field(default_factory=list)
    _dependent: set[Any] = field(default_factory=set)

    def mark(self, keys: Sequence[Any]) -> None:
        """Marks values that depend on samples: data, and random numbers drawn for each sample."""
        self._dependent.update(keys)

    def add(
        self,
        name: str,
        inputs: Sequence[tuple[Any, Shape]],
        outputs: Sequence[tuple[Any, Shape]],
        into: Sequence[Any] = (),
        precision: str = "",
    ) -> None:
        """Records an operation.

        Args:
            into: the keys of the tensors that it writes to.
            precision: the dtype of its first output.
        """
        depends = tuple(key in self._dependent for key, _ in inputs)
        if any(depends) and name not in self.rules.only_shapes:
            self._dependent.update(key for key, _ in outputs)
            self._dependent.update(into)
        self.operations.append(
            Operation(
                name,
                tuple(key for key, _ in inputs),
                tuple(shape for _, shape in inputs),
                depends,
                tuple(key for key, _ in outputs),
                tuple(shape for _, shape in outputs),
                precision,
            )
        )

    def leading_to(self, keys: Sequence[Any]) -> list[Operation]:
        """Returns the operations that compute these results."""
        wanted, found = set(keys), list[Operation]()
        for operation in reversed(self.operations):
            if wanted.intersection(operation.outputs):
                wanted.update(operation.inputs)
                found.append(operation)
        return found[::-1]

    def is_rounded(self, keys: Sequence[Any]) -> bool:
        """Whether something on the way from the samples to these results is computed in float32."""
        return any(one.precision == "float32" and any(one.depends) for one in self.leading_to(keys))


Traced = tuple[Recording, Sequence[Any]]


def why_not_linear(rules: Rules, whole: Traced, other: Traced, sizes: tuple[int, int]) -> str:
    """Returns why the results of a step are not linear in the samples; "" if they are.

    Args:
        whole, other: the step on different numbers of samples, with the keys of its results.
        sizes: these numbers.
    """
    for one in whole[0].operations:
        if one.name in rules.decisions and any(one.depends):
            return f"it brings a number to Python ({one.name}), by which it may decide."
    made = {key for one in whole[0].operations for key in one.outputs}
    if not made.issuperset(whole[1]):
        return "the way from the samples to its gradients could not be followed."
    ones, twos = (recording.leading_to(keys) for recording, keys in (whole, other))
    if [one.name for one in ones] != [two.name for two in twos]:
        return "it computes in another way for another number of samples, or for other samples."
    reasons = (_why_not(rules, one, two, sizes) for one, two in zip(ones, twos, strict=True))
    return next((reason for reason in reasons if reason), "")


def _why_not(rules: Rules, one: Operation, two: Operation, sizes: tuple[int, int]) -> str:
    if not any(one.depends) or one.name in rules.only_shapes:
        return ""
    in_samples = [a != b for a, b in zip(one.input_shapes, two.input_shapes, strict=True)]
    out_samples = [a != b for a, b in zip(one.output_shapes, two.output_shapes, strict=True)]
    for shape, small in zip(one.output_shapes, two.output_shapes, strict=True):
        if math.prod(shape) * sizes[1] != math.prod(small) * sizes[0] and shape != small:
            return f"it compares the samples of a batch with each other ({one.name} gives {shape} for {sizes[0]})."
    reduced = [depends and not samples for depends, samples in zip(one.depends, in_samples, strict=True)]
    if any(reduced) and any(out_samples):
        return f"what it computes for a sample depends on the others in the batch ({one.name})."
    if any(reduced):
        return "" if _is_linear(rules, one.name, reduced) else _not_linear(one.name)
    is_sum = one.name in rules.reductions or any(part in one.name.lower() for part in _DERIVATIVES)
    if any(depends and samples for depends, samples in zip(one.depends, in_samples, strict=True)):
        if one.output_shapes and not any(out_samples) and not is_sum:
            return f"it reduces the samples of a batch by {one.name}, which is neither a mean nor a sum."
    return ""


_DERIVATIVES = ("grad", "backprop", "backward")  # in the names of operations


def _not_linear(name: str) -> str:
    return f"between a sum over samples and the optimizer it computes {name}, which is not linear."


def _is_linear(rules: Rules, name: str, reduced: list[bool]) -> bool:
    if name in rules.linear:
        return True
    if name in rules.products:
        return sum(reduced) == 1
    if name in rules.linear_in:
        return not any(is_reduced for index, is_reduced in enumerate(reduced) if index != rules.linear_in[name])
    return name in rules.choices and not reduced[0]
