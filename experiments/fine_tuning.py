"""How much of a pretrained backbone can be fine-tuned within a budget: the head, its last block, or all of it?

Frozen layers need no gradients, no optimizer slots and no accumulator, and layers below the first trained one keep no
activations: so larger micro-batches fit in the budget. A BERT from KerasHub learns to classify docstrings by their
package (numpy, scipy, scikit-learn, Keras, MLflow: all installed with accumtune).

    pip install keras-hub
    python experiments/fine_tuning.py [--trials 6] [--epochs 3] [--samples 768] [--memory-budget 24MiB]
    python experiments/fine_tuning.py --preset bert_small_en_uncased --memory-budget 1GiB

Without `--preset` the backbone is small and has random weights, so that the script runs without a network connection:
its accuracy says nothing about pretrained backbones, but the memory figures are valid for this size.
"""

import functools
import importlib
import inspect
import pkgutil

import gallery  # first: it sets TensorFlow's log level
import keras
import keras_hub
import numpy as np

import accumtune
from accumtune.memory.budget import format_bytes

LENGTH = 96  # tokens of a docstring that are read
SOURCES = ("numpy.linalg", "numpy.ma", "scipy.stats", "scipy.signal", "sklearn", "keras.layers", "keras.ops", "mlflow")
PACKAGES = sorted({source.split(".")[0] for source in SOURCES})


def make_backbone(preset):
    if preset:
        return keras_hub.models.BertBackbone.from_preset(preset)
    return keras_hub.models.BertBackbone(
        vocabulary_size=257, num_layers=4, num_heads=4, hidden_dim=64, intermediate_dim=256, max_sequence_length=LENGTH
    )


def build_model(hp, preset=None):
    backbone = make_backbone(preset)
    trained = hp.Choice("trained", ["head", "last block", "all"])
    blocks = [layer for layer in backbone.layers if isinstance(layer, keras_hub.layers.TransformerEncoder)]
    for layer in backbone.layers:
        layer.trainable = trained == "all" or (trained == "last block" and layer is blocks[-1])
    pooled = backbone(backbone.input)["pooled_output"]
    model = keras.Model(backbone.input, keras.layers.Dense(len(PACKAGES))(pooled))
    model.compile(
        optimizer=keras.optimizers.AdamW(hp.Float("learning_rate", 1e-4, 1e-2, sampling="log")),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def docstrings():
    """(docstring, number of its package) for the functions and classes of the packages, each once."""
    found = {}
    for source in SOURCES:
        module = importlib.import_module(source)
        modules = [module]
        if source == "sklearn":
            names = [info.name for info in pkgutil.iter_modules(module.__path__)]
            public = [name for name in names if not name.startswith("_") and name not in ("conftest", "tests")]
            modules = [importlib.import_module(f"sklearn.{name}") for name in public]
        for one in modules:
            for name in dir(one):
                text = inspect.getdoc(getattr(one, name)) if not name.startswith("_") else None
                if text and len(text) > 40:
                    found.setdefault(text, PACKAGES.index(source.split(".")[0]))
    return list(found.items())


def load_data(samples, preset):
    """Inputs of the backbone and the numbers of the packages, for training and validation."""
    texts, labels = zip(*docstrings(), strict=True)
    order = np.random.default_rng(0).permutation(len(texts))[: samples + samples // 4]
    texts, labels = [texts[index] for index in order], np.array(labels)[order]
    if preset:
        preprocessor = keras_hub.models.BertTextClassifierPreprocessor.from_preset(preset, sequence_length=LENGTH)
        inputs = {name: keras.ops.convert_to_numpy(value) for name, value in preprocessor(texts).items()}
    else:
        tokens = np.zeros((len(texts), LENGTH), "int32")
        for row, text in zip(tokens, texts, strict=True):
            codes = np.frombuffer(text.encode()[:LENGTH], "uint8")
            row[: len(codes)] = codes + 1  # bytes; 0 is padding
        inputs = {"token_ids": tokens, "segment_ids": np.zeros_like(tokens), "padding_mask": tokens != 0}
    head = {name: value[:samples] for name, value in inputs.items()}
    return head, labels[:samples], {name: value[samples:] for name, value in inputs.items()}, labels[samples:]


def print_by_share(candidates):
    """Prints the best loss, and how many docstrings fit at once, for each trained share of the backbone."""
    print(f"\n{'trained':>10} {'best val_loss':>14} {'largest micro-batch':>20} {'its peak':>12}")
    for share in ("head", "last block", "all"):
        tried = [it for it in candidates if it.hyperparameters["trained"] == share]
        if not tried:
            print(f"{share:>10} {'not tried':>14}")
            continue
        largest = max(tried, key=lambda it: it.micro_batch_size)
        best, peak = min(it.objective for it in tried), format_bytes(largest.peak_memory_bytes)
        print(f"{share:>10} {best:>14.4f} {largest.micro_batch_size:>20} {peak:>12}")


def main():
    parser = gallery.parser(__doc__, trials=6, epochs=3, samples=768, memory_budget="24MiB")
    parser.add_argument("--preset", default=None, help="a KerasHub preset of BERT, downloaded once")
    options = parser.parse_args()

    x_train, y_train, x_val, y_val = load_data(options.samples, options.preset)
    tuner = accumtune.RandomSearch(
        functools.partial(build_model, preset=options.preset),
        objective="val_loss",
        seed=2,
        micro_batch_sizes=(4, 8, 16, 32, 64),
        accumulation_steps=(1, 2, 4),
        **gallery.arguments(options, "fine_tuning"),
    )
    tuner.search(x_train, y_train, validation_data=(x_val, y_val), epochs=options.epochs)
    gallery.conclude(tuner, options)
    print_by_share(tuner.candidates())


if __name__ == "__main__":
    main()
