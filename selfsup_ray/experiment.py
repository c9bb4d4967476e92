"""Experiment: the configs of a whole run, and the rules between its stages."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from selfsup_ray.config import NonNegative, config, override
from selfsup_ray.errors import ConfigError
from selfsup_ray.mlflow_store import TrackingConfig
from selfsup_ray.models.patch_backbone import PIXEL_MEAN, PIXEL_STD
from selfsup_ray.models.pretext import check_method
from selfsup_ray.stages import STAGES
from selfsup_ray.stages.classify_config import ClassifyConfig
from selfsup_ray.stages.diffuse import DiffuseConfig
from selfsup_ray.stages.dimension_config import DimensionConfig
from selfsup_ray.stages.embed import EmbedConfig
from selfsup_ray.stages.evaluate import EvaluateConfig
from selfsup_ray.stages.export import ExportConfig
from selfsup_ray.stages.graph import GraphConfig
from selfsup_ray.stages.ingest import IngestConfig
from selfsup_ray.stages.labelled_config import FinetuneProtocol, LinearProtocol
from selfsup_ray.stages.lowshot_config import LowShotConfig
from selfsup_ray.stages.maps import MapsConfig
from selfsup_ray.stages.patches import PatchesConfig
from selfsup_ray.stages.pretext import PretextConfig
from selfsup_ray.stages.probe import ProbeConfig
from selfsup_ray.stages.reduce import ReduceConfig
from selfsup_ray.stages.scan import ScanConfig
from selfsup_ray.stages.sela import SeLaConfig, require_views
from selfsup_ray.stages.selflabel import SelfLabelConfig
from selfsup_ray.stages.voc07 import Voc07Config
from selfsup_ray.stages.whiten import WhitenConfig
from selfsup_ray.storage import Place

ENCODERS = ("pretext", "sela", "patches")
"""Stages that make the encoder which later stages read; an experiment has one of them."""
ENCODER = "encoder"
"""Stands in NEEDS for the one of ENCODERS that an experiment has."""

NEEDS: dict[str, tuple[str, ...]] = {
    "ingest": (),
    "dimension": ("ingest",),
    "pretext": ("ingest",),
    "sela": ("ingest",),
    "whiten": ("ingest",),
    "patches": ("ingest", "whiten"),
    "classify": ("ingest",),
    "embed": ("ingest", ENCODER),
    "maps": ("ingest", ENCODER),
    "reduce": ("embed",),
    "graph": ("embed",),
    "scan": ("ingest", ENCODER, "graph"),
    "selflabel": ("ingest", "scan"),
    "diffuse": ("ingest", "graph"),
    "probe": ("ingest", "embed"),
    "linear": ("ingest", ENCODER),
    "finetune": ("ingest", ENCODER),
    "lowshot": ("ingest", "embed"),
    "voc07": ("ingest", "embed"),
    "evaluate": ("ingest", "embed"),
    "export": ("ingest", ENCODER),
}
"""Stages whose result a stage cannot do without."""

FROM_ROWS = ("embed", "reduce", "graph", "diffuse", "lowshot")
"""Stages of a run on published features, which has rows but no images."""

USES: dict[str, tuple[str, ...]] = {
    "classify": ("patches",),
    "graph": ("reduce",),
    "linear": ("embed",),
    "lowshot": ("reduce",),
    "evaluate": ("graph", "sela", "scan", "selflabel"),
    "export": ("sela", "scan", "selflabel", "diffuse"),
}
"""Stages whose result a stage reads too when the experiment has them."""


@config
class Experiment:
    """A run: its folder and one config per stage; a stage runs when its key is present."""

    out: Place
    """The run folder; every stage owns the subfolder of its name."""
    seed: NonNegative = 0
    """Added to every stage's own seed, so that one key repeats a whole run with other numbers."""
    tracking: TrackingConfig = TrackingConfig()
    ingest: IngestConfig | None = None
    dimension: DimensionConfig | None = None
    pretext: PretextConfig | None = None
    sela: SeLaConfig | None = None
    whiten: WhitenConfig | None = None
    patches: PatchesConfig | None = None
    classify: ClassifyConfig | None = None
    embed: EmbedConfig | None = None
    maps: MapsConfig | None = None
    reduce: ReduceConfig | None = None
    graph: GraphConfig | None = None
    scan: ScanConfig | None = None
    selflabel: SelfLabelConfig | None = None
    diffuse: DiffuseConfig | None = None
    probe: ProbeConfig | None = None
    linear: LinearProtocol | None = None
    finetune: FinetuneProtocol | None = None
    lowshot: LowShotConfig | None = None
    voc07: Voc07Config | None = None
    evaluate: EvaluateConfig | None = None
    export: ExportConfig | None = None

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError(f"give at least one stage: {', '.join(STAGES)}")
        if self.ingest and self.ingest.source is None:
            raise ValueError("ingest.source is required: a folder, glob, table or archive")
        for stage in self.stages:
            self._require_inputs(stage)
        if self.pretext and self.pretext.epochs:
            check_method(self.pretext.method, batch_size=self.pretext.batch_size)
        if self.scan and self.graph and self.scan.num_neighbors > self.graph.k:
            raise ValueError(
                f"scan.num_neighbors={self.scan.num_neighbors} is more than the "
                f"graph.k={self.graph.k} neighbors that are mined; raise graph.k"
            )
        if self.linear and self.linear.features == "embeddings" and not self.embed:
            raise ValueError("linear.features=embeddings needs embed: add the key `embed: {}`")
        if self.sela and self.ingest:
            require_views(self.sela, self.ingest.image_size)
        if self.probe and self.probe.knn_index == "graph" and not self.graph:
            raise ValueError("probe.knn_index=graph needs graph: add the key `graph: {}`")
        self._require_patches()
        self._require_unit_rows()

    def _require_unit_rows(self) -> None:
        imported = self.embed.imported if self.embed else None
        searched = any(name in self.stages for name in ("graph", "lowshot"))
        if imported and not imported.normalize and searched and not self.reduce:
            raise ValueError(
                "embed.imported.normalize is False, but neighbors are searched among unit rows; "
                "add `reduce: {}`, which makes them, or set it to True"
            )

    def _require_inputs(self, stage: str) -> None:
        if self.is_imported and stage not in FROM_ROWS:
            raise ValueError(
                f"embed.imported gives rows without images, on which {stage} cannot run; leave "
                f"out {stage}, or embed.imported. What can run: {', '.join(FROM_ROWS)}"
            )
        for needed in self._needs(stage):
            if needed == ENCODER and not any(name in self.stages for name in ENCODERS):
                raise ValueError(
                    f"{stage} needs pretext: add the key `pretext: {{}}`, or `whiten: {{}}` and "
                    f"`patches: {{}}`, or `sela: {{}}`"
                )
            if needed not in (*self.stages, ENCODER):
                raise ValueError(f"{stage} needs {needed}: add the key `{needed}: {{}}`")

    def _require_patches(self) -> None:
        if self.whiten and self.ingest and self.whiten.patch_size > self.ingest.image_size:
            raise ValueError(
                f"whiten.patch_size={self.whiten.patch_size} does not fit into images of "
                f"ingest.image_size={self.ingest.image_size}; lower it"
            )
        if self.classify and self.classify.needs_dictionary and not self.patches:
            raise ValueError(
                f"classify.model.name={self.classify.model.name} needs patches: add the keys "
                f"`whiten: {{}}` and `patches: {{}}`, or choose vanilla or cnn"
            )
        if not self.patches or not self.whiten:
            return
        if self.classify and self.classify.needs_dictionary:
            self._require_like_layers(self.classify, self.whiten, self.patches)
        if self.pretext:
            raise ValueError(
                "pretext and patches each make the encoder that embed reads: give one of them"
            )
        if self.patches.patches > self.whiten.patches:
            raise ValueError(
                f"patches.size={self.patches.size} looks at {self.patches.patches} patches, but "
                f"whiten.patches={self.whiten.patches} are drawn; raise whiten.patches"
            )
        for stage in (self.scan, self.selflabel):
            if stage and (stage.views.mean, stage.views.std) != (PIXEL_MEAN, PIXEL_STD):
                name = "scan" if stage is self.scan else "selflabel"
                raise ValueError(
                    f"{name}.views.mean and {name}.views.std must be [0.5, 0.5, 0.5] after "
                    f"patches, whose codes are of levels in [-1, 1]"
                )

    def _require_like_layers(
        self, classify: ClassifyConfig, whiten: WhitenConfig, patches: PatchesConfig
    ) -> None:
        """Raise ValueError when the dictionary of a further layer is made as the first's is not."""
        if classify.deeper and whiten.whitening == "none":
            raise ValueError(
                "whiten.whitening=none is for one layer, since those of classify.deeper are always "
                "whitened; choose pca or zca, or leave classify.deeper out"
            )
        source = "maps" if whiten.source == "images" else whiten.source
        first = {"source": source, "select": patches.select, "unit_norm": patches.unit_norm}
        usual = {"source": "maps", "select": "kmeans", "unit_norm": False}
        for i, layer in enumerate(classify.deeper):
            for key, value in first.items():
                if value != usual[key] and (has := getattr(layer, key)) == usual[key]:
                    where = "whiten" if key == "source" else "patches"
                    raise ValueError(
                        f"{where}.{key}={value} is for the first layer, and "
                        f"classify.deeper.{i}.{key}={has}; say {key}={value} there too"
                    )

    def _needs(self, stage: str) -> tuple[str, ...]:
        """Return NEEDS of a stage, less the images and encoder of a run on published features."""
        absent = ("ingest", ENCODER) if self.is_imported else ()
        return tuple(name for name in NEEDS[stage] if name not in absent)

    @property
    def is_imported(self) -> bool:
        """Whether the rows are published features."""
        return self.embed is not None and self.embed.imported is not None

    @property
    def encoder(self) -> str | None:
        """Name of the stage that makes the encoder; None without one."""
        return next((name for name in ENCODERS if name in self.stages), None)

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages that have a key, in order."""
        return tuple(name for name in STAGES if getattr(self, name) is not None)

    def inputs(self, stage: str) -> tuple[str, ...]:
        """Return the stages of this experiment whose results a stage reads."""
        wanted = {*self._needs(stage), *USES.get(stage, ())}
        wanted |= {self.encoder or ""} if ENCODER in wanted else set()
        if stage == "probe" and self.probe and self.probe.knn_index == "graph":
            wanted |= {"graph"}
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
