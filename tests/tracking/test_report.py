"""The report's note and pictures, for made-up searches."""

import csv
import dataclasses
import io
import json
import math
import random
import re

import pytest

from accumtune.search.results.selection import Candidate, pareto_front, select
from accumtune.tracking.journal import read_search
from accumtune.tracking.report import writer as report
from accumtune.tracking.report.pareto_page import pareto_html

MIB = 2**20
FILES = {
    "note.md", "candidates.csv", "pareto.png", "pareto.html", "memory.png", "throughput.png", "effective_batch.png",
}  # fmt: skip


def candidates_of(search):
    trained = [
        Candidate(it.objective_value, it.peak_memory_bytes, it.throughput_samples_per_second, it.micro_batch_size,
                  it.accumulation_steps, it.effective_batch_size, it.hyperparameters, it.trial_id)
        for it in search.with_status("completed")
    ]  # fmt: skip
    profiled = [
        dataclasses.replace(
            it,
            peak_memory_bytes=it.peak_memory_bytes / 2,
            throughput_samples_per_second=it.throughput_samples_per_second / 2,
            micro_batch_size=it.micro_batch_size // 2,
            accumulation_steps=it.accumulation_steps * 2,
            is_trained=False,
        )
        for it in trained
    ]
    return trained + profiled


def write(search, folder, config_json=None, points=None):
    found = candidates_of(search)
    front = pareto_front(found, search.objective_direction)
    best = select(found, direction=search.objective_direction) if found else None
    report.write_report(folder, record=search, candidates=found, front=front, best=best, config_json=config_json,
                        profile_points=points)  # fmt: skip
    return (folder / "note.md").read_text()


POINTS = [
    {"micro_batch_size": size, "accumulation_steps": 2, "predicted_peak_memory_bytes": size * MIB,
     "predicted_throughput_samples_per_second": 100.0 * size}
    for size in (8, 16, 32, 64)
]  # fmt: skip


def test_the_answer_comes_first_and_nothing_is_missing(finished, tmp_path):
    finished.journal.append("advice", text="Use <b>more</b> | less")
    search = read_search(finished.folder)
    config = '{"source": {"run_id": "abc", "tracking_uri": null}}'
    note = write(search, tmp_path / "report", config, POINTS)
    assert {file.name for file in (tmp_path / "report").iterdir()} == FILES | {"best_config.json"}
    head = note[:600]
    assert "micro-batch 8 × 4 accumulation steps = effective batch 32" in head
    assert "val_loss **0.4**" in head and "38.0 MiB** of 64.0 MiB (59 %)" in head and "**Why:**" in head
    assert 'accumtune.load_config("runs:/abc/best_config.json")' in note
    assert "2 trained, 1 reused" in note and "1 infeasible, 1 failed" in note
    assert "not even micro-batch 1 fits" in note and "ValueError: boom" in note and "64.0 MiB" in note
    assert "Use &lt;b>more&lt;/b> \\| less" in note
    assert "| 0.5 | 64 | 16 × 4 |" in note, "the runner-up"
    for name in FILES - {"note.md", "candidates.csv", "pareto.html"}:
        content = (tmp_path / "report" / name).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 10_000


def test_the_same_search_gives_the_same_files(finished, tmp_path):
    search = read_search(finished.folder)
    for folder in ("one", "other"):
        write(search, tmp_path / folder, "{}", POINTS)
    for file in (tmp_path / "one").iterdir():
        if file.name != "note.md":  # its last resort is the path of best_config.json
            assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes(), file.name


def test_without_a_result_the_note_says_so(made, tmp_path):
    made.start()
    made.fail("00")
    made.infeasible(0)
    made.finish("failed", "3 trials in a row failed")
    note = write(read_search(made.folder), tmp_path)
    assert "no configuration yet" in note and "3 trials in a row failed" in note and "ValueError: boom" in note
    assert not (tmp_path / "best_config.json").exists()


@pytest.mark.parametrize("direction", ["min", "max"])
def test_awkward_searches_are_drawn(made, tmp_path, direction, recwarn):
    made.start(memory_budget_bytes=None, objective={"name": "score", "direction": direction}, device=None)
    # Diverged, equal, negative and zero objectives; one micro-batch only; a note that is too long for MLflow.
    for number, objective in enumerate([1e9, 0.1, 0.1, -1.0, 0.0]):
        made.complete(f"{number:02d}", number, objective=objective, micro=1, steps=1)
    for number in range(5, 60):
        made.fail(f"{number:02d}", number)
        made.end(f"{number:02d}", "failed", reason=f"{number} " + "long " * 100, objective=None)
    note = write(read_search(made.folder), tmp_path)
    assert len(note) <= 8000 and "score **" in note
    assert not [str(warning.message) for warning in recwarn]


def test_the_table_for_programs(finished):
    search = read_search(finished.folder)
    found = candidates_of(search)
    front = pareto_front(found)
    rows = list(csv.DictReader(io.StringIO(report.candidates_csv(search, found, front))))
    assert len(rows) == len(found) and [float(row["val_loss"]) for row in rows] == [0.4, 0.4, 0.5, 0.5]
    assert rows[0]["is_trained"] == "True" and rows[0]["is_on_pareto_front"] == "True"
    assert float(rows[0]["peak_memory_mib"]) == 38 and rows[0]["learning_rate"] == "0.02"


def test_the_table_for_people(finished):
    found = candidates_of(read_search(finished.folder))
    front = pareto_front(found)
    random.Random(0).shuffle(found)
    header, rule, *lines = report.candidates_table(found, front, "min").splitlines()
    assert "micro × steps" in header and set(rule) == {"─", " "}
    assert [line.strip("* ").split()[0] for line in lines] == ["0.4", "0.4", "0.5", "0.5"]
    assert [line.startswith("*") for line in lines] == [True, True, False, False]
    assert "~19.0 MiB" in lines[1] and " 38.0 MiB" in lines[0] and "learning_rate=0.02" in lines[0]
    unknown = Candidate(math.nan, None, None, 1, 1, 1)
    assert "–" in report.candidates_table([unknown], [], "max")


def test_matplotlib_has_no_state_of_ours(finished, tmp_path):
    import matplotlib

    before = (matplotlib.get_backend(), dict(matplotlib.rcParams))
    write(read_search(finished.folder), tmp_path)
    assert (matplotlib.get_backend(), dict(matplotlib.rcParams)) == before


def test_the_interactive_page_needs_no_network_and_escapes_what_it_is_given(finished, tmp_path):
    search = dataclasses.replace(read_search(finished.folder), name="</script><b>x")
    found = candidates_of(search)
    hostile = {**found[0].hyperparameters, "note": "</script><script>alert(1)//"}
    quoted = {**found[1].hyperparameters, "api_key": "hunter2", "url": 'token=hunter2"b', "other": "Bearer hunter2"}
    found[1] = dataclasses.replace(found[1], hyperparameters=quoted)
    found = [dataclasses.replace(found[0], hyperparameters=hostile), *found[1:]]
    page = pareto_html(search, found, found[:1], found[0])
    assert len(page) < 100_000
    urls = set(re.findall(r"https?://[^\"'\s]+", page)) - {"http://www.w3.org/2000/svg"}  # a namespace, not fetched
    assert not urls and not re.search(r"<(link|img|iframe)\b|@import|\bsrc=", page)
    assert page.count("</script>") == 2 and "<b>x" not in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert len(data["points"]) == len(found) and data["budgetText"] == "64.0 MiB"
    assert [point["isBest"] for point in data["points"]].count(True) == 1
    assert data["points"][0]["hyperparameters"].endswith("alert(1)//")
    assert data["points"][1]["hyperparameters"].endswith("api_key=..., url=token=..., other=Bearer ...")
    assert "hunter2" not in report.candidates_csv(search, found, found[:1])
    nothing = [dataclasses.replace(item, objective=None) for item in found]
    assert pareto_html(search, nothing, [], None) is None
