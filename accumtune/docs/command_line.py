"""For MkDocs: the page of the command line has each command's help, as the parser prints it."""

import argparse
import os
from typing import Any

PAGE, PLACE = "api/command-line.md", "<!-- the help of each command -->"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return markdown.replace(PLACE, helps()) if page.file.src_uri == PAGE else markdown


def helps() -> str:
    """Returns Markdown with a section per command."""
    from accumtune.cli import make_parser

    os.environ["COLUMNS"] = "100"  # argparse's width, whatever the terminal's is
    (commands,) = [it for it in make_parser()._actions if isinstance(it, argparse._SubParsersAction)]
    return "\n\n".join(f"## accumtune {name}\n\n{_help(command)}" for name, command in commands.choices.items())


def _help(command: argparse.ArgumentParser) -> str:
    command.epilog = None  # the exit codes, which the page has once
    return f"```text\n{command.format_help().strip()}\n```"
