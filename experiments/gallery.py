"""The options of the gallery's searches and the lines that they end with. `digits.py` does not use it."""

import argparse
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# TensorFlow has this on where the CPU is new enough. Without, a convolution's workspace is as large as the CPU's cache.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")


def parser(doc, *, trials, epochs, samples, memory_budget):
    """Returns a parser for the options of a search, with its defaults; a script may add its own.

    Args:
        doc: the script's docstring; its first line is the question.
        trials, epochs, samples, memory_budget: defaults. Smaller ones give a shorter search and a worse result.
    """
    options = argparse.ArgumentParser(description=doc.splitlines()[0])
    options.add_argument("--trials", type=int, default=trials)
    options.add_argument("--epochs", type=int, default=epochs)
    options.add_argument("--samples", type=int, default=samples, help="samples to train with")
    options.add_argument("--memory-budget", default=memory_budget)
    options.add_argument("--directory", default="mlruns/searches")
    options.add_argument("--tracking-uri", default=None)
    options.add_argument("--config", default=None, help="where to save the best configuration")
    options.add_argument("--overwrite", action="store_true", help="delete the earlier search instead of resuming it")
    return options


def arguments(options, project_name):
    """Returns the tuner's arguments from the command line."""
    return {
        "max_trials": options.trials,
        "memory_budget": options.memory_budget,
        "tracking_uri": options.tracking_uri,
        "directory": options.directory,
        "project_name": project_name,
        "overwrite": options.overwrite,
    }


def conclude(tuner, options, **choice):
    """Prints the results and the best configuration, and saves it.

    Args:
        **choice: `policy` and `tolerance` of `get_best_config`.
    """
    print()
    tuner.results_summary()
    config = tuner.get_best_config(**choice)
    print(f"\n{config}\nWhy: {config.reason}")
    path = Path(options.config or Path(options.directory) / tuner.project_name / "best_config.json")
    config.save(path)
    print(f"Saved to {path}")
    return config
