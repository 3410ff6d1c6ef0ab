"""`accumtune verify`: whether a configuration holds on this machine."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from accumtune.commands.addresses import load_data, load_object, load_validation_data
from accumtune.commands.answer import only_the_answer
from accumtune.commands.options import add_command, add_json, add_model_and_data, add_tracking_uri, print_json, share

if TYPE_CHECKING:
    from accumtune.config import TrainingConfig


def add(commands: Any) -> None:
    command = add_command(
        commands, "verify", "whether a configuration holds on this machine", run,
        "Trains under the configuration's budget for two epochs and 200 updates, or five seconds, and compares the "
        "peak memory. "
        "Exit code 1: it does not hold.",
    )  # fmt: skip
    command.add_argument(
        "config", help="a path, runs:/RUN_ID/best_config.json, models:/NAME@best, an experiment's name"
    )
    add_model_and_data(command)
    command.add_argument(
        "--peak-tolerance", metavar="SHARE", type=share, default=0.1,
        help="relative difference that peak memory may have; default: 0.1",
    )  # fmt: skip
    command.add_argument(
        "--whole", action="store_true",
        help="train the winning trial again and compare its objective too; MODULE:load must return validation data",
    )  # fmt: skip
    command.add_argument(
        "--objective-tolerance", metavar="DIFFERENCE", type=share, default=1e-6, help="with --whole; default: 1e-6"
    )
    add_json(command)
    add_tracking_uri(command)


def run(options: argparse.Namespace) -> int:
    from accumtune.config import load_config

    config = load_config(options.config, tracking_uri=options.tracking_uri)
    with only_the_answer() as answer:
        result, holds = _verify(config, options)
        if options.json:
            print_json(asdict(result), answer)
        else:
            print(result, file=answer)
    return 0 if holds else 1


def _verify(config: TrainingConfig, options: argparse.Namespace) -> tuple[Any, bool]:
    build_model, (x, y) = load_object(options.build_model), load_data(options.data)
    if not options.whole:
        return config.verify(build_model, x, y, peak_tolerance=options.peak_tolerance), True
    result = config.reproduce(build_model, x, y, validation_data=load_validation_data(options.data))
    return result, result.holds(options.objective_tolerance, options.peak_tolerance)
