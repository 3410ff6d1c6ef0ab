"""`accumtune candidates`: what a search has found, as a table."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from accumtune.commands.options import add_command, add_json, add_search, count, print_json
from accumtune.commands.searches import find_search, read_candidates


def add(commands: Any) -> None:
    command = add_command(
        commands, "candidates", "what a search has found, as a table", run,
        "Every configuration with its objective, peak memory and throughput, the best first; * marks the Pareto front. "
        "Works while the search runs, too. Exit code 1: no candidate yet.",
    )  # fmt: skip
    add_search(command)
    command.add_argument("--limit", type=count, default=None, metavar="N", help="rows to show; default: all")
    add_json(command, "print JSON instead of a table, untrained candidates included")


def run(options: argparse.Namespace) -> int:
    from accumtune.search.results import search_results as results
    from accumtune.search.results.selection import pareto_front

    record, found = read_candidates(find_search(options.search))
    if options.json:
        front = pareto_front(found, record.objective_direction)
        print_json([{**asdict(it), "is_on_pareto_front": it in front} for it in found])
    else:
        print(results.summary(record, found, limit=len(found), most_rows=options.limit))
    return 0 if found else 1

