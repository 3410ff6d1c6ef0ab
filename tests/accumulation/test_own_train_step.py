"""Models with a `train_step` of their own: exact against their own step at the effective batch, or refused."""

import contextlib
import itertools

import keras
import numpy as np
import pytest
from keras import ops
from own_steps import BACKEND, OwnStep, data, net
from precision import set_precision

from accumtune import accumulate
from accumtune.accumulation.own_step import own_train_step
from accumtune.errors import CustomTrainStepError

dense = keras.layers.Dense


def sgd():
    return keras.optimizers.SGD(0.1, momentum=0.9)


def make(step, layers=(), optimizer=sgd, eager=False, outputs=3):
    keras.utils.set_random_seed(7)
    model = step(net(*(layer() for layer in layers), outputs=outputs))
    model.compile(optimizer=optimizer(), run_eagerly=eager)
    return model


def trained(model, *arrays, batch_size=12, epochs=2):
    history = model.fit(*arrays, batch_size=batch_size, epochs=epochs, verbose=0, shuffle=False).history
    weights = [ops.convert_to_numpy(one.value) for one in [*model.variables, *model.optimizer.variables]]
    seeds = [one.name == "seed_generator_state" for one in [*model.variables, *model.optimizer.variables]]
    return [one for one, is_seed in zip(weights, seeds, strict=True) if not is_seed], history


def check_equal(step, arrays=None, micro_batch_size=5, reduction="mean", **how):
    """An accumulated training, in windows of 5 + 5 + 2 samples and a last one of 2, equals the plain one."""
    arrays = data(26) if arrays is None else arrays
    weights, history = trained(make(step, **how), *arrays)
    model = accumulate(make(step, **how), micro_batch_size=micro_batch_size)
    accumulated, logs = trained(model, *arrays)
    for one, other in zip(weights, accumulated, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-7, atol=1e-8)
    for name in history:
        np.testing.assert_allclose(logs[name], history[name], rtol=1e-6, atol=1e-7)
    assert own_train_step.certificate_of(model).reduction == reduction
    return model


def check_refused(step, words, arrays=None, **how):
    model = make(step, **how)
    before = [ops.convert_to_numpy(one.value) for one in model.variables]
    with pytest.raises(CustomTrainStepError, match=words) as caught:
        own_train_step.certify(model, *(data(14) if arrays is None else arrays))
    for one, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(one.value), value)
    assert "Fix:" in str(caught.value)


# Shapes of Keras's examples, by what is special in them


class Autoencoder(OwnStep):
    """vae: a sampling layer with a seed generator of its own, a sum over features and a mean over samples."""

    def __init__(self, net, **kwargs):
        super().__init__(net, **kwargs)
        self.seed = keras.random.SeedGenerator(3)

    def objective(self, data):
        x, y = data
        mean = self.net(x, training=True)
        sampled = mean + 0.1 * keras.random.normal(ops.shape(mean), seed=self.seed)
        kl = -0.5 * ops.sum(1 + mean - ops.square(mean) - ops.exp(mean), axis=1)
        return ops.mean(ops.sum(ops.square(sampled - y), axis=1)) + ops.mean(kl)


class SumOfLosses(OwnStep):
    """siamese_network, zero_dce: a vector of losses is differentiated, which adds them up."""

    def objective(self, data):
        x, y = data
        return ops.mean(ops.square(self.net(x, training=True) - y), axis=1) / 10

    def track(self, loss):
        self.loss_tracker.update_state(ops.sum(loss))
        return {"loss": self.loss_tracker.result(), "mean": ops.mean(loss), "sum": ops.sum(loss)}


class Averaged(OwnStep):
    """ddpm, ddim: an EMA of the weights, and a counter, after the update."""

    def __init__(self, net, **kwargs):
        super().__init__(net, **kwargs)
        self.average = keras.models.clone_model(net)
        self.average.set_weights(net.get_weights())
        self.average.trainable = False
        self.updates = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def after(self, data):
        for weight, average in zip(self.net.weights, self.average.weights, strict=True):
            average.assign(0.9 * average + 0.1 * weight)
        self.updates.assign(self.updates + 1)


class Distilled(OwnStep):
    """knowledge_distillation, deit: a frozen teacher, and two losses."""

    def __init__(self, net, **kwargs):
        super().__init__(net, **kwargs)
        self.teacher = keras.models.clone_model(net)
        self.teacher.trainable = False

    def objective(self, data):
        x, y = data
        student, teacher = self.net(x, training=True), self.teacher(x, training=False)
        soft = keras.losses.KLDivergence()(ops.softmax(teacher / 2), ops.softmax(student / 2))
        return 0.3 * keras.losses.MeanSquaredError()(y, student) + 0.7 * soft


class Reported(OwnStep):
    """trainer_pattern: metrics that get predictions, and a loss that nobody tracks."""

    def __init__(self, net, **kwargs):
        super().__init__(net, **kwargs)
        self.error = keras.metrics.MeanAbsoluteError(name="error")

    @property
    def metrics(self):
        return [self.loss_tracker, self.error]

    def track(self, loss):
        return {"loss": loss, "half": loss / 2}


class Masked(OwnStep):
    """masked_image_modeling: each sample is masked by draws of its own."""

    def __init__(self, net, **kwargs):
        super().__init__(net, **kwargs)
        self.seed = keras.random.SeedGenerator(5)

    def objective(self, data):
        x, y = data
        keep = keras.random.uniform(ops.shape(x), seed=self.seed) > 0.5
        return ops.mean(ops.square(self.net(ops.where(keep, x, 0.0), training=True) - y))


SHAPES = {"plain": OwnStep, "distillation": Distilled, "average": Averaged, "own logs": Reported}


@pytest.mark.parametrize("step", SHAPES.values(), ids=SHAPES.keys())
def test_a_mean_loss_is_exact(step):
    check_equal(step)


def test_a_sum_of_losses_is_exact_and_its_logs_add_up():
    model = check_equal(SumOfLosses, reduction="sum")
    assert own_train_step.certificate_of(model).logs == ("last", "mean", "sum")


def test_what_follows_the_update_runs_once_per_update():
    model = check_equal(Averaged)
    assert float(ops.convert_to_numpy(model.updates.value)) == 2 * 3  # two epochs of three updates


@pytest.mark.parametrize("step", [Autoencoder, Masked])
def test_draws_for_each_sample_are_certified(step):
    model = accumulate(make(step, [lambda: keras.layers.Dropout(0.5, seed=1)]), micro_batch_size=5)
    _, logs = trained(model, *data(26))
    assert own_train_step.certificate_of(model).reduction == "mean" and np.all(np.isfinite(logs["loss"]))


@pytest.mark.skipif(BACKEND == "torch", reason="torch always runs eagerly")
def test_run_eagerly():
    check_equal(Averaged, eager=True)


def test_another_optimizer_and_loss_scaling():
    check_equal(OwnStep, optimizer=lambda: keras.optimizers.LossScaleOptimizer(sgd()))


def test_accumulation_steps_and_a_ragged_last_window():
    weights, _ = trained(make(Averaged), *data(26), batch_size=12)
    model = accumulate(make(Averaged), accumulation_steps=3)
    accumulated, _ = trained(model, *data(26), batch_size=4)
    for one, other in zip(weights, accumulated, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-7, atol=1e-8)


def test_data_of_x_alone():
    class Alone(OwnStep):
        def objective(self, data):
            return ops.mean(ops.square(self.net(data[0] if isinstance(data, tuple) else data, training=True) - 1))

    check_equal(Alone, data(26)[:1])


def test_sample_weights_of_which_a_mean_over_samples_is_taken():
    class Weighted(OwnStep):
        def objective(self, data):
            x, y, weight = data
            return ops.mean(weight * ops.mean(ops.square(self.net(x, training=True) - y), axis=1))

    x, y = data(26)
    weight = np.linspace(0, 2, 26).astype(keras.config.floatx())
    weights, _ = trained_with(make(Weighted), x, y, weight)
    accumulated, _ = trained_with(accumulate(make(Weighted), micro_batch_size=5), x, y, weight)
    for one, other in zip(weights, accumulated, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-7, atol=1e-8)


def trained_with(model, x, y, weight):
    model.fit(x, y, sample_weight=weight, batch_size=12, epochs=2, verbose=0, shuffle=False)
    return [ops.convert_to_numpy(one.value) for one in model.weights], None


class LossOfKeras(OwnStep):
    """A loss object of Keras's, which computes in floatx whatever the model has."""

    def objective(self, data):
        return keras.losses.MeanSquaredError()(data[1], self.net(data[0], training=True))


def in_float64(step):
    """A model in float64 where the rest of Keras has float32."""
    set_precision("float32")
    keras.utils.set_random_seed(7)
    layers = [dense(6, activation="tanh", dtype="float64"), dense(3, dtype="float64")]
    model = step(keras.Sequential([keras.Input((4,), dtype="float64"), *layers]), dtype="float64")
    model.compile(sgd())
    return model


def test_a_loss_in_float32_of_a_model_in_float64():
    """Its gradients are rounded to float32, and so are those of the parts."""
    x, y = (one.astype("float64") for one in data(26))
    weights, _ = trained(in_float64(LossOfKeras), x, y)
    accumulated, _ = trained(accumulate(in_float64(LossOfKeras), micro_batch_size=5), x, y)
    for one, other in zip(weights, accumulated, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)


def test_a_model_in_float64_as_keras_has_it(monkeypatch):
    """Without the tests' own rule: what Keras promotes becomes float32 on JAX and torch."""
    from keras.src.backend.common import dtypes

    monkeypatch.setitem(dtypes.BIT64_TO_BIT32_DTYPE, "float64", "float32")
    assert own_train_step.certify(make(LossOfKeras), *data(14)).reduction == "mean"


def test_a_model_in_float64_is_compared_in_float64():
    """A ten millionth is no rounding there."""

    class Nearly(OwnStep):
        def objective(self, data):
            loss = ops.square(self.net(data[0], training=True) - data[1])
            return ops.mean(loss) + 1e-7 * ops.sum(loss)

    check_refused(Nearly, "neither the mean nor the sum")


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy):
    """float16 gets a LossScaleOptimizer from `compile`."""

    class Mixed(OwnStep):
        def objective(self, data):
            x, y = (ops.cast(one, "float32") for one in data)
            return ops.mean(ops.square(ops.cast(self.net(x, training=True), "float32") - y))

    def made():
        keras.utils.set_random_seed(7)
        hidden, output = dense(6, activation="tanh", dtype=policy), dense(3, dtype=policy)
        model = Mixed(keras.Sequential([keras.Input((4,), dtype="float32"), hidden, output]), dtype=policy)
        model.compile(sgd())
        return model

    class_of = {"mixed_bfloat16": keras.optimizers.SGD, "mixed_float16": keras.optimizers.LossScaleOptimizer}
    x, y = (one.astype("float32") for one in data(26))
    plain, model = made(), accumulate(made(), micro_batch_size=5)
    assert isinstance(model.optimizer, class_of[policy])
    weights, history = trained(plain, x, y, epochs=1)
    accumulated, logs = trained(model, x, y, epochs=1)
    for one, other in zip(weights, accumulated, strict=True):
        np.testing.assert_allclose(other, one, rtol=2e-2, atol=2e-2 * float(np.max(np.abs(one), initial=0.0)))
    np.testing.assert_allclose(logs["loss"], history["loss"], rtol=2e-2)


def test_a_test_step_of_its_own_validates_in_micro_batches():
    class Tested(OwnStep):
        sizes = []

        def test_step(self, *arguments):
            if BACKEND == "jax":
                state, data = arguments
                trainable, non_trainable, metrics = state
                mapping = [
                    *zip(self.trainable_variables, trainable, strict=True),
                    *zip(self.non_trainable_variables, non_trainable, strict=True),
                    *zip(self.metrics_variables, metrics, strict=True),
                ]
                with keras.StatelessScope(state_mapping=mapping) as scope:
                    logs = self.tested(data)
                metrics = [scope.get_current_value(one) for one in self.metrics_variables]
                return logs, (trainable, non_trainable, metrics)
            return self.tested(*arguments)

        def tested(self, data):
            x, y = data
            self.sizes.append(int(x.shape[0] or 0))
            self.loss_tracker.update_state(ops.mean(ops.square(self.net(x) - y), axis=1))
            return {"loss": self.loss_tracker.result()}

    x, y = data(26)
    found = []
    for model in (make(Tested, eager=True), accumulate(make(Tested, eager=True), micro_batch_size=5)):
        Tested.sizes.clear()
        history = model.fit(x, y, batch_size=12, validation_data=(x[:14], y[:14]), shuffle=False, verbose=0).history
        found.append((history["val_loss"][0], max(Tested.sizes)))
    assert found[1][0] == pytest.approx(found[0][0]) and [size for _, size in found] == [12, 5]


REGULARIZED = {
    "added by a layer": lambda: AddsMean(),
    "of a weight": lambda: dense(6, kernel_regularizer=keras.regularizers.L2(0.1)),
}


class AddsMean(keras.layers.Layer):
    def call(self, x):
        self.add_loss(ops.mean(ops.square(x)))
        return x


@pytest.mark.parametrize("layer", REGULARIZED.values(), ids=REGULARIZED.keys())
def test_losses_that_layers_add(layer):
    class Regularized(OwnStep):
        def objective(self, data):
            return super().objective(data) + sum(self.losses)

    check_equal(Regularized, layers=[layer])


def test_what_was_certified_is_said_once(capsys):
    keras.config.enable_interactive_logging()
    trained(accumulate(make(OwnStep), micro_batch_size=5), *data(26))
    assert capsys.readouterr().out.count("gradients are means over samples") == 1


def test_batch_normalization_moves_once_per_update():
    """Each micro-batch normalizes by itself, as ever; but the moving statistics are those of the window."""
    model = make(OwnStep, [keras.layers.BatchNormalization], optimizer=lambda: keras.optimizers.SGD(0.0))
    plain = make(OwnStep, [keras.layers.BatchNormalization], optimizer=lambda: keras.optimizers.SGD(0.0))
    weights, _ = trained(plain, *data(26))
    accumulated, _ = trained(accumulate(model, micro_batch_size=5), *data(26))
    for one, other in zip(weights[:8], accumulated[:8], strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-7, atol=1e-8)


def test_an_average_of_weights_follows_the_moving_statistics():
    """As in Keras's ddim: a copy of the network that only assignments change, its normalization too."""

    class Averaged(OwnStep):
        def __init__(self, net):
            super().__init__(net)
            self.average = keras.models.clone_model(net)
            self.average.trainable = False
            for layer in self.average.layers:
                layer.trainable = isinstance(layer, keras.layers.BatchNormalization)

        def after(self, data):
            for weight, average in zip(self.net.weights, self.average.weights, strict=True):
                average.assign(0.9 * average + 0.1 * weight)

    how = {
        "layers": [lambda: keras.layers.BatchNormalization(center=False, scale=False)],
        "optimizer": lambda: keras.optimizers.SGD(0.0),
    }
    plain, model = make(Averaged, **how), accumulate(make(Averaged, **how), micro_batch_size=5)
    trained(plain, *data(26))
    trained(model, *data(26))
    for one, other in zip(plain.average.weights, model.average.weights, strict=True):
        one, other = ops.convert_to_numpy(one.value), ops.convert_to_numpy(other.value)
        np.testing.assert_allclose(other, one, rtol=1e-7, atol=1e-8)
    assert np.any(ops.convert_to_numpy(model.average.layers[1].moving_mean))


def test_the_mean_of_means_is_another_training():
    """The negative control: micro-batches of 5, 5 and 2 that count the same."""
    weights, _ = trained(make(OwnStep), *data(26))
    model = make(OwnStep)
    import accumtune.accumulation.window as window

    own = window.shares
    module = __import__(f"accumtune.accumulation.own_step.own_step_{BACKEND}", fromlist=["shares"])
    module.shares = lambda samples: [1 / len(samples)] * len(samples)
    try:
        accumulated, _ = trained(accumulate(model, micro_batch_size=5), *data(26))
    finally:
        module.shares = own
    assert max(float(np.max(np.abs(a - b))) for a, b in zip(weights, accumulated, strict=True)) > 1e-4


# What cannot be exact


def test_no_apply_two_applies_and_two_optimizers_are_refused():
    class None_(OwnStep):
        def update(self, *arguments):
            return (arguments[2], arguments[0]) if BACKEND == "jax" else None

    class Two(OwnStep):
        def update(self, *arguments):
            super().update(*arguments)
            return super().update(*arguments)

    class Other(OwnStep):
        def __init__(self, net, **kwargs):
            super().__init__(net, **kwargs)
            self.other = keras.optimizers.Adam()

        def update(self, *arguments):
            if BACKEND == "jax":
                self.other.stateless_apply(*arguments)
            else:
                self.other.apply(*arguments)
            return super().update(*arguments)

    check_refused(None_, "no gradients")
    check_refused(Two, "2 times")
    check_refused(Other, "Adam")


def test_what_it_assigns_from_the_samples_is_refused():
    class Remembers(OwnStep):
        def __init__(self, net, **kwargs):
            super().__init__(net, **kwargs)
            self.mean = self.add_weight(shape=(4,), initializer="zeros", trainable=False)

        def after(self, data):
            self.mean.assign(0.9 * self.mean + 0.1 * ops.mean(data[0], axis=0))

    check_refused(Remembers, "depends on the samples")


def test_one_draw_for_a_whole_batch_is_refused():
    class Shared(Autoencoder):
        def objective(self, data):
            return super().objective(data) * keras.random.uniform((), seed=self.seed)

    check_refused(Shared, "drawn for each sample")


LOSSES = {
    "square": lambda loss, x: ops.square(ops.mean(loss)),
    "root": lambda loss, x: ops.sqrt(ops.mean(loss)),
    "log": lambda loss, x: ops.log(1 + ops.mean(loss)),
    "free bits": lambda loss, x: ops.maximum(ops.mean(loss), 0.01),
    "ceiling": lambda loss, x: ops.minimum(ops.mean(loss), 1e6),
    "absolute": lambda loss, x: ops.abs(ops.mean(loss)),
    "largest": lambda loss, x: ops.max(loss),
    "variance": lambda loss, x: ops.mean(loss) + ops.var(loss),
    "standardized": lambda loss, x: ops.mean(ops.square(loss - ops.mean(loss))),
    "softmax over samples": lambda loss, x: ops.sum(ops.softmax(loss) * loss),
    "logsumexp": lambda loss, x: ops.logsumexp(loss),
    "mean over positives": lambda loss, x: (
        ops.sum(loss * ops.cast(x[:, 0] > 0, keras.config.floatx()))
        / (ops.sum(ops.cast(x[:, 0] > 0, keras.config.floatx())) + 1e-3)
    ),
    "mean over valid": lambda loss, x: (
        ops.sum(loss * ops.cast(x[:, 0] != -1, keras.config.floatx()))
        / ops.sum(ops.cast(x[:, 0] != -1, keras.config.floatx()))
    ),
    "pairs": lambda loss, x: ops.mean(ops.maximum(loss[:, None] - loss[None, :] - 100, 0.0)) + ops.mean(loss),
    "mean and sum": lambda loss, x: ops.mean(loss) + 0.1 * ops.sum(loss),
    "cumulative": lambda loss, x: ops.mean(ops.cumsum(loss)),
    "neighbours": lambda loss, x: ops.mean(loss * ops.roll(loss, 1, axis=0)),
    "worst half": lambda loss, x: ops.mean(ops.where(loss > ops.mean(loss), loss, 0.0)),
    "relative": lambda loss, x: ops.mean(loss) / ops.mean(ops.abs(x)),
    "few": lambda loss, x: ops.mean(loss[:2]),
}
GRADIENTS = {
    "clip value": lambda one, size: ops.clip(one, -size, size),
    "clip norm": lambda one, size: one * ops.minimum(1.0, size / (ops.norm(one) + 1e-12)),
    "normalize": lambda one, size: size * one / (ops.norm(one) + 1e-12),
    "sign": lambda one, size: size * ops.sign(one),
    "threshold": lambda one, size: ops.where(ops.abs(one) > 1e-3 / size, one, 0.0),
    "square": lambda one, size: one + one * one / size,
    "zero if not finite": lambda one, size: ops.where(ops.isfinite(one), size * one, 0.0),
}


def mutated():
    """Steps that are neither means nor sums, most of which look like one on an ordinary batch."""
    for (name, loss), scale, weight in itertools.product(LOSSES.items(), (0.1, 1.0, 30.0), (1.0, 1e-2)):

        def objective(self, data, loss=loss, scale=scale, weight=weight):
            x, y = data
            losses = scale * ops.mean(ops.square(self.net(x, training=True) - y), axis=1)
            return weight * loss(losses, x) + ops.mean(losses)

        yield f"loss: {name} of {scale}, times {weight}", {"objective": objective}
    for (name, change), size, every in itertools.product(GRADIENTS.items(), (1e-3, 0.1, 1.0, 10.0, 1e4), (1, 2, 4)):

        def gradients(self, gradients, change=change, size=size, every=every):
            return [change(one, size) if index % every == 0 else one for index, one in enumerate(gradients)]

        yield f"gradients: {name} at {size}, every {every}", {"gradients": gradients}


@pytest.mark.slow
def test_no_mutated_step_is_certified():
    cases = list(mutated())
    assert len(cases) >= 200
    certified = []
    for name, methods in cases:
        model = make(type("Mutated", (OwnStep,), methods))
        try:
            own_train_step.certify(model, *data(14))
            certified.append(name)
        except CustomTrainStepError:
            pass
    assert not certified


@pytest.mark.parametrize("name", ["loss: free bits of 1.0, times 1.0", "gradients: clip value at 10000.0, every 1"])
def test_what_does_not_bite_yet_is_refused_all_the_same(name):
    check_refused(type("Mutated", (OwnStep,), dict(mutated())[name]), "not linear")


LINEAR = {
    "scaled": lambda one: 0.5 * one,
    "centred": lambda one: one - ops.mean(one),
    "reshaped": lambda one: ops.reshape(ops.reshape(one, (-1,)), one.shape),
}


@pytest.mark.parametrize("name", LINEAR)
def test_what_is_linear_in_the_gradients_is_certified(name):
    methods = {"gradients": lambda self, gradients: [LINEAR[name](one) for one in gradients]}
    assert own_train_step.certify(make(type("Linear", (OwnStep,), methods)), *data(14)).reduction == "mean"


def test_ghost_batches():
    def train(micro_batch_size):
        model = make(OwnStep, [keras.layers.BatchNormalization])
        return trained(accumulate(model, micro_batch_size=micro_batch_size, ghost_batch_size=4), *data(24))[0]

    for one, other in zip(train(4), train(8), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-7, atol=1e-8)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere Keras builds a model by its call, before the first step")
def test_a_model_that_its_first_step_builds():
    def unbuilt():
        keras.utils.set_random_seed(7)
        model = OwnStep(keras.Sequential([dense(6, activation="tanh"), dense(3)]))
        model.compile(optimizer=sgd())
        return model

    weights, _ = trained(unbuilt(), *data(26))
    accumulated, _ = trained(accumulate(unbuilt(), micro_batch_size=5), *data(26))
    for one, other in zip(weights, accumulated, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-7, atol=1e-8)


def test_a_step_around_kerass_own_with_losses_and_metrics_of_compile():
    class Around(keras.Model):
        def train_step(self, *arguments):
            return super().train_step(*arguments)

    def made():
        keras.utils.set_random_seed(7)
        inputs = keras.Input((4,))
        model = Around(inputs, dense(3)(dense(6, activation="tanh")(inputs)))
        model.compile(sgd(), "mse", metrics=["mae"])
        return model

    weights, history = trained(made(), *data(26))
    accumulated, logs = trained(accumulate(made(), micro_batch_size=5), *data(26))
    for one, other in zip(weights, accumulated, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-7, atol=1e-8)
    for name in ("loss", "mae"):
        np.testing.assert_allclose(logs[name], history[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("micro_batch_size", [5, 12])
def test_a_loss_of_compile_that_the_step_does_not_use(micro_batch_size):
    """Keras builds it before the first validation alone."""

    def made():
        model = make(OwnStep)
        model.compile(sgd(), "mae")
        return model

    weights, history = trained(made(), *data(26))
    accumulated, logs = trained(accumulate(made(), micro_batch_size), *data(26))
    for one, other in zip(weights, accumulated, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(logs["loss"], history["loss"], rtol=1e-6, atol=1e-7)


def test_values_that_are_no_variables_are_refused():
    class Counts(OwnStep):
        steps = 0

        def objective(self, data):
            self.steps += 1
            return super().objective(data)

    check_refused(Counts, "steps past Keras")


@pytest.mark.skipif(BACKEND == "jax", reason="a step on JAX has no side effects")
def test_a_counter_past_keras_is_refused():
    class Counts(OwnStep):
        def __init__(self, net, **kwargs):
            super().__init__(net, **kwargs)
            if BACKEND == "torch":
                import torch

                self.register_buffer("steps", torch.zeros(()))
            else:
                import tensorflow as tf

                self.steps = tf.Variable(0.0, trainable=False)

        def after(self, data):
            self.steps.add_(1) if BACKEND == "torch" else self.steps.assign_add(1.0)

    check_refused(Counts, "writes past Keras")


def test_a_condition_on_the_batch_is_refused():
    class Conditional(OwnStep):
        def objective(self, data):
            loss = super().objective(data)
            return ops.cond(loss > 1e6, lambda: 0.5 * loss, lambda: loss)

    check_refused(Conditional, "condition|decide")


@pytest.mark.skipif(BACKEND != "torch", reason="torch's own tools")
def test_an_optimizer_of_torch_is_refused_with_the_way_out():
    class Torchs(OwnStep):
        def update(self, gradients, weights):
            import torch

            torch.optim.SGD([weight.value for weight in weights], 0.1).step()

    check_refused(Torchs, r"changes weights past Keras(.|\n)*Fix: use self\.optimizer")


@pytest.mark.skipif(BACKEND != "torch", reason="elsewhere a step is compiled")
@pytest.mark.parametrize("factor", [None, 0.5])
def test_gradients_are_summed_up_as_they_appear(factor):
    """Beside their sum there is one at a time where a step hands on `.grad`; the control computes with it."""
    held = []

    class Holding(OwnStep):
        def gradients(self, gradients):
            return gradients if factor is None else [factor * one for one in gradients]

        def update(self, gradients, weights):
            held.append(max(one.untyped_storage().nbytes() / one.nbytes for one in gradients if one.ndim))
            super().update(gradients, weights)

    model = check_equal(Holding)
    assert own_train_step.certificate_of(model).hands_on_grad is (factor is None)
    held.clear()
    trained(model, *data(24), epochs=1)
    assert max(held) == 1 if factor else max(held) < 1


@pytest.mark.skipif(BACKEND != "torch", reason="elsewhere a step is compiled")
def test_a_step_that_hands_on_other_gradients_than_in_its_trial_is_refused():
    class Other(OwnStep):
        def gradients(self, gradients):
            return [one.clone() for one in gradients] if changes else gradients

    changes = False
    model = accumulate(make(Other), micro_batch_size=5)
    trained(model, *data(26))
    changes = True
    with pytest.raises(CustomTrainStepError, match="other gradients"):
        trained(model, *data(26))


def test_a_step_that_adds_up_gradients_of_several_calls_is_refused():
    """By a condition; on torch by one of Python's on a variable, whose first call updates and whose second does not."""

    class AddsUp(OwnStep):
        def __init__(self, net):
            super().__init__(net)
            self.calls = self.add_weight(shape=(), initializer="zeros", dtype="int32", trainable=False)

        def update(self, *arguments):
            if BACKEND == "tensorflow":
                own_update = super().update
                self.calls.assign(self.calls + 1)
                return ops.cond(self.calls % 2 == 0, lambda: own_update(*arguments) or 0, lambda: 0)
            if BACKEND == "jax":
                optimizer, gradients, trainable = arguments
                own_update = super().update
                return ops.cond(
                    optimizer[0] % 2 == 0,
                    lambda: own_update(optimizer, gradients, trainable),
                    lambda: (trainable, optimizer),
                )
            is_first = int(self.calls.value) % 2 == 0
            self.calls.assign(self.calls + 1)
            return super().update(*arguments) if is_first else None

    with pytest.raises(CustomTrainStepError, match=r"condition|does not update once(.|\n)*Fix: update in every step"):
        trained(accumulate(make(AddsUp), micro_batch_size=5), *data(26))


@pytest.mark.skipif(BACKEND == "jax", reason="a step on JAX does not assign to weights")
def test_a_second_gradient_at_changed_weights_is_refused():
    """As in sharpness-aware minimization."""

    class Sharpness(OwnStep):
        def train_step(self, data):
            for weight in self.net.trainable_weights:
                weight.assign(weight + 0.01)
            return super().train_step(data)

    check_refused(Sharpness, "after it has changed weights")


def test_logs_with_a_number_for_each_sample_are_refused():
    class Each(OwnStep):
        def objective(self, data):
            losses = ops.mean(ops.square(self.net(data[0], training=True) - data[1]), axis=1)
            return ops.mean(losses), losses

        def track(self, loss, losses):
            return {**super().track(loss), "losses": losses}

    check_refused(Each, "a number for each sample")


@pytest.mark.skipif(BACKEND == "jax", reason="a step on JAX is traced, not run")
def test_another_loss_that_an_attribute_chooses_is_tested_too():
    class Chooses(OwnStep):
        is_late = False

        def objective(self, data):
            loss = super().objective(data)
            return ops.sqrt(loss) if self.is_late else loss

    model = accumulate(make(Chooses, eager=True), micro_batch_size=5)
    trained(model, *data(26))
    model.is_late = True
    with pytest.raises(CustomTrainStepError, match="not linear"):
        trained(model, *data(26))


class InFunctions(Averaged):
    def update(self, gradients, weights):
        self.apply(gradients)

    def apply(self, gradients):
        self.optimizer.apply(gradients, self.trainable_weights)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="its own functions")
@pytest.mark.parametrize("was_trained", [False, True])
@pytest.mark.parametrize("name", ["train_step", "objective", "apply", "after", "track"])
def test_functions_of_the_user_run_as_parts_of_the_step(name, was_trained, monkeypatch):
    """Also if plain training has traced them before. The control calls the traces."""
    import tensorflow as tf

    from accumtune.accumulation.engines import engine_tensorflow

    step = type("Step", (InFunctions,), {name: tf.function(getattr(InFunctions, name))})

    def made():
        model = make(step)
        model.optimizer.build(model.trainable_variables)
        variables = [*model.variables, *model.optimizer.variables]
        before = [variable.numpy() for variable in variables]
        for size in (12, 5, 2) if was_trained else ():
            trained(model, *data(size), batch_size=size)
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)
        return model

    def difference():
        weights, logs = trained(accumulate(made(), micro_batch_size=5), *data(26))
        return max(
            *(float(np.max(np.abs(a - b))) for a, b in zip(plain, weights, strict=True)),
            max(abs(a - b) for a, b in zip(history["loss"], logs["loss"], strict=True)),
        )

    plain, history = trained(made(), *data(26))
    assert difference() < 1e-7
    if was_trained and name in ("after", "track"):
        monkeypatch.setattr(engine_tensorflow, "inlined_functions", lambda: lambda function: function)
        assert difference() > 1e-4


@pytest.mark.skipif(BACKEND != "tensorflow", reason="its own functions")
def test_loops_in_functions_of_the_user_are_converted():
    import tensorflow as tf

    class Loops(OwnStep):
        @tf.function
        def total(self, values):
            total = tf.zeros_like(values[:, 0])
            for index in tf.range(tf.shape(values)[1]):
                total += values[:, index]
            return total

        def objective(self, data):
            return super().objective(data) + ops.mean(ops.square(self.total(self.net(data[0], training=True))))

    check_equal(Loops)


@pytest.mark.skipif(BACKEND != "jax", reason="JAX's own functions")
def test_functions_that_jax_jit_has_traced_before_are_traced_again(monkeypatch):
    """The trace of one micro-step would normalize and update the next one as that one. The control uses it."""
    import jax

    from accumtune.accumulation.own_step import own_step_jax

    if not hasattr(jax, "make_user_context"):
        pytest.skip("this JAX does not have it")

    class Jitted(OwnStep):
        def __init__(self, net):
            super().__init__(net)
            object.__setattr__(self, "jitted", jax.jit(self.loss_of))

        def loss_of(self, trainable, non_trainable, x, y):
            outputs, non_trainable = self.stateless_call(trainable, non_trainable, x, training=True)
            return ops.mean(ops.square(outputs - y)), non_trainable

        def train_step(self, state, data):
            trainable, non_trainable, optimizer, metrics = state
            (loss, non_trainable), gradients = jax.value_and_grad(self.jitted, has_aux=True)(
                trainable, non_trainable, *data
            )
            trainable, optimizer = self.optimizer.stateless_apply(optimizer, gradients, trainable)
            return {"loss": loss}, (trainable, non_trainable, optimizer, metrics)

    def train(micro_batch_size, eager=False):
        model = make(Jitted, [keras.layers.BatchNormalization], eager=eager)
        return trained(accumulate(model, micro_batch_size=micro_batch_size, ghost_batch_size=4), *data(24))[0]

    def difference(**how):
        return max(float(np.max(np.abs(a - b))) for a, b in zip(train(12), train(4, **how), strict=True))

    assert difference() < 1e-7
    assert difference(eager=True) < 1e-7
    monkeypatch.setattr(own_step_jax, "retraced_jits", lambda is_traced: contextlib.nullcontext())
    assert difference() > 1e-4


@pytest.mark.skipif(BACKEND != "jax", reason="JAX's own functions")
def test_a_step_that_computes_activations_again_is_exact():
    import jax

    class Rematerialized(OwnStep):
        def objective(self, data):
            return jax.checkpoint(super().objective)(data)

    check_equal(Rematerialized)


@pytest.mark.skipif(BACKEND != "torch", reason="torch's own tools")
def test_torchs_clipping_and_gradients_that_are_never_cleared_are_refused():
    """`clip_grad_norm_` changes a list of gradients in place, here by a factor of 1."""

    class Clipped(OwnStep):
        def gradients(self, gradients):
            import torch

            torch.nn.utils.clip_grad_norm_(self.parameters(), 1e6)
            return gradients

    class NeverCleared(OwnStep):
        def zero_grad(self):
            pass

    check_refused(Clipped, "not linear")
    check_refused(NeverCleared, "another gradient")


@pytest.mark.skipif(BACKEND != "torch", reason="torch's own losses")
def test_losses_of_torch():
    """Each is one operation that takes a mean or a sum itself; what follows it must be linear all the same."""
    from torch.nn import functional

    def stepping(loss):
        class Step(OwnStep):
            def objective(self, data):
                x, y = data
                return loss(ops.sigmoid(self.net(x, training=True)), ops.sigmoid(y))

        return Step

    named = "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy soft_margin_loss".split()
    losses = [getattr(functional, name) for name in named]
    check_equal(stepping(lambda y_pred, y_true: sum(loss(y_pred, y_true) for loss in losses) / 3))
    check_equal(stepping(lambda y_pred, y_true: functional.mse_loss(y_pred, y_true, reduction="sum")), reduction="sum")
    check_refused(stepping(lambda y_pred, y_true: functional.mse_loss(y_pred, y_true) ** 2), "not linear|others")
    centred = stepping(lambda y_pred, y_true: functional.mse_loss(y_pred - y_pred.mean(0), y_true))
    check_refused(centred, "depends on the others")


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere Keras knows the size of every batch")
@pytest.mark.parametrize("samples", [24, 26])
def test_losses_of_outputs_are_logged_as_plain_keras_weights_batches(samples):
    """By their samples; but equally, if the last one may be smaller, since a compiled step then knows no size."""
    import tensorflow as tf

    class Step(keras.Model):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                loss = self.compute_loss(x, y, y_pred)
            self.optimizer.apply(tape.gradient(loss, self.trainable_weights), self.trainable_weights)
            return self.compute_metrics(x, y, y_pred)

    def history(micro_batch_size):
        keras.utils.set_random_seed(7)
        inputs = keras.Input((4,))
        model = Step(inputs, {name: keras.layers.Dense(3, name=name)(inputs) for name in ("one", "other")})
        model.compile(sgd(), {"one": "mse", "other": "mae"}, metrics={"one": "mae"})
        if micro_batch_size:
            accumulate(model, micro_batch_size)
        x, y = data(samples)
        y = y * np.linspace(1, 9, samples)[:, None]  # so that it matters how batches are weighted
        return model.fit(x, {"one": y, "other": -y}, batch_size=12, epochs=2, verbose=0, shuffle=False).history

    plain, *others = map(history, (None, 5, 12))
    assert {"one_loss", "other_loss"} <= plain.keys()
    for other in others:
        for name in plain:
            np.testing.assert_allclose(other[name], plain[name], rtol=1e-7)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's functions")
def test_blocks_that_end_in_another_order_leave_tensorflow_as_it_was():
    """As two trainings in threads do."""
    from accumtune.accumulation.engines.inlined_functions import Function, inlined_functions

    own, first, second = Function.__call__, inlined_functions(), inlined_functions()
    for block in (first, second):
        block.__enter__()
    first.__exit__(None, None, None)
    assert Function.__call__ is not own
    second.__exit__(None, None, None)
    assert Function.__call__ is own
