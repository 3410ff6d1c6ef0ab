"""Makes plain training draw the random numbers of accumulated training: one draw after the other for micro-batches."""

import collections
import contextlib
import itertools
from unittest import mock

import numpy as np
from keras import ops
from keras.src import backend
from keras.src.random.seed_generator import SeedGenerator

SHAPED = ("normal", "uniform", "randint", "truncated_normal")


class _Known(SeedGenerator):
    """Gives one seed."""

    def __init__(self, seed):
        self.seed, self._initial_seed = seed, 1

    def next(self, ordered=True):
        return self.seed


@contextlib.contextmanager
def draws_in_parts(parts, draws=1):
    """Replaces a draw for a batch by the draws of its micro-batches, inside the `with` block.

    Every micro-step advances Keras's seed generators, so each micro-batch draws with another seed.

    Args:
        parts: returns the numbers of samples of a batch's micro-batches, from that of the batch.
        draws: how often a step draws from one generator.
    """
    calls = collections.defaultdict(itertools.count)

    def counted(number, dtype):
        return ops.convert_to_tensor(np.array([0, number]), dtype)

    def in_parts(own, is_shaped):
        def draw(*args, seed=None, **kwargs):
            if not args:
                return own(seed=seed, **kwargs)
            first, *args = args
            size = first[0] if is_shaped else first.shape[0]
            if not isinstance(seed, SeedGenerator) or size not in parts:
                return own(first, *args, seed=seed, **kwargs)
            index = next(calls[id(seed)]) % draws
            states = [seed.next() for _ in parts[size]]
            begin = states[0] - counted(index * len(states), states[0].dtype)
            drawn, start = [], 0
            for number, samples in enumerate(parts[size]):
                piece = (samples, *first[1:]) if is_shaped else first[start : start + samples]
                known = _Known(begin + counted(number * draws + index, begin.dtype))
                drawn.append(own(piece, *args, seed=known, **kwargs))
                start += samples
            return ops.concatenate(drawn)

        return draw

    with contextlib.ExitStack() as stack:
        for name in (*SHAPED, "dropout"):
            own = getattr(backend.random, name)
            stack.enter_context(mock.patch.object(backend.random, name, in_parts(own, name in SHAPED)))
        yield
