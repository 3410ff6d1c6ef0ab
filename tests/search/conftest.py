"""Searches that start their processes from one fork server."""

from concurrent.futures import Future

import pytest

from accumtune.search import processes
from accumtune.trials.outcome import Outcome


class SharedServer:
    """A search's own executor, over a server that other searches use too: closing it ends this search's tasks."""

    def __init__(self, server):
        self.backend = server.backend
        self.kill = server.kill
        self._server = server
        self._tasks = []
        self._is_closed = False

    def submit(self, directory, *args, **kwargs):
        if self._is_closed:
            ended = Future()
            ended.set_result(Outcome("killed", reason="the search was stopped"))
            return ended
        future = self._server.submit(directory, *args, **kwargs)
        self._tasks.append((directory, future))
        return future

    def close(self):
        self._is_closed = True
        for directory, future in self._tasks:
            if not future.done():
                self.kill(directory)
                future.result()


@pytest.fixture(scope="module")
def one_fork_server(executor):
    """For modules with many searches: each search's own server would import the framework again.

    How a search ends its server and what that takes along is tested in scripts, which are processes of their own, and
    in tests/trials.
    """
    open_executor = processes.open_executor

    def shared(pool, backend):
        return SharedServer(executor) if pool is None else open_executor(pool, backend)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "open_executor", shared)
        yield
