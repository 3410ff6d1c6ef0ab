"""With which effective batch should a network learn to find functions by their docstrings, in 16 MiB?

A function's code and its docstring get similar embeddings, texts of different functions do not (an in-batch softmax,
as in CLIP: Radford et al. 2021). The functions are those of Python's standard library and of some installed packages;
whole files are held out. The measure: for how many docstrings is the right function, of 500, the most similar one?

    python experiments/docstrings.py [--trials 3] [--epochs 3] [--memory-budget 16MiB] [--overwrite]

Two searches over the same effective batches: in one the loss is that of the whole effective batch, in two passes; in
the other (`whole_batch_loss=False`) a mean of the losses of micro-batches, as accumulation usually has it.
"""

import ast
import importlib.util
import re
import sysconfig
import zlib
from pathlib import Path

import gallery
import keras
import keras_tuner
import numpy as np
from keras import layers, ops
from matplotlib.figure import Figure

import accumtune

PACKAGES = ("numpy", "scipy", "sklearn", "keras", "mlflow", "matplotlib", "optuna")
WORDS, WIDTH = 4096, 64
LENGTHS = {"code": 48, "docstring": 24}  # in words
POOL, POOLS = 500, 4
MICRO_BATCH_SIZE, ACCUMULATION_STEPS = 16, (1, 4, 16)


def similarities(embeddings):
    return ops.matmul(embeddings[:, 0], ops.transpose(embeddings[:, 1])) / 0.1


def in_batch_softmax(y_true, embeddings):
    """How well the code finds its docstring among all of the batch, and the docstring its code."""
    logits = similarities(embeddings)
    own = ops.arange(ops.shape(logits)[0])
    both = (ops.sparse_categorical_crossentropy(own, one, from_logits=True) for one in (logits, ops.transpose(logits)))
    return ops.mean(sum(both)) / 2


def found(y_true, embeddings):
    """The share of docstrings whose own function is the most similar one of the batch."""
    nearest = ops.argmax(similarities(embeddings), axis=0)
    return ops.mean(ops.cast(nearest == ops.arange(ops.shape(nearest)[0], dtype=nearest.dtype), "float32"))


def build_model(hp):
    embed = layers.Embedding(WORDS, WIDTH)
    inputs = {name: keras.Input((length,), dtype="int32", name=name) for name, length in LENGTHS.items()}
    sides = []
    for words in inputs.values():
        is_word = ops.cast(ops.expand_dims(words != 0, -1), "float32")
        embedded = embed(words) * is_word
        phrases = layers.Conv1D(2 * WIDTH, 3, padding="same", activation="relu")(embedded) * is_word
        mean = ops.sum(embedded, axis=1) / (ops.sum(is_word, axis=1) + 1e-6)
        both = layers.Concatenate()([layers.GlobalMaxPooling1D()(phrases), mean])
        sides.append(ops.normalize(layers.Dense(WIDTH)(both), axis=-1))
    model = keras.Model(inputs, ops.stack(sides, axis=1))
    model.compile(keras.optimizers.Adam(hp.Fixed("learning_rate", 1e-3)), in_batch_softmax, metrics=[found])
    return model


def functions():
    """Returns a dictionary: first paragraph of a docstring -> the function's code and file."""
    folders = [Path(sysconfig.get_path("stdlib"))]
    folders += [Path(spec.origin).parent for spec in map(importlib.util.find_spec, PACKAGES) if spec is not None]
    found = {}
    for file in (file for folder in folders for file in sorted(folder.rglob("*.py"))):
        name = "/".join(file.parts[-3:])
        if "test" in name or (folders[0] in file.parents and "site-packages" in file.parts):
            continue
        try:
            source = file.read_text()
            nodes = list(ast.walk(ast.parse(source)))
        except (SyntaxError, UnicodeDecodeError):  # templates
            continue
        lines = source.splitlines()
        for node in nodes:
            docstring = isinstance(node, ast.FunctionDef) and ast.get_docstring(node)
            if docstring and len(docstring.split()) > 2:
                text = node.body[0]
                code = lines[node.lineno - 1 : text.lineno - 1] + lines[text.end_lineno : node.end_lineno]
                found[docstring.split("\n\n")[0]] = "\n".join(code), name
    return found


def numbers(texts, length):
    """The first words of each text as numbers, by a hash; 0 beyond its end."""
    table = np.zeros((len(texts), length), "int32")
    for row, text in zip(table, texts, strict=True):
        words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", text)[:length]
        row[: len(words)] = [zlib.crc32(word.lower().encode()) % (WORDS - 1) + 1 for word in words]
    return table


def load_data(samples):
    """Returns at most so many pairs to train with, and those of an eighth of the files, which are held out."""
    pairs = sorted(functions().items(), key=lambda pair: zlib.crc32(pair[0].encode()))
    is_held_out = [zlib.crc32(file.encode()) % 8 == 0 for _, (_, file) in pairs]
    for wanted, most in ((False, samples), (True, POOL * POOLS)):
        part = [pair for pair, held in zip(pairs, is_held_out, strict=True) if held == wanted][:most]
        texts = {"code": [code for _, (code, _) in part], "docstring": [docstring for docstring, _ in part]}
        yield {name: numbers(texts[name], length) for name, length in LENGTHS.items()}, np.zeros(len(part))


def quality(name, options, train, val, **arguments):
    """Returns a finished search, and the best share of docstrings found by effective batch."""
    tuner = accumtune.GridSearch(
        build_model,
        objective=keras_tuner.Objective("val_found", "max"),
        seed=7,
        micro_batch_sizes=(MICRO_BATCH_SIZE,),
        accumulation_steps=ACCUMULATION_STEPS,
        learning_rate_scaling="sqrt",
        **gallery.arguments(options, name) | arguments,
    )
    tuner.search(*train, validation_data=val, validation_batch_size=POOL, epochs=options.epochs)
    trained = tuner.record().with_status("completed")
    return tuner, dict(sorted((trial.effective_batch_size, trial.objective_value) for trial in trained))


def main():
    options = gallery.parser(__doc__, trials=3, epochs=3, samples=30_000, memory_budget="16MiB").parse_args()
    train, val = load_data(options.samples)
    print(f"{len(train[1]):,} pairs to train with, {len(val[1]):,} held out")
    tuner, whole = quality("docstrings", options, train, val)
    _, means = quality("docstrings_in_micro_batches", options, train, val, whole_batch_loss=False)
    gallery.conclude(tuner, options, policy="quality", tolerance=0.0)
    print("\neffective batch   the whole batch's loss   a mean of micro-batches' losses")
    for size, share in whole.items():
        print(f"{size:>15}   {share:>22.3f}   {means.get(size, np.nan):>31.3f}")
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for label, curve in (("the whole batch's loss", whole), ("a mean of micro-batches' losses", means)):
        axes.plot(list(map(str, curve)), list(curve.values()), "o-", label=label)
    axes.set(xlabel="effective batch", ylabel=f"docstrings found, among {POOL} functions")
    axes.legend()
    figure.savefig(Path(options.directory) / "docstrings" / "docstrings.png", dpi=110)


if __name__ == "__main__":
    main()
