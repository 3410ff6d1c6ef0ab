"""With which effective batch should a network learn digits without labels, on a device of 8 MiB?

It sees each handwritten digit in two versions, randomly turned and stretched, and learns features that are equal for
both versions and not correlated with each other ("Barlow Twins": Zbontar et al. 2021). The loss is a correlation over
the batch, which a few dozen digits estimate badly for 64 features. More do not fit in 8 MiB.

    python experiments/digits.py [--trials 12] [--epochs 6] [--memory-budget 8MiB] [--overwrite]

Run the same command again to resume an interrupted search. Without a budget: `--memory-budget none`.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# TensorFlow has this on where the CPU is new enough. Without, a convolution's workspace is as large as the CPU's cache.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import keras
import numpy as np
from keras import layers, ops
from scipy import ndimage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import accumtune

FEATURES = 64
# What all trials are compared by: the loss over all pictures that are held out, at once.
VALIDATION_BATCH_SIZE = 450
# The paper's 0.005 is for 8,192 features: with fewer, each pair of them counts for more.
WEIGHT_OF_PAIRS = 0.005 * 8192 / FEATURES


def barlow_twins(y_true, features):
    """Returns how far the correlations of both versions' features, over the batch, are from the identity matrix."""
    centred = features - ops.mean(features, axis=0)
    normalized = centred / (ops.std(features, axis=0) + 1e-3)
    first, second = normalized[:, 0], normalized[:, 1]
    correlations = ops.matmul(ops.transpose(first), second) / ops.cast(ops.shape(first)[0], first.dtype)
    is_same = ops.eye(FEATURES)
    return ops.sum((is_same + WEIGHT_OF_PAIRS * (1 - is_same)) * (correlations - is_same) ** 2) / FEATURES


def build_model(hp):
    encoder = keras.Sequential(
        [
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.Conv2D(16, 3, strides=2, padding="same", activation="relu"),
            layers.Conv2D(32, 3, strides=2, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dense(FEATURES),
        ]
    )
    versions = keras.Input((2, 16, 16, 1))
    model = keras.Model(versions, ops.stack([encoder(versions[:, 0]), encoder(versions[:, 1])], axis=1))
    model.compile(keras.optimizers.Adam(hp.Choice("learning_rate", [1e-3, 3e-3])), barlow_twins)
    return model


def two_versions(pictures, random):
    """Returns each picture twice, randomly turned, stretched and moved, with noise."""
    centre = np.array([7.5, 7.5])
    versions = np.empty((len(pictures), 2, 16, 16, 1), "float32")
    for picture, both in zip(pictures, versions, strict=True):
        for version in both:
            angle, scale = random.uniform(-0.26, 0.26), random.uniform(0.9, 1.1)
            turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            moved = ndimage.affine_transform(picture, turn, centre - turn @ centre + random.uniform(-1, 1, 2), order=1)
            version[..., 0] = moved * random.uniform(0.9, 1.1) + random.normal(0, 0.05, moved.shape)
    return versions


def load_data():
    digits = load_digits()
    pictures = ndimage.zoom(digits.images / 16.0, (1, 2, 2), order=1)
    train, val, y_train, y_val = train_test_split(pictures, digits.target, test_size=0.25, random_state=0)
    random = np.random.default_rng(0)
    x_train = two_versions(np.repeat(train, 4, axis=0), random)
    return x_train, two_versions(val, random), np.repeat(y_train, 4), y_val


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--memory-budget", default="8MiB", help='"none" for no limit')
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--directory", default="mlruns/searches")
    parser.add_argument("--project-name", default="digits")
    parser.add_argument("--tracking-uri", default=None)
    parser.add_argument("--config", default="best_config.json", help="where to save the best configuration")
    parser.add_argument("--register-as", default=None, help="a name in MLflow's registry for the best model")
    parser.add_argument("--overwrite", action="store_true")
    options = parser.parse_args()

    x_train, x_val, y_train, y_val = load_data()
    tuner = accumtune.GridSearch(
        build_model,
        objective="val_loss",
        max_trials=options.trials,
        seed=options.seed,
        memory_budget=None if options.memory_budget == "none" else options.memory_budget,
        micro_batch_sizes=(32, 64, 128, 256, 512),
        accumulation_steps=(1, 2),
        tracking_uri=options.tracking_uri,
        register_as=options.register_as,
        directory=options.directory,
        project_name=options.project_name,
        overwrite=options.overwrite,
    )
    held_out = {"validation_data": (x_val, y_val), "validation_batch_size": VALIDATION_BATCH_SIZE}
    tuner.search(x_train, y_train, **held_out, epochs=options.epochs)

    print()
    tuner.results_summary()
    config = tuner.get_best_config(policy="quality", tolerance=0.01)
    config.save(options.config)
    print(f"\n{config}\nWhy: {config.reason}")
    print(f"Saved to {options.config}, for accumtune.load_config; experiments/production.py trains with it")
    print(f"\nBrowse the search: {tuner.ui_command}\nthen open {tuner.ui_address}")


if __name__ == "__main__":
    main()
