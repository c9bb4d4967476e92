"""A downloaded checkpoint embeds a corpus without any training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from selfsup_ray import cli
from selfsup_ray.config import Resources, build, parse_yaml
from selfsup_ray.data.synthetic import write_shapes
from selfsup_ray.models.encoder import evaluation_view
from selfsup_ray.stages.embed import EmbedConfig, embed
from selfsup_ray.stages.ingest import IngestConfig, ingest
from selfsup_ray.stages.pretext import PretextConfig, pretrain

HERE = Resources(workers=0)


def test_the_lines_that_weights_prints_embed_images_as_torchvision_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None).eval()
    path = tmp_path / "moco.pth.tar"
    keys = {f"module.encoder_q.{key}": x for key, x in network.state_dict().items()}
    torch.save({"state_dict": keys | {"module.queue": torch.zeros(128, 8)}}, path)
    options = cli.parsed(["weights", str(path)])
    options.call(options)
    line = next(s for s in capsys.readouterr().out.splitlines() if s.startswith("  pretext:"))
    config = build(PretextConfig, parse_yaml(line)["pretext"])

    write_shapes(tmp_path / "shapes", 8, size=64)
    settings = IngestConfig(image_size=64, resources=HERE)
    corpus = ingest(tmp_path / "shapes", settings, out=tmp_path / "ingest")
    encoder = pretrain(corpus, config, out=tmp_path / "pretext")
    made = embed(corpus, encoder, EmbedConfig(resources=HERE), out=tmp_path / "embed")
    network.fc = torch.nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        views = evaluation_view(corpus.images(np.arange(8)), encoder.description.images)
        rows = torch.nn.functional.normalize(network(views), dim=1).numpy()
    np.testing.assert_allclose(np.asarray(made.array), rows, atol=1e-5)
