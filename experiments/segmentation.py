"""What does a U-Net lose if only one to four pictures at a time fit in the budget?

Nothing, if its layers do not couple the samples: this one uses GroupNormalization where U-Nets mostly have
BatchNormalization, which would normalize over one to four pictures. The task is made from data in scikit-learn: find
the strokes of handwritten digits on crops of two photographs.

    python experiments/segmentation.py [--trials 6] [--epochs 6] [--samples 160] [--memory-budget 24MiB]
"""

import gallery  # first: it sets TensorFlow's log level
import keras
import numpy as np
from sklearn.datasets import load_digits, load_sample_images

import accumtune

SIZE = 64  # pixels on a side


def convolutions(x, width, normalization):
    for _ in range(2):
        x = keras.layers.Conv2D(width, 3, padding="same", use_bias=False)(x)
        x = normalization()(x)
        x = keras.layers.ReLU()(x)
    return x


def make_build_model(normalization):
    def build_model(hp):
        width = hp.Choice("width", [8, 16])
        pictures = x = keras.Input((SIZE, SIZE, 3))
        skipped = []
        for level in range(3):
            x = convolutions(x, width * 2**level, normalization)
            skipped.append(x)
            x = keras.layers.MaxPooling2D()(x)
        x = convolutions(x, width * 8, normalization)
        for level in reversed(range(3)):
            x = keras.layers.Conv2DTranspose(width * 2**level, 2, strides=2)(x)
            x = convolutions(keras.layers.Concatenate()([x, skipped[level]]), width * 2**level, normalization)
        model = keras.Model(pictures, keras.layers.Conv2D(1, 1)(x))
        model.compile(
            optimizer=keras.optimizers.Adam(hp.Float("learning_rate", 1e-3, 1e-2, sampling="log")),
            loss=keras.losses.BinaryCrossentropy(from_logits=True),
            metrics=[keras.metrics.BinaryIoU(target_class_ids=[1], threshold=0.0, name="iou")],
        )
        return model

    return build_model


def group_normalization():
    return keras.layers.GroupNormalization(4)


def load_data(samples):
    """Crops of photographs with two to four digits drawn on them, and where the strokes are."""
    random = np.random.default_rng(0)
    photographs = [photograph / 255.0 for photograph in load_sample_images().images]
    digits = load_digits().images / 16.0
    pictures = np.empty((samples + samples // 4, SIZE, SIZE, 3), "float32")
    strokes = np.zeros((*pictures.shape[:3], 1), "float32")
    for picture, mask in zip(pictures, strokes, strict=True):
        photograph = photographs[random.integers(len(photographs))]
        top, left = (random.integers(edge - SIZE) for edge in photograph.shape[:2])
        picture[:] = photograph[top : top + SIZE, left : left + SIZE]
        for _ in range(random.integers(2, 5)):
            ink = np.kron(digits[random.integers(len(digits))], np.ones((3, 3)))[..., None]
            row, column = random.integers(SIZE - len(ink), size=2)
            place = slice(row, row + len(ink)), slice(column, column + len(ink))
            picture[place] = (1 - 0.7 * ink) * picture[place] + 0.7 * ink * random.random(3)
            mask[place] = np.maximum(mask[place], ink > 0.5)
    return pictures[:samples], strokes[:samples], pictures[samples:], strokes[samples:]


def main():
    parser = gallery.parser(__doc__, trials=6, epochs=6, samples=160, memory_budget="24MiB")
    options = parser.parse_args()

    x_train, y_train, x_val, y_val = load_data(options.samples)
    tuner = accumtune.RandomSearch(
        make_build_model(group_normalization),
        objective="val_loss",
        seed=3,
        micro_batch_sizes=(1, 2, 4, 8, 16),
        accumulation_steps=(1, 2, 4),
        **gallery.arguments(options, "segmentation"),
    )
    tuner.search(x_train, y_train, validation_data=(x_val, y_val), epochs=options.epochs)
    config = gallery.conclude(tuner, options)

    trained = [candidate for candidate in tuner.candidates() if candidate.is_trained]
    print(f"\nMicro-batches that were run: {sorted({it.micro_batch_size for it in trained})}")
    print(f"Effective batches that were trained: {sorted({it.effective_batch_size for it in trained})}")
    print(f"Best: {config.effective_batch_size}, in {config.accumulation_steps} steps of {config.micro_batch_size}")


if __name__ == "__main__":
    main()
