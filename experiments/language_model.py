"""Which batch should a small transformer train with, if only a few sequences fit at a time?

A byte-level language model on the source of Python's own standard library. Sequences are paragraphs of code, padded
to one length. The padding is masked: the loss is a mean over the other bytes, of which micro-batches have different
numbers. accumtune weights each micro-batch by that number; a mean of micro-batch means would favour short paragraphs.

    python experiments/language_model.py [--trials 6] [--epochs 2] [--samples 1536] [--memory-budget 24MiB]
"""

import math
import os
from pathlib import Path

import gallery  # first: it sets TensorFlow's log level
import keras
import numpy as np

import accumtune

LENGTH = 128  # bytes that are predicted per paragraph
VOCABULARY = 256  # byte values; 0 does not occur in source and stands for padding


class Positions(keras.layers.Layer):
    """Adds a learned vector for each position."""

    supports_masking = True

    def build(self, shape):
        self.vectors = self.add_weight(shape=shape[1:], initializer="random_normal", name="vectors")

    def call(self, x):
        return x + self.vectors


def block(x, width, heads):
    """A pre-norm transformer block."""
    attended = keras.layers.LayerNormalization()(x)
    attended = keras.layers.MultiHeadAttention(heads, width // heads)(attended, attended, use_causal_mask=True)
    x = keras.layers.Add()([x, attended])
    fed = keras.layers.LayerNormalization()(x)
    fed = keras.layers.Dense(4 * width, activation="gelu")(fed)
    return keras.layers.Add()([x, keras.layers.Dense(width)(fed)])


def build_model(hp):
    width = hp.Choice("width", [32, 64])
    tokens = keras.Input((LENGTH,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, width, mask_zero=True)(tokens)
    x = Positions()(x)
    for _ in range(2):
        x = block(x, width, heads=4)
    logits = keras.layers.Dense(VOCABULARY)(keras.layers.LayerNormalization()(x))
    model = keras.Model(tokens, logits)
    model.compile(
        optimizer=keras.optimizers.AdamW(hp.Float("learning_rate", 1e-3, 1e-2, sampling="log"), clipnorm=1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def load_data(samples):
    """Paragraphs of the standard library as (inputs, targets), each target one byte further on."""
    wanted = samples + samples // 4
    paragraphs = []
    for file in sorted(Path(os.__file__).parent.glob("*.py")):
        paragraphs += [text for text in file.read_bytes().split(b"\n\n") if len(text) > 16]
    chosen = np.random.default_rng(0).permutation(len(paragraphs))[:wanted]
    codes = np.zeros((len(chosen), LENGTH + 1), "int32")
    for row, index in enumerate(chosen):
        text = paragraphs[index][: LENGTH + 1]
        codes[row, : len(text)] = np.frombuffer(text, "uint8")
    inputs, targets = codes[:, :-1], codes[:, 1:]
    # The byte after the last one is padding too: an input that has no target does not count.
    inputs = np.where(targets == 0, 0, inputs)
    return inputs[:samples], targets[:samples], inputs[samples:], targets[samples:]


def main():
    parser = gallery.parser(__doc__, trials=6, epochs=2, samples=1536, memory_budget="24MiB")
    options = parser.parse_args()

    x_train, y_train, x_val, y_val = load_data(options.samples)
    real = (y_train != 0).sum(axis=1)
    share = real.sum() / y_train.size
    print(f"{len(x_train)} paragraphs of {real.min()} to {real.max()} bytes, {1 - share:.0%} of the input is padding")
    tuner = accumtune.BayesianOptimization(
        build_model,
        objective="val_loss",
        seed=1,
        micro_batch_sizes=(2, 4, 8, 16, 32, 64),
        accumulation_steps=(1, 2, 4),
        **gallery.arguments(options, "language_model"),
    )
    tuner.search(x_train, y_train, validation_data=(x_val, y_val), epochs=options.epochs)
    config = gallery.conclude(tuner, options)

    bits = config.objective["value"] / math.log(2)
    print(f"\n{bits:.2f} bits per byte (8 before training), effective batch {config.effective_batch_size}.")
    largest = max(candidate.micro_batch_size for candidate in tuner.candidates())
    if config.effective_batch_size > largest:
        print(f"One pass of it does not fit in {options.memory_budget}: {largest} sequences are the most that do.")
    else:
        print(f"{largest} sequences fit in one pass: this batch did not need accumulation, larger ones would.")


if __name__ == "__main__":
    main()
