"""The layers of the architecture, checked on every import, those inside functions included."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parent.parent / "selfsup_ray"
LEVELS = {
    **dict.fromkeys(["ops", "errors", "credentials", "config", "artifacts"], 0),
    **dict.fromkeys(["collectives", "resources"], 0),
    **dict.fromkeys(["storage", "storage_cache", "object_store", "run_lock"], 0),
    **dict.fromkeys(["mlflow_store", "tracking", "plots", "plots_bars", "progress", "memory"], 0),
    **dict.fromkeys(["interrupts", "last_word"], 0),
    **dict.fromkeys(["models", "data", "training", "batches", "optim"], 1),
    "cluster": 2,
    "stages": 3,
    **dict.fromkeys(
        [
            "experiment",
            "steps",
            "costs",
            "costs_graph",
            "costs_network",
            "costs_classify",
            "costs_labelled",
            "costs_lowshot",
            "costs_sela",
            "costs_counts",
            "costs_instances",
            "costs_traffic",
            "costs_training",
            "planning",
            "planning_cluster",
            "planning_text",
            "pipeline",
            "sweep_config",
            "sweep_trial",
            "sweeping",
            "report",
        ],
        4,
    ),
    **dict.fromkeys(["report_clusters", "report_confusion", "report_html", "report_images"], 4),
    **dict.fromkeys(
        ["report_diffuse", "report_lowshot", "report_run", "report_scores", "report_sections"], 4
    ),
    **dict.fromkeys(["report_patches", "report_sela"], 4),
    **dict.fromkeys(["report_graph", "report_map", "report_neighbors"], 4),
    **dict.fromkeys(
        [
            "report_classes",
            "report_classify",
            "report_labelled",
            "report_layers",
            "report_dimension",
            "report_published",
            "report_results",
            "report_sweep",
            "report_sweep_space",
        ],
        4,
    ),
    **dict.fromkeys(["cli", "cli_files", "__init__", "__main__"], 5),
}
# Imports between two packages of one level that the design asks for; the other way is refused.
SIDEWAYS = {
    ("training", "models"),  # fit runs an Objective
    ("training", "data"),  # over a Dataset
    ("batches", "data"),  # whose images it cuts into batches
    ("models", "data"),  # an Encoder embeds image files too
    ("ops", "artifacts"),  # the type of arrays; an IndexShard reads its rows from disk
    ("ops", "storage"),  # and removes what only an interrupted run needs
    ("ops", "errors"),  # which every module may import
    ("ops", "collectives"),  # the type of a reduction and the identity, to be handed the others
    ("plots_bars", "plots"),  # one figure more, in the same colors
    ("collectives", "memory"),  # what one rank gathers may lie in a temporary file
}
COLLECTIVES_IN_OPS = ("selfsup_ray.collectives.Reduce", "selfsup_ray.collectives.identity")
# Where each third-party module may be imported: a folder ends in /.
OWNERS = {
    "ray": ["cluster/"],
    "torch.distributed": ["collectives.py", "training.py", "cluster/process_group.py"],
    "faiss": ["ops/index.py", "ops/approximate.py", "ops/faiss_files.py", "ops/faiss_kmeans.py"],
    "mlflow": ["mlflow_store.py", "tracking.py"],
    "matplotlib": ["plots.py", "plots_bars.py", "report.py"],
}


class Import(NamedTuple):
    """One imported module (dotted name), where."""

    path: str
    line: int
    module: str


def modules_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted module or attribute) of every import and every torch.distributed use."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=str(module), names=names):
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in names)
            case ast.ImportFrom(names=names):
                yield from ((node.lineno, f"selfsup_ray.{alias.name}") for alias in names)
            case ast.Attribute(value=ast.Name(id="torch"), attr="distributed"):
                yield node.lineno, "torch.distributed"
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(str(name))]):
                yield node.lineno, name


def all_imports() -> list[Import]:
    return [
        Import(str(path.relative_to(PACKAGE)), line, module)
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, module in modules_in(ast.parse(path.read_text()))
    ]


def layer(path: str) -> str:
    """Return the package or top-level module a file belongs to: models/encoder.py -> models."""
    return path.split("/")[0].removesuffix(".py")


def own_target(module: str) -> str | None:
    """Return the file of an import from this package, relative to it; None for other packages."""
    first, *parts = module.split(".")
    if first != "selfsup_ray":
        return None
    for length in range(len(parts), 0, -1):
        base = PACKAGE.joinpath(*parts[:length])
        if base.with_suffix(".py").exists():
            return str(base.with_suffix(".py").relative_to(PACKAGE))
        if (base / "__init__.py").exists():
            return str((base / "__init__.py").relative_to(PACKAGE))
    return "__init__.py"


def is_allowed(path: str, target: str) -> bool:
    importer, imported = layer(path), layer(target)
    if importer == imported or LEVELS[imported] < LEVELS[importer]:
        return True
    both_are_files = "/" not in path and "/" not in target
    same_level = LEVELS[imported] == LEVELS[importer]
    return same_level and (both_are_files or (importer, imported) in SIDEWAYS)


def test_every_module_has_a_level():
    unknown = {layer(str(p.relative_to(PACKAGE))) for p in PACKAGE.rglob("*.py")} - LEVELS.keys()
    assert not unknown, f"give {unknown} a level in LEVELS and in the architecture"


def test_a_module_imports_its_own_package_and_lower_levels_only():
    wrong = [
        f"selfsup_ray/{path}:{line} imports {module}"
        for path, line, module in all_imports()
        if (target := own_target(module)) is not None and not is_allowed(path, target)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_mathematics_in_ops_knows_no_config_and_no_rank():
    wrong = [
        f"selfsup_ray/{path}:{line} imports {module}"
        for path, line, module in all_imports()
        if layer(path) == "ops"
        and (target := own_target(module)) is not None
        and layer(target) in ("config", "collectives", "mlflow_store", "tracking", "plots")
        and module not in COLLECTIVES_IN_OPS
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", OWNERS)
def test_a_package_is_imported_by_its_owners_only(package: str):
    wrong = [
        f"selfsup_ray/{path}:{line} imports {module}"
        for path, line, module in all_imports()
        if f"{module}.".startswith(f"{package}.")
        and not any(path == owner or path.startswith(f"{owner}") for owner in OWNERS[package])
    ]
    assert not wrong, "\n".join(wrong)


def test_no_two_modules_import_each_other():
    below: dict[str, set[str]] = {}
    for path, _, module in all_imports():
        target = own_target(module)
        if target not in (None, path, "__init__.py"):
            below.setdefault(path, set()).add(str(target))
    finished: set[str] = set()

    def visit(path: str, above: tuple[str, ...]) -> None:
        assert path not in above, " -> ".join([*above[above.index(path) :], path])
        if path not in finished:
            for target in sorted(below.get(path, set())):
                visit(target, (*above, path))
            finished.add(path)

    for path in list(below):
        visit(path, ())


def test_the_command_line_and_the_package_import_nothing_heavy():
    code = (
        "import sys, selfsup_ray, selfsup_ray.cli\n"
        "heavy = {'torch', 'torchvision', 'ray', 'mlflow', 'faiss', 'matplotlib', 'sklearn',"
        " 'scipy', 'pandas', 'umap', 'optuna'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_the_check_sees_imports_inside_functions_and_by_name():
    source = (
        "def f():\n    import ray.data\n    from selfsup_ray.stages import scan\n"
        "    importlib.import_module('faiss')\n    return torch.distributed.get_rank()\n"
    )
    found = list(modules_in(ast.parse(source)))
    assert sorted(found) == [
        (2, "ray.data"),
        (3, "selfsup_ray.stages.scan"),
        (4, "faiss"),
        (5, "torch.distributed"),
    ]
    assert not is_allowed("training.py", "cluster/train.py")
    assert not is_allowed("data/corpus.py", "models/encoder.py")
    assert is_allowed("models/encoder.py", "data/decode.py")
    assert is_allowed("cli.py", "pipeline.py")
