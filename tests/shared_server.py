"""Several executors that share one fork server."""

from concurrent.futures import Future

from accumtune.worker.transport.outcome import Outcome


class SharedServer:
    """An executor over a server that others use too: closing it ends only its own tasks."""

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

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        self._is_closed = True
        for directory, future in self._tasks:
            if not future.done():
                self.kill(directory)
                future.result()
