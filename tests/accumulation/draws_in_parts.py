"""Has a plain training draw the random numbers of an accumulating one: those of its micro-batches in a row."""

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
    """While open, a draw for a batch is made of those that its micro-batches would make.

    Every micro-step moves a generator of Keras's on, so a micro-batch's draw has another seed than the next one's.

    Args:
        parts: the samples of a batch -> those of its micro-batches.
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
