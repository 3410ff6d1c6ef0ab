"""The line of advice from the gradient noise scale: which trial's scale it uses, and where it is printed."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from made_search import MadeSearch
from test_report import candidates_of, write

from accumtune.search.results import search_results as results
from accumtune.tracking.journal import read_search
from accumtune.tracking.report.noise_scale_note import NoiseScale, noise_scale_of


def searched(folder: Path, **noise):
    """Two completed trials, the first one better; by trial, the noise scales that its epochs logged."""
    search = MadeSearch(folder).start()
    for number, (trial_id, values) in enumerate(noise.items()):
        search.propose(trial_id, number)
        search.begin(trial_id)
        for epoch, value in enumerate(values):
            logs = {"val_loss": 0.5, "gradient_noise_scale": value}
            search.trial(trial_id).append("epoch", attempt=1, execution=0, epoch=epoch, logs=logs)
        search.end(trial_id, objective=0.5 + number)
    search.finish()
    return read_search(folder)


def test_it_is_the_median_of_the_best_trials_epochs(tmp_path):
    found = noise_scale_of(searched(tmp_path, a=[100.0, 480.0, 900.0], b=[5.0]), None)
    assert (found.samples, found.trial_id) == (480.0, "a")


def test_the_chosen_trial_comes_before_better_ones(tmp_path):
    record = searched(tmp_path, a=[100.0], b=[5.0])
    assert noise_scale_of(record, SimpleNamespace(trial_id="b")).samples == 5.0


@pytest.mark.parametrize("unknown", [[], [math.nan, math.nan]])
def test_a_trial_that_could_not_measure_it_leaves_it_to_the_next(tmp_path, unknown):
    assert noise_scale_of(searched(tmp_path, a=unknown, b=[7.0, math.nan]), None).samples == 7.0


def test_without_any_there_is_no_advice(tmp_path):
    record = searched(tmp_path / "made", a=[math.nan])
    assert noise_scale_of(record, None) is None
    assert "noise scale" not in write(record, tmp_path / "report")


@pytest.mark.parametrize("samples", [64.0, 1e6])  # within the picture, and far outside
def test_note_and_summary_say_it_and_the_picture_can_be_drawn(tmp_path, samples):
    record = searched(tmp_path / "made", a=[samples], b=[5.0])
    advice = f"The gradient noise scale was about {samples:,.0f} samples (trial a, median of its epochs)"
    but = ", but the best effective batch was 64. Trust the search"
    advice += ". Larger effective batches" if samples == 64.0 else but
    assert advice in write(record, tmp_path / "report")
    assert advice in results.summary(record, candidates_of(record), 10)
    assert (tmp_path / "report" / "effective_batch.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "samples, why", [(929.0, "small batches make more updates"), (16.0, "gain little"), (2.0, "the learning rate")]
)
def test_where_it_contradicts_the_best_effective_batch_it_says_which_to_believe(samples, why):
    advice = NoiseScale(samples, "08").advice(SimpleNamespace(effective_batch_size=16))
    assert why in advice and ("Trust the search" in advice) == (samples != 16.0)
    assert "gain little" in NoiseScale(samples, "08").advice()
