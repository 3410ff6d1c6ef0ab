"""With BatchNormalization in the model, how many trainings does it take to find the best effective batch?

BatchNormalization normalizes with the statistics of a micro-batch, so 2 x 16 and 32 x 1 are not the same training
although both make one update per 32 pictures. In ghost batches, groups of one size whatever the micro-batch, they are
the same: one training per effective batch is enough. This search of Fashion-MNIST runs either way.

    python experiments/fashion_mnist.py [--epochs 3] [--samples 4096]
    python experiments/fashion_mnist.py --ghost-batch-size none
    python experiments/fashion_mnist.py --no-normalization

With `none` each micro-batch is normalized by itself, so the search covers all pairs. `--no-normalization` removes the
BatchNormalization layers.
"""

import gallery  # first: it sets TensorFlow's log level
import keras

import accumtune


def make_build_model(normalizes):
    def build_model(hp):
        layers = [keras.Input((28, 28, 1))]
        for width in (16, 32):
            layers.append(keras.layers.Conv2D(width, 3, padding="same", use_bias=not normalizes))
            if normalizes:
                # A momentum for the few updates of a short search.
                layers.append(keras.layers.BatchNormalization(momentum=0.9))
            layers += [keras.layers.ReLU(), keras.layers.MaxPooling2D()]
        model = keras.Sequential([*layers, keras.layers.Flatten(), keras.layers.Dense(10)])
        model.compile(
            optimizer=keras.optimizers.Adam(1e-3),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        return model

    return build_model


def load_data(samples):
    """The first pictures of Fashion-MNIST; Keras downloads it once, or finds it in KERAS_HOME."""
    (x_train, y_train), (x_val, y_val) = keras.datasets.fashion_mnist.load_data()

    def prepared(pictures):
        return (pictures[..., None] / 255.0).astype("float32")

    x_val, y_val = x_val[: samples // 2], y_val[: samples // 2]
    return prepared(x_train[:samples]), y_train[:samples], prepared(x_val), y_val


def print_grid(candidates, objective):
    """The objective of every trained pair: one row per effective batch, one column per micro-batch."""
    trained = {(it.effective_batch_size, it.micro_batch_size): it for it in candidates if it.is_trained}
    micro_batches = sorted({micro for _, micro in trained})
    print(f"\n{objective} by micro-batch size")
    print(f"{'effective':>9} " + "".join(f"{micro:>9}" for micro in micro_batches))
    for effective in sorted({effective for effective, _ in trained}):
        cells = [trained.get((effective, micro)) for micro in micro_batches]
        print(f"{effective:>9} " + "".join(f"{'':>9}" if it is None else f"{it.objective:>9.4f}" for it in cells))


def main():
    parser = gallery.parser(__doc__, trials=11, epochs=3, samples=4096, memory_budget="24MiB")
    parser.add_argument("--no-normalization", action="store_true", help="a model without BatchNormalization")
    parser.add_argument("--ghost-batch-size", default="8", help='a number of pictures, "auto", or "none"')
    options = parser.parse_args()
    asked = options.ghost_batch_size
    ghost = int(asked) if asked.isdigit() else {"auto": "auto", "none": None}[asked]
    name = "fashion_mnist_plain" if options.no_normalization else f"fashion_mnist_{asked}"

    x_train, y_train, x_val, y_val = load_data(options.samples)
    tuner = accumtune.GridSearch(
        make_build_model(not options.no_normalization),
        objective="val_loss",
        seed=1,
        micro_batch_sizes=(2, 8, 32),
        accumulation_steps=(4, 16),  # effective batches 8, 32, 128, 512
        ghost_batch_size=ghost,
        learning_rate_scaling="sqrt",  # so that the effective batches can be compared at one learning rate
        **gallery.arguments(options, name),
    )
    tuner.search(x_train, y_train, validation_data=(x_val, y_val), epochs=options.epochs)
    config = gallery.conclude(tuner, options)
    print_grid(tuner.candidates(), "val_loss")
    trials = {status: len(tuner.record().with_status(status)) for status in ("completed", "reused", "failed")}
    print("Trainings: {completed}, reused: {reused}, failed: {failed}.".format(**trials))
    if tuner.batch_coupled_layers:
        print("Compare along a row: the same effective batch, normalized in smaller and larger groups.")
    else:
        print(f"Ghost batch: {config.ghost_batch_size}. One entry per row: other micro-batches are the same training.")


if __name__ == "__main__":
    main()
