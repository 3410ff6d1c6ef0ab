"""The processes of a search: they end with it."""

import gc
from types import SimpleNamespace

import pytest

from accumtune.search import processes
from accumtune.worker.transport.task_directory import SearchDirectory


@pytest.mark.parametrize("is_closed", [True, False])
def test_they_end_once_also_with_a_tuner_that_was_only_looked_at(tmp_path, monkeypatch, is_closed):
    closed = []
    executor = SimpleNamespace(close=lambda: closed.append(1))
    monkeypatch.setattr(processes, "open_executor", lambda pool, backend: executor)
    made = processes.SearchProcesses(
        SearchDirectory(tmp_path), None, "tensorflow", memory_budget_bytes=None, micro_batch_sizes=(8,)
    )
    assert made.executor() is made.executor() is executor and not closed
    if is_closed:
        made.close()
    del made
    gc.collect()
    assert closed == [1]
