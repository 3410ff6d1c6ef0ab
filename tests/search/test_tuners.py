"""Whole searches, with real processes and real training."""

import json
from dataclasses import replace

import keras
import keras_tuner
import numpy as np
import pytest
from made_tuner import X, Y, make, search
from models import (
    build_correlated,
    build_coupled,
    build_fixed,
    build_nothing,
    build_plain,
    build_renormalized,
    build_subclassed,
    build_uncompiled,
    dense,
)

import accumtune
from accumtune import errors
from accumtune.accumulation import accumulation_of
from accumtune.tracking.journal import Journal, read_search


def test_a_search_trains_different_things_within_the_budget_and_resumes(tmp_path):
    tuner = search(make(tmp_path, max_trials=3))
    assert tuner.directory == tmp_path  # a Path where one was given, as of a stock tuner
    record = tuner.record()
    trials = record.with_status("completed")
    assert len(trials) == 3 and record.status == "finished"
    for trial in trials:
        assert trial.effective_batch_size == trial.micro_batch_size * trial.accumulation_steps
        assert trial.effective_batch_size in (4, 8, 16)
        assert 0 < trial.peak_memory_bytes <= 16 * 2**20
        assert trial.throughput_samples_per_second > 0
        assert [epoch.epoch for epoch in trial.epochs] == [0, 1]
        assert min(epoch.logs["val_loss"] for epoch in trial.epochs) == pytest.approx(trial.objective_value)
    best = tuner.get_best_hyperparameters()[0].values
    assert {"effective_batch_size", "micro_batch_size", "accumulation_steps", "learning_rate"} == set(best)

    model = tuner.get_best_models()[0]
    best_value = min(trial.objective_value for trial in trials)
    assert model.evaluate(X, Y, verbose=0) == pytest.approx(best_value, rel=1e-4)

    config = tuner.get_best_config()
    assert config.hyperparameters == best and config.objective["value"] == pytest.approx(best_value)
    assert config.fit_arguments()["batch_size"] == best["effective_batch_size"]
    assert tuner.pareto_front()
    assert any(not candidate.is_trained for candidate in tuner.candidates())

    # The same script again: nothing is trained twice, and a larger search resumes.
    again = search(make(tmp_path, max_trials=4))
    assert len(again.record().with_status("completed")) == 4
    search(again)  # max_trials is that of the search, not of a call
    assert len(again.record().trials) == 4
    for trial in again.record().trials[:3]:
        assert sum(event["event"] == "started" for event in Journal(trial.folder / "journal.jsonl").events()) == 1


def build_deep(hp):
    """As in Keras Tuner's guide: a width for each layer, asked for where that layer is."""
    widths = [hp.Choice(f"width_{index}", [4, 8]) for index in range(hp.Int("layers", 1, 3))]
    return dense(layers=[keras.layers.Dense(width) for width in widths])


@pytest.mark.parametrize("kind", [accumtune.RandomSearch, pytest.param(accumtune.OptunaSearch, marks=pytest.mark.slow)])
def test_hyperparameters_that_only_some_models_ask_for_are_searched_and_recorded(tmp_path, kind):
    sizes = {"micro_batch_sizes": (4,), "memory_budget": None}
    tuner = search(make(tmp_path, kind, build=build_deep, max_trials=5, **sizes), epochs=1)
    ran = [trial.hyperparameters for trial in tuner.record().with_status("completed")]
    deep = [values for values in ran if values["layers"] == 3]
    assert deep and all(f"width_{index}" in values for values in deep for index in range(3))
    widths = {values["width_1"] for values in ran if "width_1" in values}
    assert widths == {4, 8}
    best = tuner.get_best_config()
    assert set(best.hyperparameters) >= {f"width_{index}" for index in range(best.hyperparameters["layers"])}
    trained = [layer.units for layer in best.build(build_deep).layers[1:-1]]
    assert trained == [best.hyperparameters[f"width_{index}"] for index in range(best.hyperparameters["layers"])]


def build_refused(hp):
    class OwnTrainFunction(keras.Sequential):
        def make_train_function(self, force=False):
            return super().make_train_function(force)

    model = OwnTrainFunction([keras.Input((16,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


class Late(keras_tuner.HyperModel):
    """Asks for hyperparameters where Keras Tuner's guide does: in `fit`, and while the model is called."""

    def build(self, hp):
        class Scaled(keras.Model):
            def __init__(self):
                super().__init__()
                self.dense = keras.layers.Dense(1)

            def call(self, x):
                return self.dense(x) * hp.Choice("scale", [1.0, 2.0])

        model = Scaled()
        model.compile(optimizer="sgd", loss="mse")
        return model

    def fit(self, hp, model, *args, **kwargs):
        return model.fit(*args, epochs=hp.Int("passes", 1, 2), **kwargs)


@pytest.mark.slow
def test_hyperparameters_of_fit_and_of_the_first_call_are_searched_trained_and_recorded(tmp_path):
    sizes = {"micro_batch_sizes": (4,), "accumulation_steps": (4,), "memory_budget": None}
    tuner = make(tmp_path, accumtune.GridSearch, Late(), max_trials=None, **sizes)
    tuner.search(X, Y, validation_data=(X, Y), verbose=0)
    trials = tuner.record().with_status("completed")
    ran = [(trial.hyperparameters["scale"], trial.hyperparameters["passes"]) for trial in trials]
    assert sorted(ran) == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert [len(trial.epochs) for trial in trials] == [passes for _, passes in ran]
    config = tuner.get_best_config()
    assert config.fit_arguments()["epochs"] == config.hyperparameters["passes"]
    # The configuration's epochs and those of `fit` do not get into each other's way.
    assert config.reproduce(Late(), X, Y, validation_data=(X, Y)).holds(peak_tolerance=1.0)


def test_seed_zero_is_a_seed(tmp_path):
    """Keras Tuner takes it for none."""
    tuners = [make(tmp_path, kind, seed=0, project_name=f"{kind.__name__}{number}")
              for kind in (accumtune.RandomSearch, accumtune.OptunaSearch) for number in range(2)]  # fmt: skip
    assert len({tuner.oracle.seed for tuner in tuners}) == 1
    proposals = [tuner.oracle.create_trial("tuner0").hyperparameters.values for tuner in tuners]
    assert proposals[0] == proposals[1] and proposals[2] == proposals[3]
    stock = [keras_tuner.oracles.RandomSearchOracle(objective="val_loss", seed=0) for _ in range(5)]
    assert len({oracle.seed for oracle in stock}) > 1


def test_data_are_read_from_disk_and_do_not_stay_there(tmp_path):
    search(make(tmp_path, max_trials=1))
    assert not (tmp_path / "search" / "payload").exists()
    assert (tmp_path / "search" / "trial_0" / "log.txt").exists()


def test_a_trial_trains_as_plain_keras_would_by_hand(tmp_path):
    """Isolation, memory maps and accumulation change nothing: the same seed gives the same loss."""
    tuner = search(make(tmp_path, build=build_fixed, max_trials=1, micro_batch_sizes=(4,), accumulation_steps=(4,)))
    trial = tuner.record().trials[0]
    assert (trial.micro_batch_size, trial.accumulation_steps) == (4, 4)
    keras.utils.set_random_seed(tuner.oracle.seed)
    history = dense().fit(X, Y, batch_size=16, epochs=2, validation_data=(X, Y), verbose=0).history
    reported = [epoch.logs["val_loss"] for epoch in trial.epochs]
    assert reported == pytest.approx(history["val_loss"], rel=1e-5)


def test_one_effective_batch_is_trained_once_also_where_pairs_are_searched(tmp_path):
    tuner = make(
        tmp_path, accumtune.GridSearch, build_fixed, max_trials=None, search_over="pairs", micro_batch_sizes=(4, 8)
    )
    record = search(tuner).record()
    trained = [trial.effective_batch_size for trial in record.with_status("completed")]
    assert sorted(trained) == [4, 8, 16]
    reused = record.with_status("reused")
    assert len(reused) == 3
    sources = {trial.trial_id: trial for trial in record.with_status("completed")}
    for trial in reused:
        assert sources[trial.reused_from].effective_batch_size == trial.effective_batch_size
        assert trial.objective_value == sources[trial.reused_from].objective_value


@pytest.mark.slow
def test_executions_of_a_trial_are_averaged_and_do_not_add_up_in_memory(tmp_path):
    def build(hp):
        return dense(width=2**15)  # its parameters are most of what it takes

    once = search(make(tmp_path, build=build, max_trials=1, project_name="once")).record().trials[0]
    tuner = make(tmp_path, build=build, max_trials=1, project_name="thrice", executions_per_trial=3)
    (trial,) = search(tuner).record().trials
    assert {epoch.execution for epoch in trial.epochs} == {0, 1, 2} and len(trial.epochs) == 6
    best = [min(e.logs["val_loss"] for e in trial.epochs if e.execution == execution) for execution in range(3)]
    assert trial.objective_value == pytest.approx(np.mean(best), rel=1e-6)
    assert trial.peak_memory_bytes <= 1.2 * once.peak_memory_bytes


def test_a_model_that_cannot_be_tried_without_data_is_tried_with_those_of_the_search(tmp_path):
    tuner = make(tmp_path, build=build_subclassed, max_trials=1)
    assert tuner.search_over == "auto" and "unknown" in tuner.batch_coupled_layers[0]
    search(tuner, epochs=1)
    assert tuner.search_over == "effective_batch_size" and tuner.batch_coupled_layers == []
    assert tuner.record().trials[0].status == "completed"


def test_batch_coupled_models_search_pairs_and_say_so(tmp_path):
    tuner = make(tmp_path, accumtune.GridSearch, build_coupled, max_trials=None, ghost_batch_size=None)
    assert tuner.search_over == "pairs" and tuner.batch_coupled_layers
    search(tuner)
    record = tuner.record()
    pairs = {(trial.micro_batch_size, trial.accumulation_steps) for trial in record.with_status("completed")}
    assert pairs == {(4, 1), (4, 2), (8, 1), (4, 4), (8, 2)}
    assert any("micro-batch" in text for text in record.advice)


def test_losses_over_the_batch_are_searched_over_effective_batches_and_said_to_be_whole(tmp_path):
    tuner = make(tmp_path, accumtune.GridSearch, build_correlated, max_trials=None)
    record = search(tuner).record()
    assert tuner.search_over == "effective_batch_size" and tuner.batch_coupled_layers == []
    trained = record.with_status("completed")
    assert sorted(trial.effective_batch_size for trial in trained) == [4, 8, 16]
    assert record.whole_batch_loss and any("two passes" in text for text in record.advice)
    config = tuner.get_best_config()
    assert config.whole_batch_loss
    model = config.build(build_correlated)
    assert accumulation_of(model).whole_batch_loss is True
    # val_loss is that of 32 samples at a time, whatever the micro-batch: as Keras's own evaluate has it.
    best = tuner.get_best_models()[0]
    best_value = min(trial.objective_value for trial in trained)
    assert best.evaluate(X, Y, batch_size=32, verbose=0) == pytest.approx(best_value, rel=1e-4)
    assert config.reproduce(build_correlated, X, Y, validation_data=(X, Y)).difference <= 1e-6
    # A tenth of a MiB: its peaks differ by more than a tenth from process to process.
    assert config.verify(build_correlated, X, Y, peak_tolerance=1.0).peak_memory_bytes < 2**22


def build_pairs_of_views(hp):
    def in_batch_softmax(y_true, y_pred):
        logits = keras.ops.matmul(y_pred[:, 0], keras.ops.transpose(y_pred[:, 1]))
        partners = keras.ops.arange(keras.ops.shape(logits)[0])
        return keras.losses.sparse_categorical_crossentropy(partners, logits, from_logits=True)

    model = keras.Sequential([keras.Input((2, 8)), keras.layers.Dense(8)])
    model.compile("adam", in_batch_softmax)
    return model


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() == "torch", reason="on a CPU torch counts the pages of the process")
def test_the_loss_of_all_validation_samples_is_in_the_predicted_peak(tmp_path):
    """1,200² pairs take some 10 MiB, a window of 64 samples takes next to nothing."""
    views, nothing = np.random.default_rng(0).normal(size=(1200, 2, 8)).astype("float32"), np.zeros((1200, 1))

    def searched(validation_batch_size, budget):
        sizes = {"micro_batch_sizes": (16,), "accumulation_steps": (4,), "memory_budget": budget}
        tuner = make(tmp_path / budget, build=build_pairs_of_views, max_trials=1, **sizes)
        options = {"validation_batch_size": validation_batch_size, "epochs": 1, "verbose": 0}
        tuner.search(views, nothing, validation_data=(views, nothing), **options)
        (trial,) = tuner.record().trials
        return trial

    trial = searched(1200, "32MiB")
    assert trial.status == "completed" and trial.peak_memory_bytes > 5 * 2**20
    assert trial.predicted_peak_memory_bytes == pytest.approx(trial.peak_memory_bytes, rel=0.1)
    # The negative control: so much is predicted where validation takes 32 at once.
    assert searched(32, "31MiB").predicted_peak_memory_bytes < 2**20
    # It cannot be made to fit by another pair, and says what can.
    with pytest.raises(errors.BudgetTooSmallError, match="smaller validation_batch_size"):
        searched(1200, "4MiB")


def build_sum(hp):
    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(1), keras.layers.Dense(4096)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
    model.compile("sgd", loss)
    return model


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="on a CPU torch counts the pages of the process")
def test_validation_of_a_sum_takes_no_more_than_a_micro_batch(tmp_path):
    """The logits of 512 samples would take 8 MiB."""
    x, y = np.zeros((512, 16), "float32"), np.zeros(512, "int32")
    sizes = {"micro_batch_sizes": (4,), "accumulation_steps": (2,), "memory_budget": "4MiB"}
    tuner = make(tmp_path, build=build_sum, max_trials=1, **sizes)
    tuner.search(x[:8], y[:8], validation_data=(x, y), validation_batch_size=512, epochs=1, verbose=0)
    (trial,) = tuner.record().trials
    assert trial.status == "completed"
    # The weights change by 1e-2 at most, so each sample's loss stays near that of equal chances; 512 make the batch's.
    assert trial.metrics["val_loss"] == pytest.approx(512 * np.log(4096), rel=1e-2)


def test_a_search_may_take_a_mean_of_the_losses_of_micro_batches(tmp_path):
    """Then the micro-batch decides, is searched, and is what the configuration trains with."""
    sizes = {"micro_batch_sizes": (4,), "accumulation_steps": (2,)}
    tuner = make(tmp_path, build=build_correlated, max_trials=1, whole_batch_loss=False, **sizes)
    record = search(tuner, epochs=1).record()
    assert tuner.search_over == "pairs" and "correlation" in tuner.batch_coupled_layers[0]
    assert record.whole_batch_loss is False and any("so micro-batch sizes are searched" in it for it in record.advice)
    config = tuner.get_best_config()
    assert config.whole_batch_loss is False
    model = config.build(build_correlated)
    assert accumulation_of(model).whole_batch_loss is False and accumtune.batch_coupled_layers(model)
    trained = config.reproduce(build_correlated, X, Y, validation_data=(X, Y))
    assert trained.difference <= 1e-6
    whole = replace(config, whole_batch_loss=True).reproduce(build_correlated, X, Y, validation_data=(X, Y))
    assert abs(whole.metrics["loss"] - trained.metrics["loss"]) > 1e-3  # the negative control: another training
    with pytest.raises(errors.SearchDirectoryError, match="whole_batch_loss: False"):
        search(make(tmp_path, build=build_correlated, max_trials=2, **sizes))


def test_batch_normalization_is_searched_in_ghost_batches(tmp_path):
    """One training per effective batch, whatever the micro-batch; the configuration keeps the ghost batch."""
    sizes = {"micro_batch_sizes": (4, 6, 8), "accumulation_steps": (1, 2)}
    tuner = make(tmp_path, accumtune.GridSearch, build_coupled, max_trials=None, **sizes)
    assert (tuner.search_over, tuner.batch_coupled_layers) == ("effective_batch_size", [])
    assert (tuner.ghost_batch_size, tuner.micro_batch_sizes) == (8, (8,))
    search(tuner)
    record = tuner.record()
    pairs = {trial.effective_batch_size: trial.micro_batch_size for trial in record.with_status("completed")}
    assert pairs == {4: 4, 6: 6, 8: 8, 16: 8}
    assert all(trial.hyperparameters["ghost_batch_size"] == 8 for trial in record.trials)
    (said,) = [text for text in record.advice if "ghost batches of 8 samples" in text]
    assert "are one group: 4, 6." in said and "left out: 12." in said
    config = tuner.get_best_config()
    assert config.ghost_batch_size == record.ghost_batch_size == 8
    assert "ghost_batch_size" not in config.own_hyperparameters
    of_model = accumulation_of(config.build(build_coupled)).ghost_batch_size
    assert of_model == min(8, config.effective_batch_size)  # a smaller effective batch is one group
    again = make(tmp_path, accumtune.GridSearch, build_coupled, max_trials=None, **sizes)
    assert (again.ghost_batch_size, again.micro_batch_sizes) == (8, (8,))
    other = make(tmp_path, accumtune.GridSearch, build_coupled, max_trials=None, ghost_batch_size=4, **sizes)
    with pytest.raises(errors.SearchDirectoryError, match="ghost_batch_size: 8 → 4"):
        search(other)


def test_a_ghost_batch_that_does_not_fit_is_smaller_for_the_whole_search(tmp_path, monkeypatch):
    tuner = make(tmp_path, build=build_coupled, micro_batch_sizes=(2, 4, 8))
    assert tuner.ghost_batch_size == 8

    class Costs:
        def profile(self, hyperparameters):
            self.samples = hyperparameters["values"]["ghost_batch_size"]
            return self

        def fits(self, micro_batch_size, accumulation_steps, budget_bytes):
            return micro_batch_size == self.samples <= 4

    monkeypatch.setattr(tuner._processes, "profiler", Costs)
    tuner._space._fit_ghost_batch()
    assert (tuner.ghost_batch_size, tuner.micro_batch_sizes) == (4, (4, 8))
    space = {hp.name: hp for hp in tuner.oracle.get_space().space}
    assert space["ghost_batch_size"].value == 4 and list(space["effective_batch_size"].values) == [2, 4, 8, 16]


def test_a_layer_that_cannot_be_grouped_is_refused_before_the_first_trial(tmp_path):
    """Where a ghost batch was asked for by its number; "auto" searches the pairs."""
    with pytest.raises(errors.ModelError, match="ghost_batch_size with 'mine'.*renorm=True"):
        make(tmp_path, build=build_renormalized, ghost_batch_size=4)
    tuner = make(tmp_path, build=build_renormalized)
    assert (tuner.search_over, tuner.ghost_batch_size) == ("pairs", None)


def test_hyperband_goes_on_from_earlier_weights(tmp_path):
    tuner = make(tmp_path, accumtune.Hyperband, max_epochs=4, factor=2, seed=2)
    search(tuner)
    promoted = [trial for trial in tuner.record().trials if trial.hyperparameters.get("tuner/trial_id")]
    assert promoted
    for trial in promoted:
        source = next(t for t in tuner.record().trials if t.trial_id == trial.hyperparameters["tuner/trial_id"])
        assert source.effective_batch_size == trial.effective_batch_size
        assert trial.epochs[0].epoch == trial.hyperparameters["tuner/initial_epoch"] > 0
        assert trial.epochs[0].logs["loss"] < source.epochs[0].logs["loss"]
    assert all(not name.startswith("tuner/") for name in tuner.get_best_config().hyperparameters)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"memory_budget": "two gigabytes"}, errors.BudgetError, "two gigabytes"),
        ({"memory_budget": -1}, errors.BudgetError, "-1"),
        ({"micro_batch_sizes": (0, 8)}, errors.BatchSizeError, "micro_batch_sizes"),
        ({"accumulation_steps": ()}, errors.BatchSizeError, "accumulation_steps"),
        ({"search_over": "batches"}, errors.BatchSizeError, "search_over"),
        ({"learning_rate_scaling": "cubic"}, errors.BatchSizeError, "learning_rate_scaling"),
        ({"build": build_uncompiled}, errors.UncompiledModelError, "compile"),
        ({"build": build_nothing}, errors.BuildError, "None"),
        ({"build": build_refused}, errors.CustomTrainStepError, "compute_loss"),
        ({"build": None}, errors.SearchError, "hypermodel=None"),
        ({"distribution_strategy": "MirroredStrategy"}, errors.SearchError, "distribution_strategy"),
    ],
)
def test_bad_input_says_what_came_what_was_expected_and_how_to_mend_it(tmp_path, arguments, error, words):
    with pytest.raises(error) as caught:
        make(tmp_path, **arguments)
    assert isinstance(caught.value, errors.AccumtuneError)
    assert words in str(caught.value)
    assert "Expected:" in str(caught.value) and "Fix:" in str(caught.value)


def test_live_pipelines_and_batch_sizes_are_refused_before_anything_runs(tmp_path):
    import tensorflow as tf

    tuner = make(tmp_path)
    with pytest.raises(errors.UnsendableDataError, match="function"):
        tuner.search(tf.data.Dataset.from_tensor_slices((X, Y)).batch(4), validation_data=(X, Y))
    with pytest.raises(errors.SearchError, match="batch_size"):
        tuner.search(X, Y, validation_data=(X, Y), batch_size=32)
    with pytest.raises(errors.SearchError, match="validation_data"):
        tuner.search(X, Y)
    assert not list((tmp_path / "search").glob("trial_*"))


def test_pipelines_from_functions_are_cut_to_the_effective_batch(tmp_path):
    def train():
        import tensorflow as tf

        return tf.data.Dataset.from_tensor_slices((X, Y)).batch(5)

    tuner = make(tmp_path, build=build_fixed, max_trials=1, micro_batch_sizes=(4,), accumulation_steps=(4,))
    tuner.search(train, validation_data=train, epochs=2, verbose=0)
    trial = tuner.record().trials[0]
    updates = [e for e in Journal(trial.folder / "journal.jsonl").events() if e["event"] == "ended"][0]["updates"]
    assert updates == 2 * len(X) // 16
    keras.utils.set_random_seed(tuner.oracle.seed)
    history = dense().fit(X, Y, batch_size=16, epochs=2, shuffle=False, validation_data=(X, Y), verbose=0).history
    assert [epoch.logs["val_loss"] for epoch in trial.epochs] == pytest.approx(history["val_loss"], rel=1e-5)
    # What the data are like is known, so production's pipelines can be told apart.
    config = tuner.get_best_config()
    assert config.data_shapes == {"x": [None, 16], "y": [None, 1]}
    for pipeline in (train(), train().unbatch()):
        assert [len(x) for x, _ in config.dataset(pipeline)] == [16] * 4


def test_a_corrupt_search_directory_is_named_and_nothing_is_lost(tmp_path):
    search(make(tmp_path, max_trials=1))
    # From one of the others, the first would be repaired.
    for name in ("oracle.json", ".oracle.json.previous", "oracle.changes.jsonl"):
        file = tmp_path / "search" / name
        file.write_text(file.read_text()[:40])
    with pytest.raises(errors.SearchDirectoryError, match="oracle.json") as caught:
        make(tmp_path)
    assert "overwrite=True" in str(caught.value)
    assert read_search(tmp_path / "search").with_status("completed")
    assert json.loads(json.dumps(read_search(tmp_path / "search").objective_name)) == "val_loss"
    make(tmp_path, overwrite=True)


@pytest.mark.parametrize("memory_budget", [None, pytest.param("16MiB", marks=pytest.mark.slow)])
def test_a_stock_keras_tuner_accepts_the_hypermodel(tmp_path, memory_budget):
    hypermodel = accumtune.AccumulationHyperModel(
        build_plain, memory_budget=memory_budget, micro_batch_sizes=(4, 8), accumulation_steps=(1, 2)
    )
    tuner = keras_tuner.RandomSearch(
        hypermodel, objective="val_loss", max_trials=2, seed=1, directory=tmp_path, project_name="stock"
    )
    tuner.search(X, Y, validation_data=(X, Y), epochs=1, verbose=0)
    values = tuner.get_best_hyperparameters()[0].values
    assert values["micro_batch_size"] in (4, 8) and values["accumulation_steps"] in (1, 2)
    assert np.isfinite(tuner.oracle.get_best_trials()[0].score)


def build_text_classifier(hp):
    import keras_hub

    keras.utils.set_random_seed(1)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    tokenizer = keras_hub.models.BertTokenizer(vocabulary=words)
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor(tokenizer, sequence_length=6)
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=len(words), num_layers=1, num_heads=1, hidden_dim=4, intermediate_dim=4, max_sequence_length=6,
        dropout=0.0,
    )  # fmt: skip
    model = keras_hub.models.BertTextClassifier(backbone, num_classes=2, preprocessor=preprocessor, dropout=0.0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(hp.Fixed("learning_rate", 0.1)), loss, metrics=["accuracy"])
    return model


@pytest.mark.slow
def test_a_task_of_keras_hub_prepares_its_texts_in_trials(tmp_path):
    """Its `fit` does; nothing of it couples samples, so one dimension is searched."""
    pytest.importorskip("keras_hub")
    pytest.importorskip("tensorflow_text")
    texts, labels = np.array(["good film", "bad film", "bad bad film", "good"] * 8), np.array([1, 0, 0, 1] * 8)
    tuner = make(
        tmp_path, build=build_text_classifier, max_trials=1, micro_batch_sizes=(4,), accumulation_steps=(4,),
        memory_budget=None,
    )  # fmt: skip
    tuner.search(texts, labels, validation_data=(texts, labels), epochs=2, shuffle=False, verbose=0)
    plain = build_text_classifier(keras_tuner.HyperParameters())
    plain.fit(texts, labels, batch_size=16, epochs=2, shuffle=False, verbose=0)
    (trial,) = tuner.record().trials
    assert (trial.status, trial.reason, tuner.batch_coupled_layers) == ("completed", "", [])
    assert trial.objective_value == pytest.approx(plain.evaluate(texts, labels, verbose=0)[0], abs=1e-5)
