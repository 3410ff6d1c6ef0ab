"""Small models with the steps of those of Keras's examples (keras-io) that cannot be accumulated exactly."""

from dataclasses import dataclass
from typing import Any

import keras
from example_steps import Ddim, Nerf, network, numbers, pairs
from keras import ops
from own_steps import BACKEND, OwnStep


class Plain(OwnStep):
    def __init__(self):
        super().__init__(network(4, 3))


class ClippedByHand(Plain):
    """dreambooth, finetune_stable_diffusion: the norm of each gradient is clipped before the update."""

    def gradients(self, gradients):
        return [one * ops.minimum(1.0, 1e3 / (ops.norm(one) + 1e-12)) for one in gradients]


class Normalized(Plain):
    """debugging_tips, as it ends: gradients of norm 1."""

    def gradients(self, gradients):
        return [one / (ops.norm(one) + 1e-12) for one in gradients]


class Counts(Plain):
    """debugging_tips, as it prints: a counter that is not a variable."""

    steps = 0

    def objective(self, data):
        self.steps += 1
        return super().objective(data)


class DualEncoder(Plain):
    """nl_image_search: captions and pictures of a batch as each other's negatives."""

    def objective(self, data):
        one, other = (self.net(part, training=True) for part in data)
        logits = ops.matmul(one, ops.transpose(other)) / 0.5
        alike = ops.matmul(one, ops.transpose(one)) + ops.matmul(other, ops.transpose(other))
        return ops.mean(keras.losses.categorical_crossentropy(ops.softmax(alike), logits, from_logits=True))


class MetricLearning(Plain):
    """metric_learning: each anchor is compared with the positives of all samples."""

    def objective(self, data):
        anchors, positives = (ops.normalize(self.net(part, training=True), axis=-1) for part in data)
        similarities = ops.einsum("ae,pe->ap", anchors, positives) / 0.2
        numbers = ops.arange(ops.shape(anchors)[0])
        return ops.mean(keras.losses.sparse_categorical_crossentropy(numbers, similarities, from_logits=True))


class BarlowTwins(Plain):
    """barlow_twins: correlations over the batch."""

    def objective(self, data):
        one, other = (self.net(part, training=True) for part in data)
        one, other = ((part - ops.mean(part, axis=0)) / (ops.std(part, axis=0) + 1e-3) for part in (one, other))
        correlation = ops.matmul(ops.transpose(one), other) / ops.cast(ops.shape(one)[0], one.dtype)
        return ops.sum((correlation - ops.eye(3, dtype=one.dtype)) ** 2)


class Clustering(Plain):
    """semantic_image_clustering: the entropy of a batch's mean assignment."""

    def objective(self, data):
        x, y = data
        assigned = ops.softmax(self.net(x, training=True))
        mean = ops.mean(assigned, axis=0)
        return ops.mean(ops.square(assigned - ops.softmax(y))) + 5 * ops.sum(mean * ops.log(mean + 1e-6))


class AdaMatch(Plain):
    """adamatch: a threshold from the batch's mean confidence."""

    def objective(self, data):
        x, y = data
        logits = self.net(x, training=True)
        loss = keras.losses.categorical_crossentropy(ops.softmax(y), logits, from_logits=True)
        confidence = ops.max(ops.softmax(logits), axis=-1)
        mask = ops.cast(confidence > 0.9 * ops.mean(confidence), loss.dtype)
        return ops.mean(loss * ops.stop_gradient(mask))


class DepthEstimation(Plain):
    """depth_estimation: smoothness is weighted by means over the batch."""

    def objective(self, data):
        x, y = data
        made = self.net(x, training=True)
        slopes, true = made[:, 1:] - made[:, :-1], y[:, 1:] - y[:, :-1]
        return ops.mean(ops.abs(slopes * ops.exp(ops.mean(ops.abs(true))))) + ops.mean(ops.abs(made - y))


class Gan(OwnStep):
    """GANs, nnclr, semisupervised_simclr: an optimizer for each of two networks."""

    def __init__(self):
        super().__init__(network(4, 4))
        self.other = network(4, 1, seed=2)

    def compile(self, **kwargs):
        super().compile(**kwargs)
        self.optimizers = [keras.optimizers.Adam(), keras.optimizers.RMSprop()]

    def objective(self, data):
        return ops.mean(ops.square(self.other(self.net(data, training=True), training=True)))

    def update(self, *arguments):
        for optimizer in self.optimizers:
            if BACKEND == "jax":
                changed = optimizer.stateless_apply(list(arguments[0]), *arguments[1:])
            else:
                optimizer.apply(*arguments)
        return (changed[0], arguments[0]) if BACKEND == "jax" else None


class TwoUpdates(Plain):
    """image_captioning, forwardforward: an update for each of several parts of the data."""

    def update(self, *arguments):
        made = super().update(*arguments)
        return super().update(*(arguments if made is None else (made[1], arguments[1], made[0])))


class ConstantNerf(Nerf):
    """nerf, as it is written: the number of pictures in a batch is a constant."""

    def objective(self, data):
        rays, _ = data
        ops.reshape(rays, (12, 6, 3))
        return super().objective(data)


class ConstantDdim(Ddim):
    """ddim, as it is written: noise for a constant number of pictures."""

    def objective(self, data):
        noise = keras.random.normal((12, 4), dtype=data.dtype, seed=self.noises)
        return ops.mean(ops.square(noise - self(data + noise)))


@dataclass(frozen=True)
class Refused:
    """A model in the shape of some of Keras's examples, and what its refusal says."""

    names: tuple[str, ...]
    step: Any
    words: str
    data: Any = pairs


def views():
    return {"x": numbers(4), "y": numbers(4, seed=1)}


REFUSED = (
    Refused(("dreambooth", "finetune_stable_diffusion"), ClippedByHand, "not linear(.|\n)*clipnorm"),
    Refused(("debugging_tips, which normalizes gradients",), Normalized, "not linear"),
    Refused(("debugging_tips, which prints its steps",), Counts, "steps past Keras(.|\n)*add_weight"),
    Refused(("nl_image_search",), DualEncoder, "compares the samples", views),
    Refused(("metric_learning",), MetricLearning, "compares the samples", views),
    Refused(("barlow_twins",), BarlowTwins, "depends on the others", views),
    Refused(("semantic_image_clustering",), Clustering, "not linear"),
    Refused(("adamatch",), AdaMatch, "depends on the others"),
    Refused(("depth_estimation",), DepthEstimation, "not linear|depends on the others"),
    Refused(("GANs", "nnclr", "semisupervised_simclr"), Gan, "Adam, RMSprop", lambda: {"x": numbers(4)}),
    Refused(("image_captioning", "forwardforward"), TwoUpdates, "2 times"),
    Refused(("nerf, with a constant batch size",), ConstantNerf, "seven samples(.|\n)*number of samples from the data",
            lambda: {"x": numbers(6, 3), "y": numbers(is_positive=True)}),
    Refused(("ddim, with a constant batch size",), ConstantDdim, "seven samples(.|\n)*number of samples from the data",
            lambda: {"x": numbers(4)}),
)  # fmt: skip
