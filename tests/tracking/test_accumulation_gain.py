"""The line on what accumulation has won: for made-up candidates, and where it is printed."""

import math

import pytest
from made_search import MadeSearch
from test_report import candidates_of, write

from accumtune.search.results import search_results as results
from accumtune.search.results.selection import Candidate
from accumtune.tracking.journal import read_search
from accumtune.tracking.report.accumulation_gain import accumulation_gain

MIB = 2**20


def made(objective, micro, steps, trial_id="a", peak=4 * MIB, throughput=2000.0):
    return Candidate(objective, peak, throughput, micro, steps, micro * steps, {"rate": 0.1}, trial_id)


def said(best, *others, direction="min"):
    return accumulation_gain([best, *others], best, "val_loss" if direction == "min" else "val_recall", direction)


def test_the_best_that_needs_none_stands_beside_the_best():
    best, other = made(0.25, 32, 8, throughput=1500.0), made(0.5, 32, 1, "b", 3 * MIB)
    worse = made(0.75, 16, 1, "c")
    assert said(best, worse, other) == (
        "What accumulation won: val_loss 0.25 with 256 = 32 × 8 (4.0 MiB, 1,500 samples/s); "
        "the best without it: 0.5 with 32 = 32 × 1 (3.0 MiB, 2,000 samples/s)."
    )


def test_a_large_objective_may_be_the_good_one():
    best, other = made(0.9, 32, 8), made(0.5, 32, 1, "b")
    assert said(best, other, direction="max").startswith("What accumulation won: val_recall 0.9")
    assert "the best without it: 0.5" in said(best, other, made(0.4, 16, 1, "c"), direction="max")


@pytest.mark.parametrize("best", [made(0.25, 64, 1), made(0.25, 16, 4)])
def test_where_the_best_effective_batch_fits_in_one_pass_it_is_not_needed(best):
    """Also where another micro-batch of it was chosen, say because that is faster."""
    assert said(best, made(0.25, 64, 1), made(0.5, 32, 1, "b")) == (
        "Accumulation is not needed: the best effective batch, 64, fits in one pass."
    )


def test_a_choice_within_the_tolerance_has_won_nothing_in_the_objective():
    line = said(made(0.252, 16, 4), made(0.25, 32, 1, "b"))
    assert line.startswith("Accumulation won nothing in val_loss: 0.25 with 32 = 32 × 1")


@pytest.mark.parametrize("others", [(), (made(math.nan, 32, 1, "b"), made(None, 32, 1, "c"))])
def test_without_any_in_one_pass_there_is_nothing_to_compare(others):
    assert said(made(0.25, 8, 8), *others).startswith("Nothing to compare accumulation with")


def test_what_is_not_known_is_a_dash():
    assert "(–, – samples/s)" in said(made(0.25, 8, 8), made(0.5, 32, 1, "b", None, None))


def test_summary_and_note_say_it_and_a_search_without_a_result_does_not(tmp_path):
    search = MadeSearch(tmp_path / "made").start()
    search.complete("a", 0, micro=16, steps=4, objective=0.25)
    search.complete("b", 1, micro=16, steps=1, objective=0.5)
    search.finish()
    record = read_search(tmp_path / "made")
    line = "What accumulation won: val_loss 0.25 with 64 = 16 × 4"
    assert line in results.summary(record, candidates_of(record), 10)
    note = write(record, tmp_path / "report")
    assert line in note[:800], "in the answer, which MLflow shows unfolded"
    nothing = read_search(MadeSearch(tmp_path / "empty").start().folder)
    assert "ccumulation" not in results.summary(nothing, [], 10)
