"""Searches that pause trials and go on with the most promising ones."""

import pytest
from made_tuner import make, search
from models import dense

import accumtune
from accumtune.errors import SearchError
from accumtune.tracking.journal import Journal

EPOCHS = 4


def build(hp):
    rate = hp.Choice("learning_rate", [1e-4, 1e-3, 1e-2, 1e-1, 1.0], ordered=True)
    return dense(learning_rate=rate)


def freezing(tmp_path, trials, build=build, **kwargs):
    return make(
        tmp_path, accumtune.OptunaSearch, build, max_trials=trials, pruner="freeze-thaw", memory_budget=None, **kwargs
    )


def started(trial):
    return sum(event["event"] == "started" for event in Journal(trial.folder / "journal.jsonl").events())


def trained(tuner):
    return sum(len(trial.epochs) for trial in tuner.record().trials)


@pytest.mark.slow
def test_trials_share_the_epochs_of_whole_trainings_and_go_on_exactly(tmp_path):
    tuner = search(freezing(tmp_path, 2), epochs=EPOCHS)
    trials = tuner.record().trials
    assert {trial.status for trial in trials} == {"completed"} and len(trials) > 2
    assert 2 * EPOCHS <= trained(tuner) < 3 * EPOCHS
    paused = [trial for trial in trials if trial.reason.startswith(f"paused after epoch {len(trial.epochs)}")]
    assert paused and all(len(trial.epochs) == EPOCHS for trial in trials if trial not in paused)
    assert not list(tmp_path.glob("search/trial_*/continue.npz"))
    # The same values without a pause.
    resumed = max(trials, key=started)
    assert started(resumed) > 1
    values = resumed.hyperparameters

    def build_the_same(hp):
        hp.Fixed("learning_rate", values["learning_rate"])
        return build(hp)

    whole = search(
        make(
            tmp_path, build=build_the_same, max_trials=1, project_name="whole", memory_budget=None,
            micro_batch_sizes=(values["micro_batch_size"],), accumulation_steps=(values["accumulation_steps"],),
        ),
        epochs=EPOCHS,
    )  # fmt: skip
    expected = [epoch.logs["val_loss"] for epoch in whole.record().trials[0].epochs]
    assert [epoch.logs["val_loss"] for epoch in resumed.epochs] == expected[: len(resumed.epochs)]
    # With another training's worth, paused trials go on and new ones begin.
    before = trained(tuner)
    assert before + 1 <= trained(search(freezing(tmp_path, 3), epochs=EPOCHS)) < before + 2 * EPOCHS


def test_what_cannot_be_paused_is_refused(tmp_path):
    class OwnTrial(accumtune.OptunaSearch):
        def run_trial(self, trial, *args, **kwargs):
            return super().run_trial(trial, *args, **kwargs)

    with pytest.raises(SearchError, match="executions_per_trial=2"):
        freezing(tmp_path, 2, executions_per_trial=2)
    with pytest.raises(SearchError, match="run_trial"):
        make(tmp_path, OwnTrial, pruner="freeze-thaw")
    with pytest.raises(SearchError, match="sampler"):
        freezing(tmp_path, 2, sampler=object())
    with pytest.raises(SearchError, match="two epochs or more"):
        search(freezing(tmp_path, 2), epochs=1)

