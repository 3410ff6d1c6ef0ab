"""Masks: micro-batches with unequal numbers of valid entries."""

import keras
import numpy as np
import pytest
from equality import (
    EFFECTIVE,
    REDUCTIONS,
    SAMPLES,
    assert_exact,
    assert_same_training,
    numbers,
    sequences,
    train,
    weights_with_empty_micro_batches,
)
from keras.src.backend import set_keras_mask
from promises import holds


def embedding_model(reduction="sum_over_batch_size"):
    def build():
        inputs = keras.Input((5,), dtype="int32")
        x = keras.layers.Embedding(6, 3, mask_zero=True)(inputs)
        model = keras.Model(inputs, keras.layers.Dense(2)(x))
        model.compile(keras.optimizers.SGD(0.05), keras.losses.MeanSquaredError(reduction=reduction))
        return model

    return build


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@holds("masks, with unequal numbers of valid entries")
def test_masked_sequences(reduction, weighted):
    data = {"x": sequences(), "y": numbers(SAMPLES, 5, 2)}
    if weighted:
        data["sample_weight"] = np.repeat(weights_with_empty_micro_batches()[:, None], 5, axis=1)
    assert_exact(embedding_model(reduction), data)


@holds("masks, with unequal numbers of valid entries")
def test_masking_layer_before_a_recurrent_one():
    def build():
        layers = [keras.layers.Masking(), keras.layers.SimpleRNN(3, return_sequences=True), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input((5, 2)), *layers])
        model.compile(keras.optimizers.SGD(0.1), "mse")
        return model

    x = numbers(SAMPLES, 5, 2) * (sequences() > 0)[:, :, None]
    assert_exact(build, {"x": x, "y": numbers(SAMPLES, 5, 1)})


@holds("masks, with unequal numbers of valid entries")
def test_a_loss_that_masks_its_own_values():
    def build():
        model = keras.Sequential([keras.Input((5, 2)), keras.layers.Dense(3)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0)
        model.compile(keras.optimizers.SGD(0.1), loss)
        return model

    assert_exact(build, {"x": numbers(SAMPLES, 5, 2), "y": np.minimum(sequences(), 2)})


class IgnoringLoss(keras.losses.Loss):
    """Masks its own values, which nothing but its values says."""

    def call(self, y_true, y_pred):
        return keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True, ignore_class=0)


def labels_of_tokens(make_loss):
    def build():
        model = keras.Sequential([keras.Input((5, 2)), keras.layers.Dropout(0.2), keras.layers.Dense(3)])
        model.compile(keras.optimizers.SGD(0.1), make_loss())
        return model

    return build, numbers(SAMPLES, 5, 2), np.minimum(sequences(), 2)


def two_masked_outputs():
    inputs = keras.Input((5,), dtype="int32")
    tokens = keras.layers.Dropout(0.2)(keras.layers.Embedding(6, 3, mask_zero=True)(inputs))
    outputs = [keras.layers.Dense(2, name="each")(tokens), keras.layers.SimpleRNN(2, name="last")(tokens)]
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(0.0), ["mse", "mae"], loss_weights=[0.3, 2.0])
    return model


VALIDATED = {
    **{reduction: lambda reduction=reduction: (
        embedding_model(reduction), sequences(), numbers(SAMPLES, 5, 2),
        np.repeat(weights_with_empty_micro_batches()[:, None], 5, axis=1),
    ) for reduction in REDUCTIONS},
    "ignored class": lambda: labels_of_tokens(
        lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0)
    ),
    "loss of the user": lambda: labels_of_tokens(IgnoringLoss),
    "two outputs": lambda: (two_masked_outputs, sequences(), [numbers(SAMPLES, 5, 2), numbers(SAMPLES, 2)]),
}  # fmt: skip


@pytest.mark.parametrize("case", VALIDATED)
@holds("masks, with unequal numbers of valid entries")
def test_validation_in_micro_batches_is_that_of_plain_batches(case):
    """Weighted by samples alone, as Keras weights batches, micro-batches would give another val_loss."""
    build, *validation = VALIDATED[case]()
    data = {"x": validation[0][:1], "y": keras.tree.map_structure(lambda leaf: leaf[:1], validation[1])}
    plain, *ours = (
        train(build, data, validation_data=tuple(validation), **form).history
        for form in ({}, {"micro_batch_size": 3}, {"batch_size": EFFECTIVE // 2, "accumulation_steps": 2})
    )
    names = [name for name in plain if name.startswith("val_")]
    assert "val_loss" in names
    for name in names:
        np.testing.assert_allclose([history[name] for history in ours], [plain[name]] * 2, rtol=1e-6)


class ExplicitMask(keras.layers.Layer):
    """Sets a mask by hand, as a subclassed model may; the layer says nothing of masks."""

    def call(self, inputs):
        outputs = inputs * 1.0
        set_keras_mask(outputs, inputs[..., 0] > 0)
        return outputs


@holds("masks, with unequal numbers of valid entries")
def test_a_mask_set_by_hand():
    def build():
        model = keras.Sequential([keras.Input((5, 2)), keras.layers.Dense(2), ExplicitMask()])
        model.compile(keras.optimizers.SGD(0.1), "mse")
        return model

    assert_exact(build, {"x": numbers(SAMPLES, 5, 2), "y": numbers(SAMPLES, 5, 2)})


def test_micro_batches_padded_to_different_lengths_count_by_their_tokens():
    """No effective batch could hold these; each value of the loss counts the same all the same."""

    def build():
        model = keras.Sequential([keras.Input((None, 2)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.1), "mse")
        return model

    long, short = numbers(3, 8, 2), numbers(3, 2, 2)
    batches = [(long, long[..., :1]), (short, short[..., :1])]
    joined = train(
        build,
        {"x": (batch for batch in batches)},
        accumulation_steps=2,
        steps_per_epoch=1,
        epochs=1,
        batch_size=None,
    )
    tokens = np.concatenate([long.reshape(-1, 1, 2), short.reshape(-1, 1, 2)])
    flat = train(build, {"x": tokens, "y": tokens[..., :1]}, batch_size=len(tokens), epochs=1)
    assert_same_training(joined, flat)
