"""What `memory_prediction.py` trains: the architectures, their budgets and their data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """What is trained, on samples of what shape, under which budget."""

    build: Callable[[], Any]
    sample_shape: tuple[int, ...]
    vocabulary: int  # 0: float inputs
    budget_mib: int


def convolutions() -> Any:
    import keras
    from keras import layers

    return keras.Sequential(
        [
            layers.Input((32, 32, 3)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ]
    )


def perceptron() -> Any:
    import keras
    from keras import layers

    hidden = [layers.Dense(2048, activation="relu") for _ in range(4)]
    return keras.Sequential([layers.Input((784,)), *hidden, layers.Dense(10, activation="softmax")])


def transformer(length: int = 128, width: int = 64, blocks: int = 4) -> Any:
    import keras
    from keras import layers

    inputs = layers.Input((length,), dtype="int32")
    hidden = layers.Embedding(1000, width)(inputs)
    for _ in range(blocks):
        attended = layers.MultiHeadAttention(4, width // 4)(hidden, hidden)
        hidden = layers.LayerNormalization()(layers.Add()([hidden, attended]))
        widened = layers.Dense(width)(layers.Dense(4 * width, activation="gelu")(hidden))
        hidden = layers.LayerNormalization()(layers.Add()([hidden, widened]))
    return keras.Model(inputs, layers.Dense(10, activation="softmax")(layers.GlobalAveragePooling1D()(hidden)))


def long_attention() -> Any:
    return transformer(length=512, width=32, blocks=2)


def recurrent(layer: str) -> Any:
    import keras
    from keras import layers

    first, second = (getattr(layers, layer)(256, return_sequences=again) for again in (True, False))
    return keras.Sequential(
        [layers.Input((64,), dtype="int32"), layers.Embedding(5000, 128), first, second,
         layers.Dense(10, activation="softmax")]
    )  # fmt: skip


def u_net() -> Any:
    import keras
    from keras import layers

    def convolve(x: Any, filters: int) -> Any:
        for _ in range(2):
            x = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
        return x

    inputs = layers.Input((64, 64, 3))
    hidden, skipped = inputs, []
    for filters in (16, 32, 64):
        hidden = convolve(hidden, filters)
        skipped.append(hidden)
        hidden = layers.MaxPooling2D()(hidden)
    hidden = convolve(hidden, 128)
    for filters, kept in zip((64, 32, 16), reversed(skipped), strict=True):
        hidden = layers.Conv2DTranspose(filters, 2, strides=2)(hidden)
        hidden = convolve(layers.Concatenate()([hidden, kept]), filters)
    outputs = layers.Dense(10, activation="softmax")(layers.GlobalAveragePooling2D()(hidden))
    return keras.Model(inputs, outputs)


def autoencoder() -> Any:
    import keras
    from keras import layers

    same = {"strides": 2, "padding": "same", "activation": "relu"}
    return keras.Sequential(
        [layers.Input((64, 64, 3)), layers.Conv2D(32, 3, **same), layers.Conv2D(64, 3, **same), layers.Flatten(),
         layers.Dense(64), layers.Dense(16 * 16 * 64, activation="relu"), layers.Reshape((16, 16, 64)),
         layers.Conv2DTranspose(32, 3, **same), layers.Conv2DTranspose(3, 3, **same),
         layers.GlobalAveragePooling2D(), layers.Dense(10, activation="softmax")]
    )  # fmt: skip


def embedding() -> Any:
    import keras
    from keras import layers

    return keras.Sequential(
        [layers.Input((64,), dtype="int32"), layers.Embedding(50000, 64), layers.Dense(512, activation="gelu"),
         layers.GlobalAveragePooling1D(), layers.Dense(10, activation="softmax")]
    )  # fmt: skip


def bert() -> Any:
    """A KerasHub backbone with random weights."""
    import keras
    import keras_hub

    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=2000, num_layers=3, num_heads=4, hidden_dim=128, intermediate_dim=512, max_sequence_length=128
    )
    tokens = keras.layers.Input((128,), dtype="int32")
    ones = keras.ops.ones_like(tokens)
    inputs = {"token_ids": tokens, "segment_ids": keras.ops.zeros_like(tokens), "padding_mask": ones}
    pooled = backbone(inputs)["pooled_output"]
    return keras.Model(tokens, keras.layers.Dense(10, activation="softmax")(pooled))


def application(name: str) -> Any:
    import keras

    return getattr(keras.applications, name)(weights=None, input_shape=(64, 64, 3), classes=10)


IMAGE = (64, 64, 3)
# The cheap ones first.
ARCHITECTURES = {
    "MLP": Architecture(perceptron, (784,), 0, 300),
    "CNN": Architecture(convolutions, (32, 32, 3), 0, 120),
    "autoencoder": Architecture(autoencoder, IMAGE, 0, 120),
    "embedding": Architecture(embedding, (64,), 50000, 120),
    "U-Net": Architecture(u_net, IMAGE, 0, 160),
    "transformer": Architecture(transformer, (128,), 1000, 200),
    "GRU": Architecture(lambda: recurrent("GRU"), (64,), 5000, 80),
    "LSTM": Architecture(lambda: recurrent("LSTM"), (64,), 5000, 80),
    "attention over 512": Architecture(long_attention, (512,), 1000, 300),
    "BERT (KerasHub)": Architecture(bert, (128,), 2000, 200),
    "MobileNetV2": Architecture(lambda: application("MobileNetV2"), IMAGE, 0, 200),
    "ResNet50": Architecture(lambda: application("ResNet50"), IMAGE, 0, 560),
    "EfficientNetB0": Architecture(lambda: application("EfficientNetB0"), IMAGE, 0, 250),
    "DenseNet121": Architecture(lambda: application("DenseNet121"), IMAGE, 0, 300),
}


def build_model(name: str, hp: Any = None) -> Any:
    model = ARCHITECTURES[name].build()
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def data(name: str, count: int) -> tuple[Any, Any]:
    import numpy as np

    generator, architecture = np.random.default_rng(0), ARCHITECTURES[name]
    shape = (count, *architecture.sample_shape)
    if architecture.vocabulary:
        x = generator.integers(0, architecture.vocabulary, shape, dtype="int32")
    else:
        x = generator.random(shape, dtype="float32")
    return x, generator.integers(0, 10, count)
