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
from selfsup_ray.config import parse_assignment
from selfsup_ray.errors import STORAGE, ConfigError, UserError, failed_storage
from selfsup_ray.stages import STAGES
from selfsup_ray.storage import located

Commands = Any  # argparse keeps the type of its subparsers to itself


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
    _add_weights(commands)
    _add_import_features(commands)
    _add_import_graph(commands)
    _add_export_graph(commands)
    return top


def location(text: str) -> Path:
    """Return a folder or file, or one on an object store, as argparse wants it."""
    try:
        return located(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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


def _add_import_features(commands: Commands) -> None:
    """selfsup-ray import-features FILE [FILE …] --out FOLDER [--dim D] [--rows N]"""
    command = commands.add_parser(
        "import-features",
        help="make an embeddings folder from a raw float32 matrix, HDF5 blocks or a faiss index",
    )
    command.add_argument("files", type=Path, nargs="+", metavar="FILE")
    command.add_argument("--out", type=location, required=True, metavar="FOLDER")
    command.add_argument("--dim", type=int, metavar="D", help="numbers in a row of a raw matrix")
    command.add_argument("--rows", type=int, metavar="N", help="only the first N rows")
    command.add_argument(
        "--keep-length", action="store_true", help="do not make unit rows: for the stage reduce"
    )
    _add_workers(command)
    command.set_defaults(call=_import_features)


def _add_import_graph(commands: Commands) -> None:
    """selfsup-ray import-graph ndis1000000_k32_I_11.int32 --out FOLDER [--features FOLDER]"""
    command = commands.add_parser(
        "import-graph", help="make a graph folder from files of neighbor ids and similarities"
    )
    command.add_argument("file", type=Path, metavar="FILE")
    command.add_argument("--out", type=location, required=True, metavar="FOLDER")
    command.add_argument("--k", type=int, metavar="K", help="entries in a row, itself counted")
    command.add_argument("--similarity", type=Path, metavar="FILE", help="default: D_ for I_")
    command.add_argument(
        "--features",
        type=location,
        metavar="FOLDER",
        help="embeddings; then the recall is measured",
    )
    command.add_argument(
        "--min-recall", type=float, metavar="SHARE", help="stop when the measured recall is lower"
    )
    _add_workers(command)
    command.set_defaults(call=_import_graph)


def _add_export_graph(commands: Commands) -> None:
    """selfsup-ray export-graph RUN_FOLDER --format csr --out PATH"""
    command = commands.add_parser(
        "export-graph", help="write a run's graph as files that other programs read"
    )
    command.add_argument("graph", type=location, metavar="FOLDER", help="of a run or of its graph")
    command.add_argument(
        "--format",
        choices=("csr", "distances", "int32"),
        default="csr",
        help="csr: similarities for scipy; distances: the same for scikit-learn's "
        "metric='precomputed'; int32: raw ids and similarities",
    )
    command.add_argument("--out", type=location, required=True, metavar="PATH")
    command.set_defaults(call=_export_graph)


def _add_weights(commands: Commands) -> None:
    """selfsup-ray weights CHECKPOINT"""
    command = commands.add_parser(
        "weights", help="say which ResNet a checkpoint holds, where, and how to embed with it"
    )
    command.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    command.set_defaults(call=_weights)


def _add_workers(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workers", type=int, default=0, metavar="W", help="Ray workers; 0: this process"
    )


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


def _weights(options: argparse.Namespace) -> None:
    from selfsup_ray.models.weights import inspect_foreign

    print(inspect_foreign(options.checkpoint))


def _report(options: argparse.Namespace) -> None:
    from selfsup_ray.report import write_report

    print(write_report(options.run))


def _import_features(options: argparse.Namespace) -> None:
    from selfsup_ray.config import Resources
    from selfsup_ray.stages.imported import ImportFeaturesConfig, import_features

    config = ImportFeaturesConfig(
        dim=options.dim,
        rows=options.rows,
        normalize=not options.keep_length,
        resources=Resources(workers=options.workers),
    )
    print(import_features(options.files, config, out=options.out).path)


def _import_graph(options: argparse.Namespace) -> None:
    from selfsup_ray.config import Resources
    from selfsup_ray.stages.embed import Embeddings
    from selfsup_ray.stages.imported import ImportGraphConfig, import_graph

    made = import_graph(
        options.file,
        ImportGraphConfig(
            k=options.k,
            min_recall=options.min_recall,
            resources=Resources(workers=options.workers),
        ),
        out=options.out,
        similarity=options.similarity,
        features=Embeddings.open(options.features) if options.features else None,
    )
    print(made.path)


def _export_graph(options: argparse.Namespace) -> None:
    from selfsup_ray.stages.interop import export_graph, find_graph

    for path in export_graph(find_graph(options.graph), options.out, format=options.format):
        print(path)


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

    def stop(self, signum: int, frame: FrameType | None) -> NoReturn:
        """Handle SIGTERM."""
        self.say()
        raise KeyboardInterrupt


if __name__ == "__main__":
    raise SystemExit(main())
