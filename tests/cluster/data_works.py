"""Works on Ray Data, ingest and embed, for node_loss.py to kill a node under."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from selfsup_ray.config import Resources
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.synthetic import write_shapes
from selfsup_ray.models.backbones import ResNetConfig, build_backbone
from selfsup_ray.models.encoder import save_encoder
from selfsup_ray.models.inputs import ImageInput
from selfsup_ray.stages.embed import EmbedConfig, embed
from selfsup_ray.stages.ingest import IngestConfig, ingest


def data_works(folder: Path) -> list[tuple[str, Callable[[Path, Resources], Any], str]]:
    """Return (name, work, a file that appears in its middle) of tasks and of an actor pool."""
    write_shapes(folder / "photos", 200, size=32)
    torch.manual_seed(0)
    backbone = build_backbone(ResNetConfig(name="resnet18", stem="cifar", width=8))
    encoder = save_encoder(folder / "net", backbone=backbone, images=ImageInput(image_size=32))

    def ingested(out: Path, ask: Resources) -> Any:
        config = IngestConfig(image_size=32, shard_size=5, resources=ask)
        return ingest(folder / "photos", config, out=out)

    def embedded(out: Path, ask: Resources) -> Any:
        corpus = Corpus.open(folder / "ingest-whole")
        return embed(corpus, encoder, EmbedConfig(resources=ask), out=out)

    return [("ingest", ingested, "shards/00003.arrow"), ("embed", embedded, "rows/0*.npy")]
