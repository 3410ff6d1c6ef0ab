"""Tab completion of the installed command: by the shell's protocol, and in a real bash in a terminal."""

import os
import pty
import re
import select
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(sys.executable).parent
REGISTER = shutil.which("register-python-argcomplete", path=str(SCRIPTS))


@pytest.fixture
def folder(tmp_path):
    """A folder with a search, a configuration, a module that must not be run, and the command as pip installs it."""
    (tmp_path / "mlruns" / "searches" / "mine").mkdir(parents=True)
    (tmp_path / "mlruns" / "searches" / "mine" / "search.jsonl").touch()
    (tmp_path / "best_config.json").touch()
    module = "raise SystemExit('it runs nothing')\ndef build_model(hp): ...\ndef load(): ...\n"
    (tmp_path / "train.py").write_text(module)
    command = tmp_path / "bin" / "accumtune"
    command.parent.mkdir()
    entry = "import sys\nfrom accumtune.cli import main\nif __name__ == '__main__':\n    sys.exit(main())\n"
    command.write_text(f"#!{sys.executable}\n# -*- coding: utf-8 -*-\n{entry}")
    command.chmod(command.stat().st_mode | stat.S_IEXEC)
    return tmp_path


def environment(folder):
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join([str(folder / "bin"), str(SCRIPTS), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


def offered(folder, line):
    """Returns the completions that the command offers at the end of a line; it writes them to descriptor 8."""
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SHELL": "bash", "COMP_TYPE": "9",
             "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n\"'><=;|&(:",
             "_ARGCOMPLETE_SUPPRESS_SPACE": "0"}  # fmt: skip
    command = [str(folder / "bin" / "accumtune")]
    done = subprocess.run(
        ["bash", "-c", '"$0" 8>&1 9>/dev/null 1>/dev/null 2>/dev/null', *command],
        cwd=folder, env=environment(folder) | asked, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return {word.strip() for word in done.stdout.split("\n") if word.strip()}


def test_the_command_answers_a_shell_that_asks(folder):
    names = {"demo", "probe", "candidates", "best", "ui", "export", "verify", "sync"}
    assert names <= offered(folder, "accumtune ")
    assert offered(folder, "accumtune ver") == {"verify"}
    assert {"--policy", "--save", "--json"} <= offered(folder, "accumtune best --")
    assert offered(folder, "accumtune best --policy ") == {"quality", "memory", "throughput", "balanced"}
    assert offered(folder, "accumtune best --policy thr") == {"throughput"}
    assert offered(folder, "accumtune export --format ") == {"json", "keras"}
    assert offered(folder, "accumtune best ml") == {"mlruns/searches/mine"}
    assert offered(folder, "accumtune best mi") == {"mine"}
    assert offered(folder, "accumtune export b") == {"best_config.json"}
    # Bash has cut the word at the colon: what follows it is asked for.
    assert offered(folder, "accumtune probe train:") == {"build_model", "load"}
    assert offered(folder, "accumtune verify best_config.json tr") == {"train:build_model", "train:load"}


class Terminal:
    """An interactive bash."""

    def __init__(self, folder):
        self.process, self.descriptor = pty.fork()
        if self.process == 0:
            os.chdir(folder)
            plain = {"PS1": "READY> ", "TERM": "dumb", "HISTFILE": "", "INPUTRC": os.devnull}
            os.execvpe("bash", ["bash", "--noprofile", "--norc", "-i"], environment(folder) | plain)

    def type(self, text, expected, seconds=60):
        """Types it, and reads until what is expected has been seen. Returns what was read."""
        os.write(self.descriptor, text.encode())
        read, end = "", time.monotonic() + seconds
        while not re.search(expected, read, re.DOTALL):
            ready, _, _ = select.select([self.descriptor], [], [], max(0, end - time.monotonic()))
            assert ready, f"typed {text!r}, read {read!r}"
            read += os.read(self.descriptor, 4096).decode(errors="replace")
        return read

    def close(self):
        os.close(self.descriptor)
        os.waitpid(self.process, 0)


@pytest.fixture
def terminal(folder):
    terminal = Terminal(folder)
    yield terminal
    terminal.close()


@pytest.mark.skipif(REGISTER is None or shutil.which("bash") is None, reason="needs bash and argcomplete's script")
def test_tab_in_a_real_shell(terminal):
    """Set up as `accumtune --help` says. Tab adds text to the line; Ctrl-U deletes the line."""
    terminal.type("", "READY> ")
    terminal.type('eval "$(register-python-argcomplete accumtune)"; echo "registered: $?"\n', "registered: 0.*READY> ")
    for typed, completed in (
        ("accumtune verif", "accumtune verify "),
        ("accumtune best --po", "accumtune best --policy "),
        ("accumtune best --policy thr", "accumtune best --policy throughput "),
        ("accumtune best mlruns/s", "accumtune best mlruns/searches/mine"),
        ("accumtune probe train:b", "accumtune probe train:build_model"),
    ):
        terminal.type(f"{typed}\t", re.escape(completed))
        terminal.type("\x15", "")
