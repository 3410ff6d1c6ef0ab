# PYTHON_ARGCOMPLETE_OK
"""The command line. Each command is a file of `accumtune/commands`.

A command's result goes to the standard output, everything else to the standard error. `commands/options.py` lists the
exit codes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence

import accumtune
from accumtune.commands import best, candidates, demo, export, probe, sync, ui, verify
from accumtune.commands.answer import close_standard_output
from accumtune.commands.options import EXIT_CODES
from accumtune.errors import AccumtuneError, BudgetTooSmallError, NoResultError, TrackingError, VerificationError

# In the order in which a user needs them.
_COMMANDS = (demo, probe, candidates, best, ui, export, verify, sync)
_THE_ANSWER_IS_NO = (VerificationError, NoResultError, BudgetTooSmallError, TrackingError)

_EPILOG = f"""\
for example:
  accumtune demo
  accumtune probe train:build_model --data train:load --memory-budget 2GiB
  accumtune best --policy memory --save best_config.json
  accumtune verify best_config.json train:build_model --data train:load && python production.py

train:build_model is the function build_model in train.py of this folder. SEARCH is a search's project_name or its
directory; default: the newest in mlruns/searches. `accumtune COMMAND --help` lists a command's options.

{EXIT_CODES}

tab completion, in bash and zsh (from now on: the same line in ~/.bashrc or ~/.zshrc):
  eval "$(register-python-argcomplete accumtune)\""""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the `accumtune` command."""
    parser = make_parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks for completions; all other calls skip the import
        import argcomplete

        argcomplete.autocomplete(parser)
    options = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's notes on how it was built
    try:
        code = int(options.run(options))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader has closed the pipe, as in `accumtune candidates | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + 13  # SIGPIPE, which Windows does not name
    except AccumtuneError as error:
        print(f"accumtune: {error}", file=sys.stderr)
        return 1 if isinstance(error, _THE_ANSWER_IS_NO) else 2
    except OSError as error:  # a file of the user's, which the error names
        print(f"accumtune: {error}", file=sys.stderr)
        return 2
    except Exception:  # Python's own exit code would be 1, "the answer is no"
        traceback.print_exc()
        return os.EX_SOFTWARE
    finally:
        if arguments is None:  # called by the shell, not by a test or a program
            with contextlib.suppress(OSError, ValueError):
                close_standard_output()


def make_parser() -> argparse.ArgumentParser:
    """The parser of `accumtune` and of all its commands."""
    parser = argparse.ArgumentParser(
        prog="accumtune",
        usage="%(prog)s [-h] [--version] COMMAND [options]",
        description="Find the micro-batch size and accumulation steps to train a Keras model with, under a memory "
        "budget.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"accumtune {accumtune.__version__}")
    commands = parser.add_subparsers(required=True, prog="accumtune", title="commands", metavar="COMMAND [options]")
    for command in _COMMANDS:
        command.add(commands)
    return parser
