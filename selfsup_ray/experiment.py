"""Experiment: the configs of a whole run, and the rules between its stages."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from selfsup_ray.config import NonNegative, config, override
from selfsup_ray.errors import ConfigError
from selfsup_ray.models.pretext import check_method
from selfsup_ray.stages import STAGES
from selfsup_ray.stages.diffuse import DiffuseConfig
from selfsup_ray.stages.dimension_config import DimensionConfig
from selfsup_ray.stages.embed import EmbedConfig
from selfsup_ray.stages.evaluate import EvaluateConfig
from selfsup_ray.stages.export import ExportConfig
from selfsup_ray.stages.graph import GraphConfig
from selfsup_ray.stages.ingest import IngestConfig
from selfsup_ray.stages.lowshot_config import LowShotConfig
from selfsup_ray.stages.pretext import PretextConfig
from selfsup_ray.stages.probe import ProbeConfig
from selfsup_ray.stages.reduce import ReduceConfig
from selfsup_ray.stages.scan import ScanConfig
from selfsup_ray.stages.selflabel import SelfLabelConfig
from selfsup_ray.tracking import TrackingConfig

NEEDS: dict[str, tuple[str, ...]] = {
    "ingest": (),
    "dimension": ("ingest",),
    "pretext": ("ingest",),
    "embed": ("ingest", "pretext"),
    "reduce": ("embed",),
    "graph": ("embed",),
    "scan": ("ingest", "pretext", "graph"),
    "selflabel": ("ingest", "scan"),
    "diffuse": ("ingest", "graph"),
    "probe": ("ingest", "embed"),
    "lowshot": ("ingest", "embed"),
    "evaluate": ("ingest", "embed"),
    "export": ("ingest", "pretext"),
}
"""Stages whose result a stage cannot do without."""

USES: dict[str, tuple[str, ...]] = {
    "graph": ("reduce",),
    "lowshot": ("reduce",),
    "evaluate": ("graph", "scan", "selflabel"),
    "export": ("scan", "selflabel"),
}
"""Stages whose result a stage reads too when the experiment has them."""


@config
class Experiment:
    """A run: its folder and one config per stage; a stage runs when its key is present."""

    out: Path
    """The run folder; every stage owns the subfolder of its name."""
    seed: NonNegative = 0
    """Added to every stage's own seed, so that one key repeats a whole run with other numbers."""
    tracking: TrackingConfig = TrackingConfig()
    ingest: IngestConfig | None = None
    dimension: DimensionConfig | None = None
    pretext: PretextConfig | None = None
    embed: EmbedConfig | None = None
    reduce: ReduceConfig | None = None
    graph: GraphConfig | None = None
    scan: ScanConfig | None = None
    selflabel: SelfLabelConfig | None = None
    diffuse: DiffuseConfig | None = None
    probe: ProbeConfig | None = None
    lowshot: LowShotConfig | None = None
    evaluate: EvaluateConfig | None = None
    export: ExportConfig | None = None

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError(f"give at least one stage: {', '.join(STAGES)}")
        if self.ingest and self.ingest.source is None:
            raise ValueError("ingest.source is required: a folder, glob, table or archive")
        for stage in self.stages:
            for needed in NEEDS[stage]:
                if needed not in self.stages:
                    raise ValueError(f"{stage} needs {needed}: add the key `{needed}: {{}}`")
        if self.pretext and self.pretext.epochs:
            check_method(self.pretext.method, batch_size=self.pretext.batch_size)
        if self.scan and self.graph and self.scan.num_neighbors > self.graph.k:
            raise ValueError(
                f"scan.num_neighbors={self.scan.num_neighbors} is more than the "
                f"graph.k={self.graph.k} neighbors that are mined; raise graph.k"
            )

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages that have a key, in order."""
        return tuple(name for name in STAGES if getattr(self, name) is not None)

    def inputs(self, stage: str) -> tuple[str, ...]:
        """Return the stages of this experiment whose results a stage reads."""
        wanted = (*NEEDS[stage], *USES.get(stage, ()))
        return tuple(name for name in self.stages if name in wanted)

    def folder(self, stage: str) -> Path:
        """Return the folder a stage owns."""
        return self.out / stage


def seeded(experiment: Experiment) -> Experiment:
    """Return the experiment with its seed moved into the stages that have one."""
    with_seed = [s for s in experiment.stages if _has_seed(getattr(experiment, s))]
    changes: dict[str, Any] = {
        f"{stage}.seed": experiment.seed + getattr(experiment, stage).seed for stage in with_seed
    }
    return override(experiment, {**changes, "seed": 0})


def _has_seed(stage: Any) -> bool:
    return any(f.name == "seed" for f in dataclasses.fields(stage))


def require_stages(experiment: Experiment, names: list[str]) -> None:
    """Raise ConfigError unless the experiment has a key for each of these stages."""
    for name in names:
        if name not in experiment.stages:
            raise ConfigError(
                f"This experiment has no stage `{name}`. It has: {', '.join(experiment.stages)}."
            )
