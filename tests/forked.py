"""Runs Python commands like `subprocess`, but without the eight seconds of importing TensorFlow.

One process serves the whole run of tests, with all workers of pytest-xdist. It imports the framework at the first
request. Each command runs in a fork of it, with its own arguments, environment, working directory and files.

A fork differs from a new interpreter in two ways: all forks have the same seed of hashes, and the modules that
accumtune's fork server imports are loaded already (so they have read their environment variables, such as KERAS_HOME).
A test that depends on either uses `subprocess`.
"""

import atexit
import fcntl
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from pathlib import Path

_ADDRESS = "ACCUMTUNE_TESTS_FORKED"  # the environment variable with the address of the process
_LARGEST_REQUEST = 2**17


def start():
    """Starts the process, which imports nothing yet; returns a function that ends it."""
    folder = tempfile.TemporaryDirectory(prefix="forked-")
    os.environ[_ADDRESS] = os.path.join(folder.name, "socket")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(os.environ[_ADDRESS])
    listener.listen(64)
    # Not `-m`: it is no module of a package. Its standard input is open for as long as this process lives.
    command = [sys.executable, "-W", "ignore", __file__, str(listener.fileno())]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()])
    listener.close()

    def end():
        process.stdin.close()
        process.wait()
        folder.cleanup()
        del os.environ[_ADDRESS]

    return end


class Popen(subprocess.Popen):
    """As `subprocess.Popen([sys.executable, ...])`."""

    def _execute_child(
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *others,
    ):  # fmt: skip
        python, *arguments = map(os.fspath, args)
        assert python == sys.executable, python
        streams = [own if own != -1 else number for number, own in enumerate((p2cread, c2pwrite, errwrite))]
        environment = {_ADDRESS: os.environ[_ADDRESS], **(os.environ if env is None else env)}
        request = {
            "arguments": arguments, "environment": environment,
            "cwd": os.path.abspath(cwd or os.getcwd()), "descriptors": [0, 1, 2, *pass_fds],
        }  # fmt: skip
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.connect(os.environ[_ADDRESS])
        socket.send_fds(self._connection, [json.dumps(request).encode()], [*streams, *pass_fds])
        self.pid = json.loads(self._connection.recv(100))
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            with self._waitpid_lock:  # its threads may wait at the same time
                if self.returncode is None:
                    self.returncode = json.loads(self._connection.recv(100) or "-9")
        return self.returncode

    def poll(self):
        try:
            return self.wait(timeout=0)
        except subprocess.TimeoutExpired:
            return None

    def _internal_poll(self, *_, **__):  # when it is forgotten
        return self.returncode


def run(command, *, capture_output=False, timeout=None, check=False, **options):
    """As `subprocess.run([sys.executable, ...])`."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, **options) as process:
        try:
            output, error = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(command, process.returncode, output, error)
    if check:
        done.check_returncode()
    return done


def fork_the_fork_servers():
    """Makes this process start its fork servers as forks, too."""
    from accumtune.execution import fork_server_client

    fork_server_client.subprocess = types.SimpleNamespace(
        Popen=Popen, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired
    )


def serve(listener):
    """Forks a process for each request, until the standard input ends."""
    from accumtune.execution.fork_server_client import _preload
    from accumtune.worker.quiet_imports import without_notes

    modules = _preload(os.environ["KERAS_BACKEND"]).split(",")
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who presses Ctrl-C ends the tests, which end this
    children = {}
    while True:
        readable, _, _ = select.select([listener, reader, 0], [], [])
        if 0 in readable:
            break
        if reader in readable:
            os.read(reader, 4096)
        for pid in list(children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                with children.pop(pid) as connection:
                    _tell(connection, os.waitstatus_to_exitcode(status))
        if listener in readable:
            connection, _ = listener.accept()
            content, descriptors, _, _ = socket.recv_fds(connection, _LARGEST_REQUEST, 16)
            while modules:
                with without_notes():
                    importlib.import_module(modules.pop(0))
                if not modules:
                    gc.collect()
                    gc.freeze()
            pid = os.fork()
            if pid == 0:
                for own in (listener, connection, *children.values()):
                    own.close()
                os.close(reader)
                os.close(writer)
                _become(json.loads(content), descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            children[pid] = connection
            _tell(connection, pid)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _tell(connection, number):
    try:
        connection.send(json.dumps(number).encode())
    except ConnectionError:
        pass  # who asked is gone


def _become(request, descriptors):
    """Runs a command of Python in this fork, and ends as an interpreter does."""
    code = 1
    try:
        _settle(request, descriptors)
        _run(request["arguments"])
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        else:
            code = end.code or 0
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        if code == -signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(code)


def _settle(request, descriptors):
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    # First out of the way of the numbers that are asked for.
    beyond = max(request["descriptors"]) + 1
    aside = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, beyond) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    for descriptor, number in zip(aside, request["descriptors"], strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, closefd=False) for n, mode in enumerate("rww"))
    sys.stderr.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    tempfile.tempdir = None
    atexit._clear()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    fork_the_fork_servers()


def _run(arguments):
    folder, flags = "", []
    while arguments[0] in ("-P", "-u"):
        flags.append(arguments.pop(0))
    main = types.ModuleType("__main__")
    main.__builtins__ = __builtins__
    if arguments[0] == "-c":
        source, name = arguments.pop(1), "<string>"
    else:
        source, name = Path(arguments[0]).read_text(), arguments[0]
        folder, main.__file__ = os.path.abspath(os.path.dirname(name)), name
    sys.orig_argv = [sys.executable, *flags, *(["-c", source, *arguments[1:]] if arguments[0] == "-c" else arguments)]
    sys.argv = arguments
    places = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place and place not in sys.path]
    sys.path[:1] = [*([] if "-P" in flags else [folder]), *places]
    sys.modules["__main__"] = main
    exec(compile(source, name, "exec"), main.__dict__)


if __name__ == "__main__":
    sys.modules["forked"] = sys.modules["__main__"]
    serve(socket.socket(fileno=int(sys.argv[1])))
