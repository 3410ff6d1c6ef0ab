"""Trains with the configuration that a search has found, as a training job would.

    python experiments/production.py [best_config.json | runs:/RUN_ID/best_config.json] [--epochs 20]

Needs only the configuration and the module with the build function: nothing of the search.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
from digits import build_model, load_data

import accumtune


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", default="best_config.json", help="a path or a runs:/ address")
    parser.add_argument("--tracking-uri", default=None, help="MLflow's, for a runs:/ address")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--model", default="production/digits.keras", help="where to save the trained model")
    options = parser.parse_args()

    config = accumtune.load_config(options.config, tracking_uri=options.tracking_uri)
    print(config)
    x_train, x_val, y_train, y_val = load_data()
    keras.utils.set_random_seed(0)
    model = config.build(build_model)
    arguments = {**config.fit_arguments(), "epochs": options.epochs}
    model.fit(x_train, y_train, validation_data=(x_val, y_val), verbose=2, **arguments)
    loss, accuracy = model.evaluate(x_val, y_val, verbose=0)
    os.makedirs(os.path.dirname(options.model) or ".", exist_ok=True)
    model.save(options.model)
    print(f"val_loss {loss:.4f}, accuracy {accuracy:.3f}; saved to {options.model}, a plain Keras model")


if __name__ == "__main__":
    main()
