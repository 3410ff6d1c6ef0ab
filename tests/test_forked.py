"""Commands that `forked` starts behave as if `subprocess` had started them."""

import signal
import subprocess
import sys

import forked
import pytest

SCRIPT = """
import os, sys
print(__name__, sys.argv, os.getcwd(), os.environ.get("A"), __file__, sys.path[0], sys.stdin.read())
print("error", file=sys.stderr)
"""


@pytest.fixture
def both(tmp_path):
    """What a command printed and its exit code, started in both ways."""

    def run(*arguments, **options):
        options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 100, **options}
        started, fork = (way([sys.executable, *arguments], **options) for way in (subprocess.run, forked.run))
        assert fork.stdout == started.stdout and fork.returncode == started.returncode
        assert fork.stderr.splitlines()[-1:] == started.stderr.splitlines()[-1:]
        return fork

    return run


def test_a_script_sees_its_arguments_folder_environment_and_streams(both, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = both(str(tmp_path / "script.py"), "an argument", env={"A": "B"}, stdin=subprocess.DEVNULL)
    assert "__main__" in done.stdout and "an argument" in done.stdout


@pytest.mark.parametrize(
    "code",
    ["import sys; sys.exit(3)", "import sys; sys.exit('no')", "raise ValueError('so')", "raise KeyboardInterrupt"]
    + ["import os; os.kill(os.getpid(), 9)", "import atexit; atexit.register(print, 'at the end'); print(1)"],
)
def test_it_ends_as_an_interpreter_does(both, code):
    both("-c", code)


def test_it_can_be_interrupted_killed_and_waited_for():
    wait = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(100)"]
    for number, code in ((signal.SIGINT, -signal.SIGINT), (signal.SIGKILL, -signal.SIGKILL)):
        with forked.Popen(wait, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout.readline() == "begun\n"
            assert process.poll() is None
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.01)
            process.send_signal(number)
        assert process.returncode == code


def test_the_framework_is_there_without_an_import():
    code = "import sys; print(*[name in sys.modules for name in ('keras', 'accumtune.worker.training', 'mlflow')])"
    done = forked.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True", "False"]
