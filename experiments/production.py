"""A training job that uses the configuration of a search, later and perhaps on another machine.

    python experiments/production.py models:/digits@best      # the registry's best, or best_config.json, runs:/...
        [--epochs 20] [--module digits] [--job production] [--model production/digits.keras]

It verifies the configuration on this machine, trains, logs to the search's MLflow experiment, and saves a plain Keras
model. If it is killed and started again, it resumes after the last complete epoch and reaches the same weights: the
data and random numbers of an epoch depend only on the seed and the epoch's number. `--module` names the file with
`build_model(hp)` and `load_data()`.
"""

import argparse
import importlib
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import mlflow
import numpy as np

import accumtune

DEFAULT_TRACKING_URI = "sqlite:///mlruns/mlflow.db"


class EpochOrder(keras.utils.PyDataset):
    """Batches in an order that depends only on the seed and the epoch."""

    def __init__(self, x, y, batch_size, seed):
        super().__init__()
        self._x, self._y, self._batch_size, self._seed = x, y, batch_size, seed
        self.start_epoch(0)

    def start_epoch(self, epoch):
        self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._y))

    def __len__(self):
        return -(-len(self._y) // self._batch_size)

    def __getitem__(self, index):
        rows = self._order[index * self._batch_size : (index + 1) * self._batch_size]
        return self._x[rows], self._y[rows]


class SeedByEpoch(keras.callbacks.Callback):
    """Sets the order of the samples, and the seeds of dropout and augmentation, at each epoch: no backup has them."""

    def __init__(self, data, seed):
        super().__init__()
        self._data, self._seed = data, seed

    def on_epoch_begin(self, epoch, logs=None):
        self._data.start_epoch(epoch)
        states = [variable for variable in self.model.variables if variable.path.endswith("seed_generator_state")]
        for number, state in enumerate(states):
            state.assign(np.random.SeedSequence([self._seed, number, epoch]).generate_state(2))


class WholeBackup(keras.callbacks.BackupAndRestore):
    """Saves weights and epoch in a folder that is renamed when both are complete.

    Keras writes two files one after the other: killed in between, it would train an epoch twice, or read half a file.
    """

    def __init__(self, folder):
        self._folder = Path(folder)
        super().__init__(str(self._folder / "writing"), delete_checkpoint=False)

    def on_train_begin(self, logs=None):
        shutil.rmtree(self.backup_dir, ignore_errors=True)
        for newest in sorted(self._folder.glob("epoch-*"))[-1:]:
            shutil.copytree(newest, self.backup_dir)
        super().on_train_begin(logs)

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        os.replace(self.backup_dir, self._folder / f"epoch-{epoch + 1:06d}")
        for older in sorted(self._folder.glob("epoch-*"))[:-1]:
            shutil.rmtree(older)


class LogToMlflow(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        mlflow.log_metrics({name: float(value) for name, value in logs.items()}, step=epoch)


def load_config(options):
    """Loads the job's own copy if it was started before: the registry's alias may point to another model by now."""
    copy = Path(options.job) / "best_config.json"
    if copy.exists():
        print("Resuming the job that was started before.")
        return accumtune.load_config(copy)
    config = accumtune.load_config(options.config, tracking_uri=options.tracking_uri)
    config.save(copy)
    return config


def start_run(config, options):
    """In the search's experiment; the same run after a kill."""
    # Not the address in the configuration: its author's server would get this machine's token.
    uri = options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri or DEFAULT_TRACKING_URI)
    if not uri:
        Path("mlruns").mkdir(exist_ok=True)
    mlflow.set_experiment(config.source.get("experiment") or "production")
    remembered = Path(options.job) / "run_id"
    if remembered.exists():
        return mlflow.start_run(run_id=remembered.read_text())
    searched = {key: str(config.source.get(key)) for key in ("run_id", "trial_id")}
    tags = {"accumtune.kind": "production", **{f"accumtune.source_{key}": value for key, value in searched.items()}}
    run = mlflow.start_run(run_name="production", tags=tags)
    remembered.write_text(run.info.run_id)
    mlflow.log_params({**config.hyperparameters, "epochs": options.epochs})
    mlflow.log_artifact(str(Path(options.job) / "best_config.json"))
    return run


def train(config, module, options):
    seed = config.seed or 0
    x_train, x_val, y_train, y_val = module.load_data()
    keras.utils.set_random_seed(seed)
    model = config.build(module.build_model)
    if options.warm_start:
        config.load_weights(model, tracking_uri=options.tracking_uri)
    data = EpochOrder(x_train, y_train, config.effective_batch_size, seed)
    # EpochOrder has shuffled the samples.
    arguments = config.fit_arguments(epochs=options.epochs, shuffle=False)
    # A loss over the batch is comparable at one size alone: that of the search, which the configuration has.
    size = arguments.setdefault("validation_batch_size", config.micro_batch_size)
    model.fit(
        data,
        validation_data=(x_val, y_val),
        # Logged before it is backed up: killed in between, an epoch is logged twice, not never.
        callbacks=[SeedByEpoch(data, seed), LogToMlflow(), WholeBackup(options.job)],
        verbose=2,
        **arguments,
    )
    return model, model.evaluate(x_val, y_val, batch_size=size, verbose=0, return_dict=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", default="best_config.json", help="a path, runs:/... or models:/name@best")
    parser.add_argument("--tracking-uri", default=None, help="MLflow's; default: the search's")
    parser.add_argument("--module", default="digits", help="the module with build_model(hp) and load_data()")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--job", default="production/job", help="a folder for what a restart needs; removed at the end")
    parser.add_argument("--model", default="production/digits.keras", help="where to save the trained model")
    parser.add_argument("--warm-start", action="store_true", help="begin with the best trial's weights")
    parser.add_argument("--peak-tolerance", type=float, default=0.25, help="relative to the peak memory")
    parser.add_argument("--no-verify", action="store_true")
    options = parser.parse_args()

    sys.path.append(os.getcwd())
    module = importlib.import_module(options.module)
    config = load_config(options)
    print(config)
    if not options.no_verify:
        x_train, _, y_train, _ = module.load_data()
        print(config.verify(module.build_model, x_train, y_train, peak_tolerance=options.peak_tolerance))
    with start_run(config, options):
        model, metrics = train(config, module, options)
        Path(options.model).parent.mkdir(parents=True, exist_ok=True)
        model.save(options.model)
        mlflow.log_artifact(options.model, "model")
    shutil.rmtree(options.job)
    told = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    print(f"{told}; saved to {options.model}, a plain Keras model")


if __name__ == "__main__":
    main()
