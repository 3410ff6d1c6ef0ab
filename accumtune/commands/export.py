"""`accumtune export`: a configuration as a file, or as arguments for plain Keras."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from accumtune.commands.options import add_command, add_json, add_policy, add_tracking_uri, print_json
from accumtune.commands.searches import all_searches, choose, find_search, is_search


def add(commands: Any) -> None:
    command = add_command(commands, "export", "a configuration as a file, or as arguments for plain Keras", run)
    source: Any = command.add_argument(
        "source", nargs="?", default=None,
        help="a search's directory (default: the newest), or a configuration: a path, runs:/..., models:/NAME@best, "
        "an experiment's name",
    )  # fmt: skip
    source.completer = lambda **_: [*map(str, all_searches()), *map(str, Path().glob("*.json"))]
    command.add_argument("--output", "-o", metavar="FILE", default=None, help="default: the standard output")
    command.add_argument(
        "--format", default="json", choices=("json", "keras"),
        help="keras: arguments for Keras's own gradient_accumulation_steps, and how that training differs",
    )  # fmt: skip
    add_policy(command)
    add_tracking_uri(command)
    add_json(command, "with --format keras: print the arguments as JSON")


def run(options: argparse.Namespace) -> int:
    from accumtune.config import load_config

    if options.source is None or is_search(options.source):
        _, _, config = choose(find_search(options.source), options)
    else:
        config = load_config(options.source, tracking_uri=options.tracking_uri)
    if options.format == "json" and options.output:
        config.save(options.output)
        return 0
    if options.format == "keras" and options.json and not options.output:
        print_json(config.keras_arguments().to_dict())
        return 0
    text = config.to_json() if options.format == "json" else f"{config.keras_arguments()}\n"
    if options.output:
        Path(options.output).write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0
