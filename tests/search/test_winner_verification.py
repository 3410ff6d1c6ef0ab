"""The best configuration has run under the budget before it is returned."""

import argparse
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import accumtune
from accumtune.commands import searches
from accumtune.search.results.selection import Candidate, select
from accumtune.search.results.winner_verification import predicted_choice, verified_choice
from accumtune.tracking.journal import Journal


class World:
    """Candidates of one training, whose memory and speed are known only after they have run."""

    def __init__(self, fits):
        trained = Candidate(0.5, 100.0, 10.0, 8, 1, 8, {}, "0", is_trained=True, is_measured=True)
        others = [
            replace(trained, micro_batch_size=micro, accumulation_steps=8 // micro, peak_memory_bytes=10.0 * micro,
                    throughput_samples_per_second=20.0 + micro, is_trained=False, is_measured=False)
            for micro in (1, 2, 4)
        ]  # fmt: skip
        self.candidates = [trained, *others]
        self.fits = fits
        self.ran = []

    def run(self, candidate):
        self.ran.append(candidate.micro_batch_size)
        if candidate.micro_batch_size not in self.fits:
            return False
        index = self.candidates.index(candidate)
        self.candidates[index] = replace(candidate, throughput_samples_per_second=15.0, is_measured=True)
        return True

    def choose(self, policy="quality"):
        return verified_choice(lambda: self.candidates, lambda found: select(found, policy), self.run)


def test_the_winner_runs_and_what_it_measured_decides_again():
    world = World(fits={1, 2, 4})
    choice = world.choose()
    # Each looked faster than it is; after three runs the best of what has run wins.
    assert world.ran == [4, 2, 1] and choice.candidate.is_measured
    assert choice.candidate.throughput_samples_per_second == 15.0
    assert "confirmed" in choice.reason and choice.reason.count(".") - choice.reason.count("0.5") <= 1
    assert world.choose() == choice and world.ran == [4, 2, 1]  # nothing runs twice


def test_what_does_not_hold_falls_to_the_next():
    world = World(fits={2})
    assert world.choose().candidate.micro_batch_size == 2 and 4 in world.ran
    assert World(fits=set()).choose().candidate.is_trained
    assert "confirmed" not in World(fits=set()).choose().reason


def test_commands_say_of_a_choice_what_the_tuner_says(monkeypatch):
    world = World(fits={1, 2, 4})
    record = SimpleNamespace(objective_direction="min", objective_name="objective")
    monkeypatch.setattr(searches, "read_candidates", lambda folder: (record, world.candidates))
    monkeypatch.setattr("accumtune.search.results.search_results.training_config", lambda record, choice: choice)
    options = argparse.Namespace(policy="quality", tolerance=0.01)
    _, _, before = searches.choose(Path(), options)
    assert before.reason.endswith("; its memory and speed are predicted: it has not run in this micro-batch.")
    said = world.choose().reason
    _, _, after = searches.choose(Path(), options)
    assert after.reason == said and said.endswith("; a few updates under the budget confirmed its memory and speed.")


def test_surprises_end():
    world = World(fits=set())
    first = world.candidates[1]
    world.candidates += [replace(first, micro_batch_size=micro, trial_id=str(micro)) for micro in range(10, 100)]
    assert world.choose().candidate.is_trained and len(world.ran) <= 5


def test_without_data_the_choice_says_that_it_has_not_run():
    world = World(fits={})
    assert "predicted" in predicted_choice(select(world.candidates)).reason
    assert "predicted" not in predicted_choice(select(world.candidates[:1])).reason


def test_a_search_runs_its_winner_once_and_keeps_what_that_took(tmp_path):
    from models import build_fixed, data

    x, y = data()

    def make():
        return accumtune.RandomSearch(
            build_fixed, objective="val_loss", max_trials=1, seed=1, memory_budget="16MiB", micro_batch_sizes=(2, 4, 8),
            accumulation_steps=(4, 8, 16), tracking_uri=False, directory=tmp_path, project_name="search",
        )  # fmt: skip

    tuner = make()
    tuner.search(x, y, validation_data=(x, y), epochs=1, verbose=0)
    (trial,) = tuner.record().trials

    def untrained(found):  # which pair is the fastest, and trains, is for this machine to say
        return min((it for it in found if not it.is_trained), key=lambda it: it.micro_batch_size)

    config = tuner.get_best_config(policy=untrained)
    assert config.micro_batch_size != trial.micro_batch_size and "confirmed" in config.reason
    measured = [it for it in tuner.candidates() if it.micro_batch_size == config.micro_batch_size]
    assert measured[0].is_measured and measured[0].peak_memory_bytes == config.peak_memory_bytes <= 16 * 2**20
    assert not (tmp_path / "search" / "payload").exists()

    started = []
    tuner._processes.executor = lambda: started.append(1)
    assert tuner.get_best_config(policy=untrained) == config and not started
    again = make()  # another process, which has no data but the same profile
    assert again.get_best_config(policy=untrained).peak_memory_bytes == config.peak_memory_bytes
    events = [event["event"] for event in Journal(trial.folder / "journal.jsonl").events()]
    assert events.count("started") == 1
