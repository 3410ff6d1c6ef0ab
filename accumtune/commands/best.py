"""`accumtune best`: the best configuration of a search."""

from __future__ import annotations

import argparse
from typing import Any

from accumtune.commands.options import add_command, add_json, add_policy, add_search
from accumtune.commands.searches import choose, find_search


def add(commands: Any) -> None:
    command = add_command(commands, "best", "the best configuration of a search, and why it won", run)
    add_search(command)
    add_policy(command)
    command.add_argument("--save", metavar="FILE", default=None, help="write it to a file for accumtune.load_config")
    add_json(command, "print the configuration alone, as JSON")


def run(options: argparse.Namespace) -> int:
    from accumtune.search.results import search_results as results
    from accumtune.search.results.selection import pareto_front

    record, found, config = choose(find_search(options.search), options)
    if options.save:
        config.save(options.save)
    if options.json:
        print(config.to_json())
        return 0
    print(results.summary(record, found, limit=10))
    print(f"\n{config}\nWhy: {config.reason}")
    print(f"{len(pareto_front(found, record.objective_direction))} candidates on the Pareto front")
    return 0
