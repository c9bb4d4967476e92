"""Label diffusion in the report, from a real diffusion."""

from collections import namedtuple
from pathlib import Path

import numpy as np

from selfsup_ray.artifacts import ShardedArray
from selfsup_ray.config import Resources
from selfsup_ray.report_diffuse import diffuse_section
from selfsup_ray.report_html import Section
from selfsup_ray.report_run import Run
from selfsup_ray.stages.diffuse import DiffuseConfig, diffuse
from selfsup_ray.stages.graph import GraphConfig, build_graph


def test_the_section_shows_every_step_and_the_accuracy_on_hidden_labels(tmp_path: Path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    rows = np.eye(3, 8)[labels] + 0.1 * rng.normal(size=(300, 8))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    array = ShardedArray.create(
        tmp_path / "rows", shard_rows=[300], row_shape=(8,), dtype="float32"
    )
    array.write_shard(0, rows.astype(np.float32))
    features = namedtuple("Features", ["array", "fingerprint"])(array, "rows")
    here = Resources(workers=0)
    graph = build_graph(features, GraphConfig(k=10, resources=here), out=tmp_path / "run/graph")
    config = DiffuseConfig(labels_per_class=2, niter=4, resources=here)
    made = diffuse(graph, labels, config, out=tmp_path / "run/diffuse")
    section = diffuse_section(Run.open(tmp_path / "run"))
    assert isinstance(section, Section) and made.accuracy is not None
    assert "6 of 300 images had a label of 3 classes; 4 steps spread them" in section.body
    assert f"right for {100 * made.accuracy:.2f} % of the hidden labels" in section.body
    assert section.body.count("<svg") == 3 and section.body.count("<tr") == 6


def test_a_run_without_diffusion_says_so(tmp_path: Path):
    assert "No label diffusion" in str(diffuse_section(Run(tmp_path, [])))
