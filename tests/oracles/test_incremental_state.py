"""Only new parts of an oracle's state are saved, and the whole state is read back."""

import json

import keras_tuner
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accumtune.oracles import state_files
from accumtune.oracles.incremental_state import IncrementalState, changes_file, with_changes
from accumtune.oracles.persistent_oracle import make_persistent

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.text("ab", max_size=2))
NAMES = st.sampled_from(["x", "y", "z"])
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.dictionaries(NAMES, SCALARS, max_size=3),
    st.lists(st.dictionaries(NAMES, st.lists(SCALARS, max_size=2), max_size=2), max_size=2),
)
STATES = st.builds(
    lambda state, tried: {**state, "tried_so_far": sorted(tried)},
    st.dictionaries(NAMES, VALUES, max_size=3),
    st.sets(st.text("ab", max_size=2), max_size=4),
)


def write(path, state):
    path.write_text(json.dumps(state))


def read(path, content=""):
    state = with_changes(json.loads(content or path.read_text()), path)
    state.pop("accumtune_change", None)
    return {name: sorted(value) if name == "tried_so_far" else value for name, value in state.items()}


@given(st.lists(st.tuples(st.booleans(), STATES), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_what_was_saved_last_is_read_also_from_an_older_file(tmp_path_factory, saves):
    path = tmp_path_factory.mktemp("states") / "oracle.json"
    file = IncrementalState(path, write)
    older = ["null"]
    for is_whole, state in saves:
        (file.save_whole if is_whole else file.save_changes)(json.loads(json.dumps(state)))
        if is_whole:
            older.append(path.read_text())
        assert all(read(path, content) == state for content in older)


def test_a_state_that_changes_inside_is_noticed(tmp_path):
    file, state = IncrementalState(tmp_path / "oracle.json", write), {"brackets": [{"rounds": [[1]]}], "order": ["a"]}
    file.save_whole(state)
    state["brackets"][0]["rounds"][0].append(2)
    state["order"].append("b")
    file.save_changes(state)
    assert read(tmp_path / "oracle.json") == state
    assert changes_file(tmp_path / "oracle.json").read_text().count("\n") == 2
    file.save_changes(state)
    assert changes_file(tmp_path / "oracle.json").read_text().count("\n") == 2  # nothing new


def test_a_torn_line_is_the_end_and_its_number_is_given_again(tmp_path):
    path = tmp_path / "oracle.json"
    file = IncrementalState(path, write)
    file.save_whole({"order": ["a"]})
    for order in (["a", "b"], ["a", "b", "c"]):
        file.save_changes({"order": order})
    lines = changes_file(path)
    lines.write_bytes(lines.read_bytes()[:-9])
    assert read(path) == {"order": ["a", "b"]}
    again = IncrementalState(path, write)
    again.save_whole(read(path))
    again.save_changes({"order": ["a", "b", "d"]})
    assert read(path) == {"order": ["a", "b", "d"]}


def test_a_file_of_another_program_is_taken_as_it_is(tmp_path):
    path = tmp_path / "oracle.json"
    file = IncrementalState(path, write)
    file.save_whole({"order": ["a"]})
    file.save_changes({"order": ["a", "b"]})
    path.write_text(json.dumps({"order": ["z"]}))
    assert read(path) == {"order": ["z"]}


def oracle_in(folder, trials):
    space = keras_tuner.HyperParameters()
    space.Float("learning_rate", 1e-4, 1e-1)
    oracle = keras_tuner.oracles.RandomSearchOracle("val_loss", trials, seed=1, hyperparameters=space)
    oracle._set_project_dir(str(folder.parent), folder.name)
    oracle.verbose = 0
    return oracle


def run_trial(oracle):
    trial = oracle.create_trial("tuner0")
    oracle.update_trial(trial.trial_id, {"val_loss": 0.5})
    trial.status = "COMPLETED"
    oracle.end_trial(trial)


def test_the_last_trial_of_many_writes_no_more_than_the_first(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(state_files, "write_atomically", lambda path, content: written.append(len(content)))
    trials = 600
    oracle = make_persistent(oracle_in(tmp_path / "s", trials))
    oracle.save()
    bytes_of = []
    lines = changes_file(tmp_path / "s" / "oracle.json")
    for _ in range(trials):
        before = sum(written) + (lines.stat().st_size if lines.exists() else 0)
        run_trial(oracle)
        bytes_of.append(sum(written) + lines.stat().st_size - before)
    assert sum(bytes_of[-200:]) < 1.5 * sum(bytes_of[:200])
    # As Keras Tuner saves, it is several times as much.
    oracle.create_trial("tuner0")
    assert len(json.dumps(oracle.get_state())) > 10 * bytes_of[0]


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_search_that_is_gone_finds_its_oracle_complete(is_damaged, tmp_path):
    folder = tmp_path / "s"
    oracle = make_persistent(oracle_in(folder, 5))
    oracle.save()
    for _ in range(3):
        run_trial(oracle)
    expected = oracle.get_state()
    assert json.loads((folder / "oracle.json").read_text())["end_order"] == []  # all of it is in the changes
    if is_damaged:
        (folder / "oracle.json").write_text("{")
        (line,) = state_files.repair_state_files(folder)
        assert "oracle.json" in line
    again = make_persistent(oracle_in(folder, 5))
    again.reload()
    found = again.get_state()
    for state in (expected, found):
        state["tried_so_far"] = set(state["tried_so_far"])
    assert found == expected
    stock = oracle_in(folder, 5)
    stock.reload()  # and from now on Keras Tuner itself reads it
    assert stock.end_order == expected["end_order"]
