"""SCAN mines any number of neighbors up to the stored one, whoever made the graph."""

from pathlib import Path

import numpy as np
import pytest

from selfsup_ray.config import Resources
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.datasets import NeighborPairs
from selfsup_ray.data.synthetic import write_shapes
from selfsup_ray.errors import ConfigError
from selfsup_ray.models.backbones import ResNetConfig, build_backbone
from selfsup_ray.models.encoder import save_encoder
from selfsup_ray.models.inputs import ImageInput
from selfsup_ray.stages.graph import Graph, GraphConfig, build_graph
from selfsup_ray.stages.imported import ImportFeaturesConfig, import_features, import_graph
from selfsup_ray.stages.ingest import IngestConfig, ingest
from selfsup_ray.stages.interop import export_graph
from selfsup_ray.stages.scan import ScanConfig, scan

HERE = Resources(workers=0)
N, K = 48, 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, its graph, and the same graph read from published files."""
    folder = tmp_path_factory.mktemp("mining")
    write_shapes(folder / "photos", N, size=16)
    ingest(folder / "photos", IngestConfig(image_size=16, resources=HERE), out=folder / "ingest")
    np.random.default_rng(0).normal(size=(N, 8)).astype("<f4").tofile(folder / "rows")
    config = ImportFeaturesConfig(dim=8)
    features = import_features(folder / "rows", config, out=folder / "embed")
    graph = build_graph(features, GraphConfig(k=K, resources=HERE), out=folder / "graph")
    ids, _ = export_graph(graph, folder, format="int32")
    import_graph(ids, out=folder / "imported")
    return folder


@pytest.mark.parametrize("made", ["graph", "imported"])
@pytest.mark.parametrize("num_neighbors", [1, 4, K])
def test_drawn_are_the_image_and_its_first_neighbors(folder: Path, made: str, num_neighbors: int):
    graph, corpus = Graph.open(folder / made), Corpus.open(folder / "ingest")
    pairs = NeighborPairs(corpus, graph.ids, num_neighbors=num_neighbors, seed=0)
    draws = np.stack([pairs.drawn(np.arange(N), epoch=epoch) for epoch in range(150)])
    for i, listed in enumerate(np.asarray(graph.ids)[:, :num_neighbors].tolist()):
        assert set(draws[:, i].tolist()) == {i, *listed}


def test_scan_takes_as_many_as_are_stored_and_no_more(folder: Path, tmp_path: Path):
    graph, corpus = Graph.open(folder / "imported"), Corpus.open(folder / "ingest")
    backbone = build_backbone(ResNetConfig(name="resnet18", stem="stl", width=4))
    encoder = save_encoder(
        tmp_path / "encoder", backbone=backbone, images=ImageInput(image_size=16)
    )

    def config(num_neighbors: int) -> ScanConfig:
        values = {"epochs": 1, "batch_size": 16, "precision": "float32", "resources": HERE}
        return ScanConfig(num_clusters=4, num_neighbors=num_neighbors, **values)

    made = scan(corpus, encoder, graph, config(K), out=tmp_path / "scan")
    assert len(np.asarray(made.assignments)) == N
    with pytest.raises(ConfigError, match=f"num_neighbors={K + 1}, but .* holds {K} neighbors"):
        scan(corpus, encoder, graph, config(K + 1), out=tmp_path / "more")
