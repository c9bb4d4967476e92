"""Self-supervised representations, clusters, kNN graphs and labels for large image corpora.

Verbs of one shape, `verb(inputs…, config, out=…) -> artifact`; every result is a handle on a
folder, so a session may stop anywhere and continue with `open(folder)`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfsup_ray import ops
    from selfsup_ray.config import Resources
    from selfsup_ray.data.corpus import Corpus
    from selfsup_ray.errors import ArtifactError, ConfigError, ResourceError, UserError
    from selfsup_ray.experiment import Experiment
    from selfsup_ray.models.backbones import ResNetConfig
    from selfsup_ray.models.clusterer import Clusterer
    from selfsup_ray.models.encoder import Encoder
    from selfsup_ray.models.pretext import BYOLConfig, InsDisConfig, MoCoConfig, SimCLRConfig
    from selfsup_ray.pipeline import run
    from selfsup_ray.planning import plan
    from selfsup_ray.report import write_report
    from selfsup_ray.resources import TrainResources
    from selfsup_ray.stages.classify import Classified, classify
    from selfsup_ray.stages.classify_config import ClassifyConfig
    from selfsup_ray.stages.diffuse import DiffuseConfig, Diffusion, diffuse
    from selfsup_ray.stages.dimension import PatchDimension, patch_dimension
    from selfsup_ray.stages.dimension_config import DimensionConfig
    from selfsup_ray.stages.embed import EmbedConfig, Embeddings, embed
    from selfsup_ray.stages.evaluate import EvaluateConfig, evaluate
    from selfsup_ray.stages.export import ExportConfig, export
    from selfsup_ray.stages.finetune import finetune
    from selfsup_ray.stages.graph import Graph, GraphConfig, build_graph
    from selfsup_ray.stages.imported import (
        ImportFeaturesConfig,
        ImportGraphConfig,
        import_features,
        import_graph,
    )
    from selfsup_ray.stages.ingest import IngestConfig, ingest
    from selfsup_ray.stages.interop import (
        export_features,
        export_graph,
        to_csr,
        to_opentsne,
        to_scikit_learn,
        to_umap,
    )
    from selfsup_ray.stages.labelled_config import (
        BYOLFinetune,
        BYOLLinear,
        CifarLinear,
        LayersLinear,
        MoCoLinear,
        SimCLRCifarLinear,
        SimCLRFinetune,
    )
    from selfsup_ray.stages.linear import linear
    from selfsup_ray.stages.lowshot import LowShot, low_shot
    from selfsup_ray.stages.lowshot_config import LowShotConfig
    from selfsup_ray.stages.maps import MapsConfig, draw_maps
    from selfsup_ray.stages.new_images import nearest_images
    from selfsup_ray.stages.patch_dictionary import PatchDictionary
    from selfsup_ray.stages.patches import PatchesConfig, fit_patches
    from selfsup_ray.stages.pretext import PretextConfig, pretrain
    from selfsup_ray.stages.probe import ProbeConfig, probe
    from selfsup_ray.stages.reduce import ReduceConfig, Reduced, reduce
    from selfsup_ray.stages.scan import ScanConfig, scan
    from selfsup_ray.stages.sela import SeLaConfig, sela
    from selfsup_ray.stages.selflabel import SelfLabelConfig, self_label
    from selfsup_ray.stages.whiten import PatchSample, WhitenConfig, whiten
    from selfsup_ray.steps import open_artifact as open
    from selfsup_ray.sweeping import sweep

_HOMES = {
    "config": ["Resources"],
    "data.corpus": ["Corpus"],
    "errors": ["ArtifactError", "ConfigError", "ResourceError", "UserError"],
    "experiment": ["Experiment"],
    "models.backbones": ["ResNetConfig"],
    "models.clusterer": ["Clusterer"],
    "models.encoder": ["Encoder"],
    "models.pretext": ["BYOLConfig", "InsDisConfig", "MoCoConfig", "SimCLRConfig"],
    "pipeline": ["run"],
    "planning": ["plan"],
    "report": ["write_report"],
    "resources": ["TrainResources"],
    "stages.classify": ["Classified", "classify"],
    "stages.classify_config": ["ClassifyConfig"],
    "stages.diffuse": ["DiffuseConfig", "Diffusion", "diffuse"],
    "stages.dimension": ["PatchDimension", "patch_dimension"],
    "stages.dimension_config": ["DimensionConfig"],
    "stages.embed": ["EmbedConfig", "Embeddings", "embed"],
    "stages.evaluate": ["EvaluateConfig", "evaluate"],
    "stages.export": ["ExportConfig", "export"],
    "stages.finetune": ["finetune"],
    "stages.graph": ["Graph", "GraphConfig", "build_graph"],
    "stages.imported": [
        "ImportFeaturesConfig",
        "ImportGraphConfig",
        "import_features",
        "import_graph",
    ],
    "stages.ingest": ["IngestConfig", "ingest"],
    "stages.interop": [
        "export_features",
        "export_graph",
        "to_csr",
        "to_opentsne",
        "to_scikit_learn",
        "to_umap",
    ],
    "stages.labelled_config": [
        "BYOLFinetune",
        "BYOLLinear",
        "CifarLinear",
        "LayersLinear",
        "MoCoLinear",
        "SimCLRCifarLinear",
        "SimCLRFinetune",
    ],
    "stages.linear": ["linear"],
    "stages.lowshot": ["LowShot", "low_shot"],
    "stages.lowshot_config": ["LowShotConfig"],
    "stages.maps": ["MapsConfig", "draw_maps"],
    "stages.new_images": ["nearest_images"],
    "stages.patch_dictionary": ["PatchDictionary"],
    "stages.patches": ["PatchesConfig", "fit_patches"],
    "stages.pretext": ["PretextConfig", "pretrain"],
    "stages.probe": ["ProbeConfig", "probe"],
    "stages.reduce": ["ReduceConfig", "Reduced", "reduce"],
    "stages.scan": ["ScanConfig", "scan"],
    "stages.sela": ["SeLaConfig", "sela"],
    "stages.selflabel": ["SelfLabelConfig", "self_label"],
    "stages.whiten": ["PatchSample", "WhitenConfig", "whiten"],
    "steps": ["open_artifact"],
    "sweeping": ["sweep"],
}
_PUBLIC = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ArtifactError",
    "BYOLConfig",
    "BYOLFinetune",
    "BYOLLinear",
    "CifarLinear",
    "Classified",
    "ClassifyConfig",
    "Clusterer",
    "ConfigError",
    "Corpus",
    "DiffuseConfig",
    "Diffusion",
    "DimensionConfig",
    "EmbedConfig",
    "Embeddings",
    "Encoder",
    "EvaluateConfig",
    "Experiment",
    "ExportConfig",
    "Graph",
    "GraphConfig",
    "ImportFeaturesConfig",
    "ImportGraphConfig",
    "IngestConfig",
    "InsDisConfig",
    "LayersLinear",
    "LowShot",
    "LowShotConfig",
    "MapsConfig",
    "MoCoConfig",
    "MoCoLinear",
    "PatchDictionary",
    "PatchDimension",
    "PatchSample",
    "PatchesConfig",
    "PretextConfig",
    "ProbeConfig",
    "ReduceConfig",
    "Reduced",
    "ResNetConfig",
    "ResourceError",
    "Resources",
    "ScanConfig",
    "SeLaConfig",
    "SelfLabelConfig",
    "SimCLRCifarLinear",
    "SimCLRConfig",
    "SimCLRFinetune",
    "TrainResources",
    "UserError",
    "WhitenConfig",
    "build_graph",
    "classify",
    "diffuse",
    "draw_maps",
    "embed",
    "evaluate",
    "export",
    "export_features",
    "export_graph",
    "finetune",
    "fit_patches",
    "import_features",
    "import_graph",
    "ingest",
    "linear",
    "low_shot",
    "nearest_images",
    "open",
    "ops",
    "patch_dimension",
    "plan",
    "pretrain",
    "probe",
    "reduce",
    "run",
    "scan",
    "sela",
    "self_label",
    "sweep",
    "to_csr",
    "to_opentsne",
    "to_scikit_learn",
    "to_umap",
    "whiten",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Import a public name where it is first used: `import selfsup_ray` alone stays quick."""
    if name == "ops":
        return import_module("selfsup_ray.ops")
    here = "open_artifact" if name == "open" else name
    if here not in _PUBLIC:
        raise AttributeError(f"module 'selfsup_ray' has no attribute {name!r}")
    found = getattr(import_module(f"selfsup_ray.{_PUBLIC[here]}"), here)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
