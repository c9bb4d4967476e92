"""Commands that take files in and out: imports, exports, checkpoints, neighbors of new images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from selfsup_ray.artifacts import write_text
from selfsup_ray.errors import ConfigError
from selfsup_ray.storage import located

Commands = Any  # argparse keeps the type of its subparsers to itself


def add_file_commands(commands: Commands) -> None:
    """Add all of them to a parser's commands."""
    _add_weights(commands)
    _add_import_features(commands)
    _add_import_graph(commands)
    _add_export_graph(commands)
    _add_export_features(commands)
    _add_neighbors(commands)


def location(text: str) -> Path:
    """Return a folder or file, or one on an object store, as argparse wants it."""
    try:
        return located(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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
    command.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="how rows are stored"
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


def _add_export_features(commands: Commands) -> None:
    """selfsup-ray export-features RUN_FOLDER/embed --format hdf5 --out FOLDER"""
    command = commands.add_parser(
        "export-features", help="write embeddings as files that other programs read"
    )
    command.add_argument("features", type=location, metavar="FOLDER", help="of embed or reduce")
    command.add_argument(
        "--format",
        choices=("float32", "hdf5", "index"),
        default="float32",
        help="float32: a raw matrix; hdf5: blocks with labels; index: a flat index of faiss",
    )
    command.add_argument("--out", type=location, required=True, metavar="FOLDER")
    command.set_defaults(call=_export_features)


def _add_neighbors(commands: Commands) -> None:
    """selfsup-ray neighbors RUN_FOLDER IMAGE [IMAGE …] [--k K] [--out FILE.csv]"""
    command = commands.add_parser(
        "neighbors", help="find the images of a finished run that are nearest to new images"
    )
    command.add_argument("run", type=location, metavar="RUN_FOLDER")
    command.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    command.add_argument("--k", type=int, default=10, metavar="K", help="neighbors of each image")
    command.add_argument("--out", type=location, metavar="FILE.csv", help="default: print them")
    _add_workers(command)
    command.set_defaults(call=_neighbors)


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


def _weights(options: argparse.Namespace) -> None:
    from selfsup_ray.models.weights import inspect_foreign

    print(inspect_foreign(options.checkpoint))


def _import_features(options: argparse.Namespace) -> None:
    from selfsup_ray.config import Resources
    from selfsup_ray.stages.imported import ImportFeaturesConfig, import_features

    config = ImportFeaturesConfig(
        dim=options.dim,
        rows=options.rows,
        normalize=not options.keep_length,
        dtype=options.dtype,
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


def _export_features(options: argparse.Namespace) -> None:
    from selfsup_ray.stages.embed import Embeddings
    from selfsup_ray.stages.interop import export_features

    features = Embeddings.open(options.features)
    for path in export_features(features, options.out, format=options.format):
        print(path)


def _neighbors(options: argparse.Namespace) -> None:
    from selfsup_ray.config import Resources
    from selfsup_ray.stages.new_images import as_csv, nearest_images

    ask = Resources(workers=options.workers)
    found = nearest_images(options.run, options.images, k=options.k, resources=ask)
    if options.out is None:
        print(as_csv(found), end="")
        return
    write_text(options.out, as_csv(found))
    print(options.out)
