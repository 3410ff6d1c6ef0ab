"""Does accumulation help a multilayer perceptron on a table? No, and this shows why.

Its memory is parameters, optimizer slots and gradients: nearly the same for a batch of 1 and of 1024. A smaller
micro-batch saves almost nothing and costs speed. The search still finds the best batch; the table at the end shows what
the pairs for a larger one would need.

    python experiments/tabular.py [--trials 6] [--epochs 6] [--samples 4096] [--memory-budget 192MiB]
"""

import gallery  # first: it sets TensorFlow's log level
import keras
from sklearn.datasets import make_friedman1
from sklearn.model_selection import train_test_split

import accumtune
from accumtune.memory.budget import format_bytes

COLUMNS = 16
EFFECTIVE = 256  # rows per update, in the table at the end


def build_model(hp):
    width = hp.Choice("width", [512, 1024])
    layers = [keras.layers.Dense(width, activation="relu") for _ in range(3)]
    model = keras.Sequential([keras.Input((COLUMNS,)), *layers, keras.layers.Dense(1)])
    model.compile(
        optimizer=keras.optimizers.Adam(hp.Float("learning_rate", 1e-4, 1e-2, sampling="log")),
        loss="mse",
        metrics=["mae"],
    )
    return model


def load_data(samples):
    """Friedman's first regression problem: five columns matter, eleven do not; noise of variance 1."""
    x, y = make_friedman1(samples + samples // 4, n_features=COLUMNS, noise=1.0, random_state=0)
    return train_test_split(
        x.astype("float32"), y[:, None].astype("float32"), train_size=samples, random_state=0
    )


def print_costs(profile):
    """Peak memory and speed of pairs that make one effective batch."""
    print(f"\nEffective batch {EFFECTIVE} of the best model, in one step and in several:")
    print(f"{'micro-batch':>11} {'steps':>6} {'peak memory':>12} {'samples/s':>10}")
    rows = {}
    for micro in (256, 64, 16, 4, 1):
        steps = EFFECTIVE // micro
        rows[micro] = profile.predict_peak_memory(micro, steps), profile.predict_throughput(micro, steps)
        print(f"{micro:>11} {steps:>6} {format_bytes(rows[micro][0]):>12} {rows[micro][1]:>10,.0f}")
    return rows


def main():
    parser = gallery.parser(__doc__, trials=6, epochs=6, samples=4096, memory_budget="192MiB")
    options = parser.parse_args()

    x_train, x_val, y_train, y_val = load_data(options.samples)
    tuner = accumtune.BayesianOptimization(
        build_model,
        objective="val_loss",
        seed=1,
        micro_batch_sizes=(16, 64, 256),
        accumulation_steps=(1, 4),
        **gallery.arguments(options, "tabular"),
    )
    tuner.search(x_train, y_train, validation_data=(x_val, y_val), epochs=options.epochs)
    config = gallery.conclude(tuner, options)

    profile = accumtune.profile(
        build_model, x_train, y_train, micro_batch_sizes=(1, 16, 256), hyperparameters=config.hyperparameters
    )
    rows = print_costs(profile)
    (whole_bytes, whole_speed), (small_bytes, small_speed) = rows[256], rows[1]
    change = f"{format_bytes(small_bytes)} instead of {format_bytes(whole_bytes)}"
    slower = f"trains {whole_speed / small_speed:.0f} times slower"
    if small_bytes > 0.9 * whole_bytes:
        print(f"Accumulation does not help here: one row at a time needs {change}, and {slower}.")
    else:
        print(f"Here accumulation helps: one row at a time needs {change}, but {slower}.")


if __name__ == "__main__":
    main()
