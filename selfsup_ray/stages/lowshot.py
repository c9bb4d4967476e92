"""The stage `lowshot`: the low-shot protocol of label diffusion, its baselines and its choices.

Four steps, each kept when a run is interrupted: the nodes that all runs of a set-up share get
their neighbor lists once; every (n, seed) explores the hyper-parameters on the validation classes;
what is best there for each n runs on both set-ups; the table is written (spec sections 4 to 6).
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from selfsup_ray.artifacts import (
    Array,
    begin,
    finish,
    read_done,
    read_json,
    require_disk,
)
from selfsup_ray.cluster.shards import map_shards
from selfsup_ray.config import Resources
from selfsup_ray.errors import ConfigError
from selfsup_ray.ops.lowshot import SETUPS
from selfsup_ray.ops.neighbors import Neighbors
from selfsup_ray.stages.embed import Embeddings
from selfsup_ray.stages.graph import Features, Graph, Labels, label_array
from selfsup_ray.stages.lowshot_choice import Chosen, choose, choose_fusion, rates_of
from selfsup_ray.stages.lowshot_config import FolderConfig, LowShotConfig
from selfsup_ray.stages.lowshot_data import SetupImages, Sources, held_out, images_of_setups
from selfsup_ray.stages.lowshot_diffusion import ranges_that_fit
from selfsup_ray.stages.lowshot_pool import (
    Block,
    open_folder,
    require_fitting,
    write_block,
    write_pool,
)
from selfsup_ray.stages.lowshot_search import Nearest, require_search_memory, write_lists
from selfsup_ray.stages.lowshot_table import (
    mean_curves,
    table,
    write_results,
    write_seconds,
    write_tables,
)
from selfsup_ray.stages.lowshot_units import POOLS, Unit, Work, save_images
from selfsup_ray.stages.reduce import Reduced
from selfsup_ray.storage import local_beside, located, remove_tree

if TYPE_CHECKING:
    from selfsup_ray.tracking import Tracker

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LowShot:
    """Handle on a finished protocol: its table, and the curves over the number of steps."""

    path: Path
    table: dict[str, Any]

    @classmethod
    def open(cls, path: Path | str) -> LowShot:
        """Return the finished protocol in a folder.

        Raises ArtifactError when the stage has not finished there.
        """
        read_done(located(path))
        return cls(located(path), read_json(located(path) / "table.json"))

    @property
    def fingerprint(self) -> str:
        """Hash of the config and the inputs."""
        return read_done(self.path).fingerprint

    @property
    def curves(self) -> dict[str, Any]:
        """Hit rates after each number of steps, by set-up, method and n."""
        return dict(read_json(self.path / "curves.json"))

    def mean(self, method: str, *, n: int, number: str = "top5_all", setup: str = "test") -> float:
        """Return the mean over the seeds of a method's hit rate, such as `top5_novel`."""
        return float(self.table[setup][str(n)][method][number]["mean"])


def low_shot(
    features: Features,
    labels: Labels,
    config: LowShotConfig,
    *,
    out: Path | str,
    linear_features: Features | None = None,
    sources: Sources | None = None,
    class_names: list[str] | None = None,
    tracker: Tracker | None = None,
) -> LowShot:
    """Run the protocol on embeddings with labels; return the handle on its table.

    labels: (N,), -1 unknown. linear_features: rows of the same images that the linear classifier
    learns from instead, such as those before a reduction. sources: where each image came from, for
    lowshot.test.pattern; class_names: for messages and a split file with names. Nothing of the
    test set-up's labels chooses anything. Raises ConfigError when classes, shots or background do
    not fit the images.
    """
    out, began = located(out), time.monotonic()
    known = label_array(labels)
    if len(known) != len(features.array):
        raise ConfigError(f"lowshot: {len(known):,} labels, {len(features.array):,} embeddings.")
    is_test = held_out(known, config, sources)
    images = images_of_setups(known, is_test, config, class_names=class_names)
    background = _background_ids(images, known, is_test, config, features)
    _require_memory(images, background, features, config)
    inputs = {"features": features.fingerprint, "labels": _digest(known, is_test)}
    if linear_features is not None:
        inputs["linear"] = linear_features.fingerprint
    if folders := _folder_fingerprints(config):
        inputs["background"] = folders
    if begin(out, stage="lowshot", config=config, inputs=inputs):
        log.info("lowshot: %s is current", out)
        return LowShot.open(out)
    _require_room(out, images, background, features, config)
    for name, made in images.items():
        save_images(out / name, made)
        _write_pools(out, made, background[name], features, config)
    explored, final, chosen = _run_units(out, features, linear_features or features, config)
    rates = {unit: rates_of(config, chosen[unit.n], found) for unit, found in final.items()}
    made_table = table(config, rates, chosen)
    write_results(out / "results.csv", rates)
    write_tables(out, made_table, mean_curves(config, explored, final))
    facts = _facts(config, images, background, made_table)
    seconds = time.monotonic() - began
    if tracker is not None:
        tracker.log([{k: v for k, v in facts.items() if isinstance(v, int | float)}])
    finish(out, stage="lowshot", config=config, inputs=inputs, seconds=seconds, facts=facts)
    text = "lowshot: %d runs of %s, test top-5 of %s %.4f on all and %.4f on novel classes, %.1f s"
    shown = (facts["test_top5"], facts["test_top5_novel"], seconds)
    log.info(text, len(final), ", ".join(config.methods), config.headline, *shown)
    return LowShot.open(out)


def _digest(labels: Array, is_test: Array) -> str:
    digest = hashlib.blake2b(labels.astype("<i8").tobytes(), digest_size=16)
    digest.update(np.packbits(is_test).tobytes())
    return digest.hexdigest()


def _folder_fingerprints(config: LowShotConfig) -> str:
    """Return a digest of the other runs' embeddings and graphs; "" when no method uses any."""
    if "diffusion_background" not in config.methods or not config.background.folders:
        return ""
    prints = []
    for folder in config.background.folders:
        prints.append(Embeddings.open(folder.path).fingerprint)
        if folder.graph is not None:
            prints.append(Graph.open(folder.graph).fingerprint)
    return hashlib.sha256(" ".join(prints).encode()).hexdigest()


def _background_ids(
    images: Mapping[str, SetupImages],
    labels: Array,
    is_test: Array,
    config: LowShotConfig,
    features: Features,
) -> dict[str, Array]:
    """Return the corpus's background images of each set-up.

    Raises ConfigError when there is no background although a method wants one, or when a folder
    was embedded by another encoder.
    """
    empty = np.empty(0, np.int64)
    if "diffusion_background" not in config.methods:
        return dict.fromkeys(images, empty)
    for folder in config.background.folders:
        _require_same_space(features, folder.path)
        require_fitting(folder, dim=features.array.shape[1], width=config.k - 1)
    found = {
        name: made.background(config.background, labels, is_test) for name, made in images.items()
    }
    for name, ids in found.items():
        if not len(ids) and not config.background.folders:
            raise ConfigError(
                f"lowshot.methods has diffusion_background, but the set-up `{name}` has no "
                f"background image. Add lowshot.background.folders, set in_domain=true, or leave "
                f"the method out."
            )
    return found


def _folder_rows(config: LowShotConfig) -> dict[FolderConfig, int]:
    """Return the rows of every background folder; none when no method uses any."""
    if "diffusion_background" not in config.methods:
        return {}
    return {given: len(Embeddings.open(given.path)) for given in config.background.folders}


def _require_memory(
    images: Mapping[str, SetupImages],
    background: Mapping[str, Array],
    features: Features,
    config: LowShotConfig,
) -> None:
    """Raise ResourceError unless labels and searched rows fit `memory_gb`."""
    memory, folders = int(config.memory_gb * 1e9), _folder_rows(config)
    searched = [n for given, n in folders.items() if given.graph is None]
    for name, made in images.items():
        new = max(config.shots) * int(made.setup.is_novel.sum())
        nodes = len(made.base) + len(background[name]) + sum(folders.values()) + new
        if POOLS.keys() & set(config.methods):
            options = config.diffusion.options
            ranges_that_fit(made.setup.num_classes, nodes, options, memory_bytes=memory)
        searched += [len(made.base), len(background[name])]
    dim = features.array.shape[1]
    for n in searched:
        require_search_memory(n, dim, config.search, config.resources, memory_bytes=memory)


def _require_room(
    out: Path,
    images: Mapping[str, SetupImages],
    background: Mapping[str, Array],
    features: Features,
    config: LowShotConfig,
) -> None:
    """Raise ArtifactError unless the disk has room for shared rows and lists, and for the runs."""
    row, lists = features.array.shape[1] * 4, (config.k - 1) * 8
    others = sum(_folder_rows(config).values())
    nodes = {name: len(made.base) + len(background[name]) for name, made in images.items()}
    wanted = sum(n * (row + 2 * lists) + others * 2 * lists for n in nodes.values())
    # A run's adjacency: every link both ways at most, 4 bytes each.
    wanted += max(1, config.resources.workers) * (max(nodes.values()) + others) * lists
    require_disk(out, size_bytes=wanted)


def _require_same_space(features: Features, path: Path) -> None:
    """Raise ConfigError when another run's rows come from another encoder or reduction."""
    own, other = (_origin(located(p)) for p in (getattr(features, "path", path), path))
    for what in own.keys() & other.keys():
        if own[what] != other[what]:
            raise ConfigError(
                f"The background {path} was made by another {what} ({other[what][:12]}, this run's "
                f"is {own[what][:12]}). Make it with this run's {what}."
            )


def _origin(path: Path) -> dict[str, str]:
    """Return fingerprints of what made rows, where they are known: the encoder, the reduction."""
    if not (path / "config.yaml").exists():
        return {}
    made = yaml.safe_load((path / "config.yaml").read_text())
    if made["stage"] != "reduce":
        encoder = made["inputs"].get("encoder")
        return {} if encoder is None else {"encoder": str(encoder), "reduction": "none"}
    transform = Reduced.open(path).transform
    digest = hashlib.sha256(transform.matrix.tobytes() + transform.mean.tobytes())
    return {"reduction": digest.hexdigest()}


def _write_pools(
    out: Path, images: SetupImages, background: Array, features: Features, config: LowShotConfig
) -> None:
    """Write the nodes that all runs of a set-up share: `base`, and `background` with base.

    The base images are searched once for both. Nothing is done again in a continued run.
    """
    folder, width, source = out / images.name, config.k - 1, features.array
    wants_background = "diffusion_background" in config.methods
    names = ["base", "background"] if wants_background else ["base"]
    if all((folder / name / "pool.json").exists() for name in names):
        return
    ask: dict[str, Any] = {"width": width, "resources": config.resources}
    queries = source.rows(images.test_ids)

    def nearest(block: Block, k: int, name: str) -> Neighbors:
        write_lists(block, config.search, config.resources)
        return Nearest(folder / "nearest" / name, block, k).run(queries, config.resources)

    places = images.base
    base_ids, base_classes = images.train_ids[places], images.train_classes[places]
    base = write_block(folder / "base_block", source, base_ids, base_classes, width=width)
    in_base = nearest(base, config.widest, "base")
    write_pool(folder / "base", [base], [in_base], k=config.widest, **ask)
    if not wants_background:
        return
    blocks = [
        open_folder(out / f"folder{i}", given, width=width)
        for i, given in enumerate(config.background.folders)
    ]
    if len(background):
        place, unknown = folder / "background_block", np.full(len(background), -1, np.int64)
        blocks.append(write_block(place, source, background, unknown, width=width))
    tests = [nearest(block, config.k, str(i)) for i, block in enumerate(blocks)]
    tests.append(in_base)
    write_pool(folder / "background", [*blocks, base], tests, k=config.k, **ask)


def _run_units(
    out: Path, features: Features, linear: Features, config: LowShotConfig
) -> tuple[dict[Unit, dict[str, Any]], dict[Unit, dict[str, Any]], dict[int, Chosen]]:
    """Return what every unit found, explored and final, and the hyper-parameters of each n."""
    units = {
        setup: tuple(Unit(setup, n, seed) for n in config.shots for seed in config.seeds)
        for setup in SETUPS
    }
    paths = [each.array.path.absolute() for each in (features, linear)]
    place = (out.absolute(), paths[0], paths[1], config)
    explore = Work(*place, units["val"])
    _run(explore, config.resources, label="lowshot: validation")
    explored = explore.results()
    chosen = {
        n: choose(config, [explored[Unit("val", n, seed)] for seed in config.seeds])
        for n in config.shots
    }
    work = Work(*place, (*units["val"], *units["test"]), chosen)
    _run(work, config.resources, label="lowshot: chosen")
    final = work.results()
    for n in config.shots:
        fusion, validation = choose_fusion(
            config, [final[Unit("val", n, seed)] for seed in config.seeds]
        )
        both = {**chosen[n].validation, **validation}
        chosen[n] = replace(chosen[n], fusion=fusion, validation=both)
    remove_tree(local_beside(out) / "scratch")
    write_seconds(out / "seconds.csv", {"explore": explore.seconds(), "final": work.seconds()})
    return explored, final, chosen


def _run(work: Work, resources: Resources, *, label: str) -> None:
    for _ in map_shards(work, work.missing, resources, label=label):
        pass


def _facts(
    config: LowShotConfig,
    images: Mapping[str, SetupImages],
    background: Mapping[str, Array],
    made: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the numbers of the stage's stamp: sizes, and the headline method's top-5.

    `validation_top5` is the mean over n on all validation classes, what a sweep may maximise.
    """
    test = images["test"]
    facts: dict[str, Any] = {
        "method": config.headline,
        "num_classes": test.setup.num_classes,
        "num_novel": int(test.setup.is_novel.sum()),
        "base_images": len(test.base),
        "background_images": len(background["test"]),
        "test_images": len(test.test_ids),
    }
    for name, setup in (("validation", "val"), ("test", "test")):
        for number in ("top1_all", "top1_novel", "top5_all", "top5_novel"):
            means = [made[setup][str(n)][config.headline][number]["mean"] for n in config.shots]
            facts[f"{name}_{number.removesuffix('_all')}"] = float(np.mean(means))
    return facts
