"""Which batch should a small convolutional network train with on a device of 8 MiB?

Searches micro-batch size, accumulation steps, learning rate and width on scikit-learn's digits (1,797 pictures of
8 x 8 pixels). The largest micro-batches do not fit in the budget; their effective batches are reached all the same.

    python experiments/digits.py [--trials 12] [--epochs 12] [--memory-budget 8MiB] [--overwrite]

The same command after an interruption goes on where it was.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# TensorFlow has this on where the CPU is new enough. Without, a convolution's workspace is as large as the CPU's cache.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import keras
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import accumtune


def build_model(hp):
    width = hp.Choice("width", [16, 32, 48])
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(width, 3, padding="same", activation="relu"),
            keras.layers.Conv2D(width, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(2 * width, 3, padding="same", activation="relu"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(10),
        ]
    )
    model.compile(
        optimizer=keras.optimizers.Adam(hp.Float("learning_rate", 1e-3, 3e-2, sampling="log")),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def load_data():
    digits = load_digits()
    pictures = (digits.images[..., None] / 16.0).astype("float32")
    return train_test_split(pictures, digits.target, test_size=0.25, random_state=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--memory-budget", default="8MiB")
    parser.add_argument("--directory", default="mlruns/searches")
    parser.add_argument("--project-name", default="digits")
    parser.add_argument("--tracking-uri", default=None)
    parser.add_argument("--config", default="best_config.json", help="where to save the best configuration")
    parser.add_argument("--register-as", default=None, help="a name in MLflow's registry for the best model")
    parser.add_argument("--overwrite", action="store_true")
    options = parser.parse_args()

    x_train, x_val, y_train, y_val = load_data()
    tuner = accumtune.RandomSearch(
        build_model,
        objective="val_loss",
        max_trials=options.trials,
        seed=7,
        memory_budget=options.memory_budget,
        micro_batch_sizes=(16, 32, 64, 128, 256),
        accumulation_steps=(1, 2, 4),
        tracking_uri=options.tracking_uri,
        register_as=options.register_as,
        directory=options.directory,
        project_name=options.project_name,
        overwrite=options.overwrite,
    )
    tuner.search(x_train, y_train, validation_data=(x_val, y_val), epochs=options.epochs)

    print()
    tuner.results_summary()
    config = tuner.get_best_config(policy="quality", tolerance=0.01)
    config.save(options.config)
    print(f"\n{config}\nWhy: {config.reason}")
    print(f"Saved to {options.config}, for accumtune.load_config; experiments/production.py trains with it")
    print(f"\nBrowse the search: {tuner.ui_command}\nthen open {tuner.ui_address}")


if __name__ == "__main__":
    main()
