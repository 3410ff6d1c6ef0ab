"""Small models with the steps of those of Keras's examples (keras-io) that override `train_step`.

The step is that of the example; the layers are small, with dropout where that makes sense.
"""

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import layers, ops
from own_steps import BACKEND, OwnStep

SAMPLES = 24


def numbers(*shape, seed=0, is_positive=False):
    generator = np.random.default_rng(seed)
    values = generator.uniform(0.1, 0.9, (SAMPLES, *shape)) if is_positive else generator.normal(size=(SAMPLES, *shape))
    return values.astype(keras.config.floatx())


def integers(below, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, below, (SAMPLES, *shape))


def network(inputs, outputs, *more, seed=1, rate=0.3):
    """Dense layers with dropout, and others in between."""
    shape = inputs if isinstance(inputs, tuple) else (inputs,)
    dropout = [layers.Dropout(rate, seed=seed)] if rate else []
    return keras.Sequential(
        [keras.Input(shape), layers.Dense(5, activation="tanh"), *more, *dropout, layers.Dense(outputs)]
    )


def copy_of(net):
    made = keras.models.clone_model(net)
    made.set_weights(net.get_weights())
    made.trainable = False
    return made


def input_gradient(function, x):
    """The gradient of the sum of `function(x)`, which can be differentiated again."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            value = function(x)
        return tape.gradient(value, x)
    if BACKEND == "torch":
        import torch

        x = x if x.requires_grad else x.requires_grad_()
        return torch.autograd.grad(function(x).sum(), x, create_graph=True)[0]
    import jax

    return jax.grad(lambda x: ops.sum(function(x)))(x)


class Tracked(OwnStep):
    """Its logs are means of what `objective` gives, under `names`."""

    names = ("loss",)

    def __init__(self, net=None, **kwargs):
        super().__init__(net, **kwargs)
        self.trackers = [keras.metrics.Mean(name=name) for name in self.names]

    @property
    def metrics(self):
        return self.trackers

    def track(self, *losses):
        for tracker, loss in zip(self.trackers, losses, strict=True):
            tracker.update_state(loss)
        return {tracker.name: tracker.result() for tracker in self.trackers}


class Sampling(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(5)

    def call(self, inputs):
        mean, log_variance = inputs
        drawn = keras.random.normal(ops.shape(mean), dtype=mean.dtype, seed=self.seed_generator)
        return mean + ops.exp(0.5 * log_variance) * drawn


# One optimizer, one update, a mean over samples


class Vae(Tracked):
    """vae: random draws from the encoder's distribution, two losses, three means as logs."""

    names = ("loss", "reconstruction_loss", "kl_loss")

    def __init__(self):
        super().__init__()
        self.encoder, self.sampling, self.decoder = network(4, 4), Sampling(), network(2, 4, seed=2)

    def call(self, x, training=False):
        return self.decoder(self.encoder(x, training=training)[:, :2], training=training)

    def objective(self, data):
        encoded = self.encoder(data, training=True)
        mean, log_variance = encoded[:, :2], encoded[:, 2:]
        decoded = ops.sigmoid(self.decoder(self.sampling((mean, log_variance)), training=True))
        pixels = keras.losses.binary_crossentropy(ops.reshape(data, (-1, 2, 2)), ops.reshape(decoded, (-1, 2, 2)))
        reconstruction = ops.mean(ops.sum(pixels, axis=1))
        kl = -0.5 * (1 + log_variance - ops.square(mean) - ops.exp(log_variance))
        kl = ops.mean(ops.sum(kl, axis=1))
        return reconstruction + kl, reconstruction, kl


class Quantizer(layers.Layer):
    """The nearest entry of a codebook, and the codebook's losses by `add_loss`."""

    def build(self, shape):
        self.codebook = self.add_weight(shape=(shape[-1], 4), initializer="random_uniform")

    def call(self, x):
        similarity = ops.matmul(x, self.codebook)
        distances = ops.sum(x**2, axis=1, keepdims=True) + ops.sum(self.codebook**2, axis=0) - 2 * similarity
        chosen = ops.one_hot(ops.argmin(distances, axis=1), 4, dtype=x.dtype)
        quantized = ops.matmul(chosen, ops.transpose(self.codebook))
        self.add_loss(
            0.25 * ops.mean((ops.stop_gradient(quantized) - x) ** 2)
            + ops.mean((quantized - ops.stop_gradient(x)) ** 2)
        )
        return x + ops.stop_gradient(quantized - x)


class VqVae(Tracked):
    """vq_vae: losses that a layer adds."""

    names = ("loss", "reconstruction_loss", "vqvae_loss")

    def __init__(self):
        super().__init__(keras.Sequential([network(4, 2), Quantizer(), network(2, 4, seed=2)]))

    def objective(self, data):
        reconstruction = ops.mean((data - self.net(data, training=True)) ** 2) / 0.7
        added = sum(self.net.losses)
        return reconstruction + added, reconstruction, added


class RealNvp(Tracked):
    """real_nvp: the likelihood of coupling layers, regularized weights."""

    def __init__(self):
        super().__init__()
        self.couplings = [network(2, 4, layers.Dense(5, kernel_regularizer="l2"), seed=seed) for seed in (1, 2)]

    def call(self, x, training=False):
        determinant = 0.0
        for index, coupling in enumerate(self.couplings):
            mask = ops.convert_to_tensor(np.array([index % 2, 1 - index % 2]), x.dtype)
            made = coupling(x * mask, training=training)
            scale, shift = ops.tanh(made[:, :2]) * (1 - mask), made[:, 2:] * (1 - mask)
            x = x * mask + (1 - mask) * (x * ops.exp(-scale) - shift * ops.exp(-scale))
            determinant = determinant - ops.sum(scale, axis=1)
        return x, determinant

    def objective(self, data):
        z, determinant = self(data, training=True)
        return -ops.mean(-0.5 * ops.sum(z**2, axis=1) + determinant) + sum(self.losses)


class Molecules(Tracked):
    """molecule_generation: a penalty on a gradient with respect to randomly interpolated molecules."""

    def __init__(self):
        super().__init__()
        self.encoder, self.predictor, self.decoder = network(4, 2, rate=0), network(2, 1, rate=0), network(2, 4)
        self.seed = keras.random.SeedGenerator(6)

    def call(self, inputs, training=False):
        return self.decoder(self.encoder(inputs[0], training=training), training=training)

    def objective(self, data):
        features, quality = data[0]
        encoded = self.encoder(features)
        generated = self.decoder(encoded, training=True)
        alpha = keras.random.uniform((ops.shape(features)[0], 1), dtype=features.dtype, seed=self.seed)
        between = features * alpha + (1 - alpha) * generated
        slopes = input_gradient(lambda x: self.predictor(self.encoder(x)), between)
        penalty = ops.mean((1 - ops.sqrt(ops.sum(slopes**2, axis=1))) ** 2)
        predicted = ops.sigmoid(self.predictor(encoded))
        known = ops.mean(keras.losses.binary_crossentropy(quality, predicted))
        return ops.mean(ops.sum((features - generated) ** 2, axis=1)) + known + penalty


class Ddpm(OwnStep):
    """ddpm: noise of a random strength for each sample; an EMA of the network after the update."""

    def __init__(self):
        super().__init__(network(4, 3))
        self.average = copy_of(self.net)
        self.times, self.noises = keras.random.SeedGenerator(7), keras.random.SeedGenerator(8)
        self.kept = np.linspace(0.9, 0.1, 8)

    def call(self, x, training=False):
        return self.net(ops.concatenate([x, x[:, :1]], axis=1), training=training)

    def objective(self, data):
        times = keras.random.randint((ops.shape(data)[0],), 0, 8, seed=self.times)
        kept = ops.expand_dims(ops.take(ops.convert_to_tensor(self.kept, data.dtype), times), 1)
        noise = keras.random.normal(ops.shape(data), dtype=data.dtype, seed=self.noises)
        noisy = ops.concatenate([kept * data + (1 - kept) * noise, kept], axis=1)
        return keras.losses.MeanSquaredError()(noise, self.net(noisy, training=True))

    def after(self, data):
        for weight, average in zip(self.net.weights, self.average.weights, strict=True):
            average.assign(0.9 * average + 0.1 * weight)

    def track(self, loss):
        return {"loss": loss}


class AdaIn(Tracked):
    """adain: a frozen encoder, statistics of each picture, losses of style and content."""

    names = ("style_loss", "content_loss", "total_loss")

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = network((6, 2), 3, rate=0), network((6, 3), 2)
        self.encoder.trainable = False

    def call(self, x, training=False):
        return self.decoder(self.encoder(x), training=training)

    def objective(self, data):
        style, content = data
        style, content = self.encoder(style), self.encoder(content)
        (mean, deviation), (own_mean, own_deviation) = moments(style), moments(content)
        made = deviation * (content - own_mean) / own_deviation + mean
        remade = self.encoder(self.decoder(made, training=True))
        error = keras.losses.MeanSquaredError()
        of_content = error(made, remade)
        of_style = error(mean, moments(remade)[0]) + error(deviation, moments(remade)[1])
        return of_content + 4 * of_style, of_content, of_style

    def track(self, total, content, style):
        return super().track(style, content, total)


def moments(x):
    mean = ops.mean(x, axis=1, keepdims=True)
    return mean, ops.sqrt(ops.mean((x - mean) ** 2, axis=1, keepdims=True) + 1e-3)


class TextualInversion(OwnStep):
    """textual_inversion: all weights are frozen except one row of an embedding, whose gradient is masked."""

    new = 3

    def __init__(self):
        super().__init__(network((5, 3), 2))
        self.embedding = layers.Embedding(6, 3)
        self.embedding.build((None, 5))
        self.net.trainable = False

    def call(self, tokens, training=False):
        return self.net(self.embedding(tokens), training=training)

    def objective(self, data):
        tokens, y = data
        return keras.losses.MeanSquaredError()(y, self(tokens, training=True))

    def gradients(self, gradients):
        if BACKEND == "tensorflow":  # slices of rows
            import tensorflow as tf

            (slices,) = gradients
            is_new = tf.expand_dims(slices.indices == self.new, -1)
            return [tf.IndexedSlices(tf.where(is_new, slices.values, 0), slices.indices, slices.dense_shape)]
        is_new = ops.expand_dims(ops.arange(6) == self.new, -1)
        return [ops.where(is_new, gradients[0], 0.0)]


class Speech(OwnStep):
    """transformer_asr: a mask of padding as the weights of a loss, which divides by all tokens."""

    def __init__(self):
        super().__init__(network((5, 8), 6))
        self.embedding = layers.Embedding(6, 4)
        self.embedding.build((None, 5))

    def call(self, inputs, training=False):
        return self.net(ops.concatenate([inputs["sound"], self.embedding(inputs["text"])], -1), training=training)

    def objective(self, data):
        is_word = ops.cast(data["text"] != 0, self.compute_dtype)
        targets = ops.one_hot(data["text"], 6)
        loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
        return loss(targets, self(data, training=True), sample_weight=is_word)


class MaskedLanguage(OwnStep):
    """masked_language_modeling: the unreduced loss of each token, with weights, is differentiated."""

    def __init__(self):
        super().__init__(network((5, 3), 6))
        self.embedding = layers.Embedding(6, 3)
        self.embedding.build((None, 5))

    def call(self, tokens, training=False):
        return self.net(self.embedding(tokens), training=training)

    def objective(self, data):
        tokens, labels, weight = data
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=None)
        return loss(labels, self(tokens, training=True), sample_weight=weight)


class GraphAttention(OwnStep):
    """gat: samples are indices of nodes, the graph is a part of the model."""

    def __init__(self):
        super().__init__(network(3, 4, rate=0))
        self.nodes = np.random.default_rng(4).normal(size=(SAMPLES, 3))

    def compile(self, **kwargs):
        super().compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), **kwargs)

    def call(self, indices, training=False):
        outputs = self.net(ops.convert_to_tensor(self.nodes, self.compute_dtype), training=training)
        return ops.take(outputs, indices, axis=0)

    def objective(self, data):
        indices, labels = data
        return self.compute_loss(y=labels, y_pred=self(indices, training=True))


class Deit(Tracked):
    """deit: a frozen teacher's decisions as the targets of a second head; a metric that gets predictions."""

    names = ("loss", "distillation_loss")

    def __init__(self):
        super().__init__(network(4, 6))
        self.teacher = network(4, 3, rate=0)
        self.teacher.trainable = False
        self.accuracy = keras.metrics.CategoricalAccuracy(name="accuracy")

    @property
    def metrics(self):
        return [*self.trackers, self.accuracy]

    def objective(self, data):
        x, y = data
        targets = ops.one_hot(ops.argmax(y, axis=-1), 3)
        decided = ops.one_hot(ops.argmax(self.teacher(x, training=False), axis=-1), 3)
        made = self.net(x, training=True)
        loss = keras.losses.CategoricalCrossentropy(from_logits=True)
        student, distillation = loss(targets, made[:, :3]), loss(decided, made[:, 3:])
        return (student + distillation) / 2, distillation, targets, made[:, :3] + made[:, 3:]

    def track(self, loss, distillation, targets, predictions):
        self.accuracy.update_state(targets, predictions)
        return {**super().track(loss, distillation), "accuracy": self.accuracy.result()}


class Distiller(OwnStep):
    """knowledge_distillation: a `compile` of its own, with several losses and numbers."""

    def __init__(self):
        super().__init__(network(4, 3))
        self.teacher = network(4, 3, rate=0)
        self.teacher.trainable = False

    def compile(self, optimizer, alpha=0.1, temperature=3, **kwargs):
        super().compile(optimizer=optimizer, **kwargs)
        self.student_loss, self.distillation_loss = keras.losses.MeanSquaredError(), keras.losses.KLDivergence()
        self.alpha, self.temperature = alpha, temperature

    def objective(self, data):
        x, y = data
        student, teacher = self.net(x, training=True), self.teacher(x, training=False)
        soft = self.distillation_loss(ops.softmax(teacher / self.temperature), ops.softmax(student / self.temperature))
        return self.alpha * self.student_loss(y, student) + (1 - self.alpha) * soft * self.temperature**2


class MaskedImages(OwnStep):
    """masked_image_modeling: the hidden patches of a picture are drawn by sorting random numbers."""

    def __init__(self):
        super().__init__(network((6, 2), 2))
        self.seed = keras.random.SeedGenerator(9)
        self.hidden = self.add_weight(shape=(2,), initializer="random_normal")

    def objective(self, data):
        drawn = keras.random.uniform(ops.shape(data)[:2], dtype=data.dtype, seed=self.seed)
        order = ops.argsort(drawn, axis=-1)
        hidden, seen = order[:, :3], order[:, 3:]
        patches = [ops.take_along_axis(data, ops.expand_dims(one, -1), axis=1) for one in (hidden, seen)]
        nothing = ops.zeros_like(patches[0]) + self.hidden
        made = self.net(ops.concatenate([nothing, patches[1]], axis=1), training=True)
        return keras.losses.MeanSquaredError()(patches[0], made[:, :3])


class Compiled(OwnStep):
    """edsr, trainer_pattern: the step calls the loss and the metrics of `compile` itself."""

    def __init__(self, net=None):
        super().__init__(net or network(4, 3))

    def compile(self, **kwargs):
        super().compile(loss="mae", metrics=["mse"], **kwargs)

    @property
    def metrics(self):
        return keras.Model.metrics.fget(self)

    def objective(self, data):
        x, y = data
        predicted = self.net(x, training=True)
        return self.compute_loss(x=x, y=y, y_pred=predicted), x, y, predicted

    def track(self, loss, x, y, predicted):
        return {"loss": loss, **self.compute_metrics(x, y, predicted)}


class Nerf(Tracked):
    """nerf: rendering along rays, and a metric of each picture."""

    names = ("loss", "psnr")

    def __init__(self):
        super().__init__(network((6, 3), 2))

    def objective(self, data):
        rays, colours = data
        made = self.net(rays, training=True)
        opacity = 1 - ops.exp(-ops.relu(made[..., 1]))
        far = ops.concatenate([ops.ones((ops.shape(rays)[0], 1), rays.dtype), 1 - opacity[:, :-1]], axis=1)
        seen = ops.sum(opacity * ops.cumprod(far, axis=1) * ops.sigmoid(made[..., 0]), axis=1)
        loss = ops.mean((colours - seen) ** 2)
        return loss, -10 * ops.log10((colours - seen) ** 2 + 1e-3)


class DropPath(layers.Layer):
    """Leaves the branch of a whole sample out."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(10)

    def call(self, x, training=False):
        if not training:
            return x
        drawn = keras.random.uniform((ops.shape(x)[0], 1, 1), dtype=x.dtype, seed=self.seed_generator)
        return x / 0.7 * ops.floor(0.7 + drawn)


class ShiftVit(Compiled):
    """shiftvit: shifted patches, layer normalization, stochastic depth."""

    def __init__(self):
        inputs = keras.Input((6, 2))
        shifted = layers.Lambda(lambda x: ops.concatenate([x[:, 1:, :1], x[:, :-1, 1:]], axis=-1))(inputs)
        x = layers.LayerNormalization()(layers.Dense(2, activation="gelu")(shifted))
        x = layers.Add()([inputs[:, 1:], DropPath()(x)])
        super().__init__(keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x))))


class PatchConvNet(Compiled):
    """patch_convnet: attention as the pooling."""

    def __init__(self):
        inputs = keras.Input((6, 2))
        x = layers.Dropout(0.2, seed=4)(layers.Conv1D(4, 3, padding="same", activation="gelu")(inputs))
        weights = layers.Softmax(axis=1)(layers.Dense(1)(x))
        super().__init__(keras.Model(inputs, layers.Dense(3)(layers.Dot(1)([x, weights])[:, :, 0])))


class ZeroDce(OwnStep):
    """zero_dce: curves for each picture; four losses, which are the logs, one divided by the batch size in the step."""

    def __init__(self):
        super().__init__(network((6, 3), 3))

    def objective(self, data):
        curves = self.net(data, training=True)
        made = data + curves * (data**2 - data)
        means = ops.mean(made, axis=1)
        colour = ops.mean(ops.sqrt((means[:, 0] - means[:, 1]) ** 2 + (means[:, 1] - means[:, 2]) ** 2 + 1e-6))
        smooth = 2 * ops.sum((curves[:, 1:] - curves[:, :-1]) ** 2) / ops.cast(ops.shape(data)[0], data.dtype)
        exposed = ops.mean((ops.mean(made, axis=2) - 0.6) ** 2)
        return colour + smooth + exposed, colour, smooth, exposed

    def track(self, loss, colour, smooth, exposed):
        return {"total_loss": loss, "colour": colour, "smooth": smooth, "exposure": exposed}


class SecondOrder(OwnStep):
    """debugging_tips: the mean of the gradient and the gradient of that gradient."""

    def __init__(self):
        super().__init__(network(4, 3))

    def objective(self, data):
        x, y = data
        if BACKEND == "jax":
            loss, slopes = self.by_jax(x, y)
        else:
            loss, slopes = self.by_tape(x, y)
        return 0.5 * loss + 0.5 * sum(ops.sum(one) for one in slopes)

    def loss_of(self, x, y):
        return ops.mean((y - self.net(x, training=True)) ** 2)

    def by_tape(self, x, y):
        if BACKEND == "tensorflow":
            import tensorflow as tf

            with tf.GradientTape() as tape:
                loss = self.loss_of(x, y)
            return loss, tape.gradient(loss, self.trainable_weights)
        import torch

        loss = self.loss_of(x, y)
        weights = [one.value for one in self.trainable_weights]
        return loss, torch.autograd.grad(loss, weights, create_graph=True)

    def by_jax(self, x, y):
        import jax

        scope = keras.src.backend.common.stateless_scope.get_stateless_scope()
        given = [scope.get_current_value(one) for one in self.trainable_variables]
        seeds = [(one, scope.get_current_value(one)) for one in self.non_trainable_variables]

        def loss_of(values):
            mapping = [*zip(self.trainable_variables, values, strict=True), *seeds]
            with keras.StatelessScope(state_mapping=mapping) as inner:
                loss = self.loss_of(x, y)
            return loss, [inner.get_current_value(one) for one in self.non_trainable_variables]

        (loss, moved), slopes = jax.value_and_grad(loss_of, has_aux=True)(given)
        for variable, value in zip(self.non_trainable_variables, moved, strict=True):
            variable.assign(value)
        return loss, slopes


# The same with trained BatchNormalization


class Ddim(Tracked):
    """ddim: as ddpm, with signal and noise by angle, and two losses of which one is trained."""

    names = ("n_loss", "i_loss")

    def __init__(self, *normalization):
        super().__init__(network(5, 4, *normalization))
        self.average = copy_of(self.net)
        self.times, self.noises = keras.random.SeedGenerator(7), keras.random.SeedGenerator(8)

    def call(self, x, training=False):
        return self.net(ops.concatenate([x, x[:, :1]], axis=1), training=training)

    def objective(self, data):
        noise = keras.random.normal(ops.shape(data), dtype=data.dtype, seed=self.noises)
        angle = keras.random.uniform((ops.shape(data)[0], 1), dtype=data.dtype, seed=self.times)
        signal_rate, noise_rate = ops.cos(angle), ops.sin(angle)
        noisy = signal_rate * data + noise_rate * noise
        predicted = self.net(ops.concatenate([noisy, noise_rate**2], axis=1), training=True)
        error = keras.losses.MeanAbsoluteError()
        return error(noise, predicted), error(data, (noisy - noise_rate * predicted) / signal_rate)

    def after(self, data):
        for weight, average in zip(self.net.weights, self.average.weights, strict=True):
            average.assign(0.9 * average + 0.1 * weight)


class Siamese(OwnStep):
    """siamese_network: three views through one network, the unreduced loss of each sample is differentiated."""

    def __init__(self, *normalization):
        super().__init__(network(4, 3, *normalization))

    def call(self, inputs, training=False):
        return self.net(inputs[0], training=training)

    def objective(self, data):
        anchor, positive, negative = (self.net(one, training=True) for one in data[0])
        near, far = ops.sum((anchor - positive) ** 2, axis=-1), ops.sum((anchor - negative) ** 2, axis=-1)
        return ops.maximum(near - far + 0.5, 0.0)


class SimSiam(Tracked):
    """simsiam: two views through an encoder and a predictor, similarity of each pair."""

    def __init__(self, *normalization):
        super().__init__()
        self.encoder, self.predictor = network(4, 3, *normalization), network(3, 3, seed=2)

    def call(self, x, training=False):
        return self.predictor(self.encoder(x, training=training), training=training)

    def objective(self, data):
        made = [self.encoder(one, training=True) for one in data]
        predicted = [self.predictor(one, training=True) for one in made]
        return (similarity(predicted[0], made[1]) + similarity(predicted[1], made[0])) / 2


def similarity(predicted, made):
    predicted, made = (ops.normalize(one, axis=1) for one in (predicted, ops.stop_gradient(made)))
    return -ops.mean(ops.sum(predicted * made, axis=1))


class ConsistencyTraining(Tracked):
    """consistency_training: two views of a sample, one of them through a frozen teacher."""

    def __init__(self, *normalization):
        super().__init__(network(4, 3, *normalization))
        self.teacher = network(4, 3, rate=0)
        self.teacher.trainable = False

    def call(self, inputs, training=False):
        return self.net(inputs[0], training=training)

    def objective(self, data):
        (noisy, clean), y = data
        student, teacher = self.net(noisy, training=True), self.teacher(clean, training=False)
        loss = keras.losses.CategoricalCrossentropy(from_logits=True)(ops.softmax(y), student)
        return 0.5 * loss + 0.5 * keras.losses.KLDivergence()(ops.softmax(teacher / 10), ops.softmax(student / 10))


class FunctionMatching(OwnStep):
    """better_knowledge_distillation: the student learns from the teacher's predictions only."""

    def __init__(self, *normalization):
        super().__init__(network(4, 3, *normalization))
        self.teacher = network(4, 3, rate=0)
        self.teacher.trainable = False

    def objective(self, data):
        x, _ = data
        student, teacher = self.net(x, training=True), self.teacher(x, training=False)
        return keras.losses.KLDivergence()(ops.softmax(teacher / 5), ops.softmax(student / 5))


@dataclass(frozen=True)
class Example:
    """A model in the shape of some of Keras's examples.

    Args:
        names: of these examples.
        step: its class; with BatchNormalization, takes that layer.
        data: gives the arguments of `fit`.
        reduction: as it is certified.
        draws: how often a step draws from a generator of the model.
    """

    names: tuple[str, ...]
    step: Any
    data: Any
    reduction: str = "mean"
    draws: int = 1


def pairs():
    return {"x": numbers(4), "y": numbers(3, seed=1)}


def patches():
    return {"x": numbers(6, 2), "y": numbers(3, seed=1)}


EXACT = (
    Example(("vae",), Vae, lambda: {"x": numbers(4, is_positive=True)}),
    Example(("vq_vae",), VqVae, lambda: {"x": numbers(4)}),
    Example(("real_nvp",), RealNvp, lambda: {"x": numbers(2)}),
    Example(("molecule_generation",), Molecules, lambda: {"x": [numbers(4), numbers(1, seed=1, is_positive=True)]}),
    Example(("ddpm",), Ddpm, lambda: {"x": numbers(3)}),
    Example(("adain",), AdaIn, lambda: {"x": numbers(6, 2), "y": numbers(6, 2, seed=1)}),
    Example(("textual_inversion",), TextualInversion, lambda: {"x": integers(6, 5), "y": numbers(5, 2)}),
    Example(("transformer_asr",), Speech, lambda: {"x": {"sound": numbers(5, 4), "text": integers(6, 5)}}),
    Example(
        ("masked_language_modeling",),
        MaskedLanguage,
        lambda: {"x": integers(6, 5), "y": integers(6, 5, seed=1), "sample_weight": numbers(5, is_positive=True)},
        reduction="sum",
    ),
    Example(("gat",), GraphAttention, lambda: {"x": np.arange(SAMPLES), "y": integers(4)}),
    Example(("deit",), Deit, pairs),
    Example(("knowledge_distillation",), Distiller, pairs),
    Example(("masked_image_modeling",), MaskedImages, lambda: {"x": numbers(6, 2)}),
    Example(("edsr", "trainer_pattern"), Compiled, pairs),
    Example(("nerf",), Nerf, lambda: {"x": numbers(6, 3), "y": numbers(is_positive=True)}),
    Example(("shiftvit",), ShiftVit, patches),
    Example(("patch_convnet",), PatchConvNet, patches),
    Example(("zero_dce",), ZeroDce, lambda: {"x": numbers(6, 3, is_positive=True)}),
    Example(("debugging_tips",), SecondOrder, pairs),
)
EXACT_BUT_FOR_NORMALIZATION = (
    Example(("ddim",), Ddim, lambda: {"x": numbers(4)}),
    Example(
        ("siamese_network",),
        Siamese,
        lambda: {"x": [numbers(4, seed=seed) for seed in range(3)]},
        reduction="sum",
        draws=3,
    ),
    Example(("simsiam",), SimSiam, lambda: {"x": numbers(4), "y": numbers(4, seed=1)}, draws=2),
    Example(
        ("consistency_training",),
        ConsistencyTraining,
        lambda: {"x": [numbers(4), numbers(4, seed=2)], "y": numbers(3, seed=1)},
    ),
    Example(("better_knowledge_distillation",), FunctionMatching, pairs),
)
