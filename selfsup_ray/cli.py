"""The command line: parses and calls; everything worth testing is a function elsewhere."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from selfsup_ray.artifacts import FULL, full_disk
from selfsup_ray.cli_files import Commands, add_file_commands, location
from selfsup_ray.config import parse_assignment
from selfsup_ray.errors import STORAGE, ConfigError, UserError, failed_storage
from selfsup_ray.last_word import spoken
from selfsup_ray.stages import STAGES


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 1 for a bug, 2 for a user's mistake, 130."""
    options = parsed(arguments)
    set_up_logging(quiet=options.quiet)
    goodbye = _Goodbye()
    signal.signal(signal.SIGTERM, goodbye.stop)
    try:
        options.call(options)
    except UserError as error:
        print(f"selfsup-ray: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in STORAGE | {*FULL}:
            raise
        full = error.errno in FULL
        said = full_disk(error.filename or "A file") if full else failed_storage(error)
        print(f"selfsup-ray: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goodbye.say()
        return 130
    return 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line; key=value may stand before and after the options."""
    top = parser()
    options, rest = top.parse_known_args(arguments)
    try:
        if rest and (not hasattr(options, "changes") or any(a.startswith("-") for a in rest)):
            raise ConfigError(f"unrecognized arguments: {' '.join(rest)}")
        if rest:
            options.changes = [*options.changes, *map(parse_assignment, rest)]
    except ConfigError as error:
        top.error(str(error))
    return options


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = argparse.ArgumentParser(
        prog="selfsup-ray",
        description="From a folder of images to clusters, on one machine or a Ray cluster.",
    )
    top.add_argument("--quiet", action="store_true", help="say warnings and errors only")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    _add_plan(commands)
    _add_sweep(commands)
    _add_report(commands)
    add_file_commands(commands)
    return top


def assignment(text: str) -> tuple[str, Any]:
    """Return (dotted key, value) of a `key=value` argument."""
    try:
        return parse_assignment(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_run(commands: Commands) -> None:
    """selfsup-ray run EXPERIMENT.yaml [key=value …] [--only STAGE …] [--until STAGE]"""
    command = commands.add_parser(
        "run", help="run the stages of an experiment that are not up to date"
    )
    _add_experiment(command)
    _add_selection(command)
    _add_address(command)
    command.set_defaults(call=_run)


def _add_plan(commands: Commands) -> None:
    """selfsup-ray plan EXPERIMENT.yaml [key=value …] [--address ADDR | --cluster FILE] [--json]"""
    command = commands.add_parser(
        "plan", help="show which stages would run and why, with memory, disk and time of each"
    )
    _add_experiment(command)
    _add_selection(command)
    where = command.add_mutually_exclusive_group()
    where.add_argument("--address", metavar="ADDR", help="plan for this Ray cluster, e.g. auto")
    where.add_argument(
        "--cluster", type=Path, metavar="CLUSTER.yaml", help="plan for what `ray up` would start"
    )
    command.add_argument(
        "--price",
        action="append",
        default=[],
        type=assignment,
        metavar="TYPE=DOLLARS",
        help="an hour of a node or machine type, where it is not the list price",
    )
    command.add_argument("--json", action="store_true", help="print the plan as JSON")
    command.set_defaults(call=_plan)


def _add_sweep(commands: Commands) -> None:
    """selfsup-ray sweep SWEEP.yaml [key=value …]"""
    command = commands.add_parser(
        "sweep", help="search over config keys of an experiment; a trial is a config"
    )
    command.add_argument("sweep", type=Path, metavar="SWEEP.yaml")
    _add_changes(command)
    _add_address(command)
    command.set_defaults(call=_sweep)


def _add_report(commands: Commands) -> None:
    """selfsup-ray report RUN_FOLDER"""
    command = commands.add_parser(
        "report", help="write report.html of a run folder again, or the table of a folder of runs"
    )
    command.add_argument("run", type=location, metavar="RUN_FOLDER")
    command.set_defaults(call=_report)


def _add_experiment(command: argparse.ArgumentParser) -> None:
    command.add_argument("experiment", type=Path, metavar="EXPERIMENT.yaml")
    _add_changes(command)


def _add_changes(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "changes",
        nargs="*",
        type=assignment,
        metavar="key=value",
        help="change a dotted config key, e.g. pretext.epochs=10",
    )


def _add_selection(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--only", nargs="+", choices=STAGES, metavar="STAGE", help=f"of {', '.join(STAGES)}"
    )
    command.add_argument("--until", choices=STAGES, metavar="STAGE", help="the last stage to run")


def _add_address(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--address", metavar="ADDR", help="a Ray cluster, e.g. auto; default: this machine"
    )


def _run(options: argparse.Namespace) -> None:
    from selfsup_ray import pipeline

    result = pipeline.run(
        options.experiment,
        dict(options.changes),
        only=options.only,
        until=options.until,
        address=options.address,
    )
    print(result.text())


def _plan(options: argparse.Namespace) -> None:
    from selfsup_ray import planning

    made = planning.plan(
        options.experiment,
        dict(options.changes),
        only=options.only,
        until=options.until,
        cluster=planning.cluster_of(options.address, options.cluster),
        prices=planning.checked_prices(dict(options.price)),
    )
    print(made.json() if options.json else made.text())


def _sweep(options: argparse.Namespace) -> None:
    from selfsup_ray import sweeping

    print(sweeping.sweep(options.sweep, dict(options.changes), address=options.address).text())


def _report(options: argparse.Namespace) -> None:
    from selfsup_ray.report import write_report

    print(write_report(options.run))


class _Stderr(logging.StreamHandler[Any]):
    """Writes to what sys.stderr is now: a live progress bar takes its place while it is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def set_up_logging(*, quiet: bool) -> None:
    """Send this package's log lines, and others' warnings, to standard error."""
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("selfsup_ray").setLevel(logging.WARNING if quiet else logging.INFO)


class _Goodbye:
    """Says once that nothing is lost: at a SIGTERM at once, since a SIGKILL may follow soon."""

    LINE = b"selfsup-ray: stopped; the same command continues from here.\n"

    def __init__(self) -> None:
        self.said = False

    def say(self) -> None:
        """Write the line, past buffers that the signal may have found half written."""
        if not self.said:
            self.said = True
            os.write(2, self.LINE)
            spoken()

    def stop(self, signum: int, frame: FrameType | None) -> NoReturn:
        """Handle SIGTERM."""
        self.say()
        raise KeyboardInterrupt
