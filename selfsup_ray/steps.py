"""One step of a run: a stage called with its inputs opened from the folders of other stages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from selfsup_ray.artifacts import read_done
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.errors import ArtifactError
from selfsup_ray.experiment import Experiment
from selfsup_ray.models.clusterer import Clusterer
from selfsup_ray.models.encoder import Encoder
from selfsup_ray.models.portable import require_onnx
from selfsup_ray.stages.classify import Classified, classify
from selfsup_ray.stages.diffuse import Diffusion, diffuse
from selfsup_ray.stages.dimension import PatchDimension, patch_dimension
from selfsup_ray.stages.embed import Embeddings, embed
from selfsup_ray.stages.evaluate import Evaluation, evaluate_run
from selfsup_ray.stages.export import Exported, export
from selfsup_ray.stages.finetune import Finetuned, finetune
from selfsup_ray.stages.graph import Graph, build_graph
from selfsup_ray.stages.imported_rows import ImportedImages, embed_imported
from selfsup_ray.stages.ingest import ingest
from selfsup_ray.stages.linear import Linear, linear
from selfsup_ray.stages.lowshot import LowShot, low_shot
from selfsup_ray.stages.maps import Maps, draw_maps, require_opentsne
from selfsup_ray.stages.patches import fit_patches
from selfsup_ray.stages.pretext import pretrain
from selfsup_ray.stages.probe import Probe, probe
from selfsup_ray.stages.reduce import Reduced, reduce
from selfsup_ray.stages.scan import scan
from selfsup_ray.stages.sela import sela
from selfsup_ray.stages.selflabel import self_label
from selfsup_ray.stages.voc07 import Voc07, voc07
from selfsup_ray.stages.whiten import PatchSample, whiten
from selfsup_ray.storage import located

if TYPE_CHECKING:
    from selfsup_ray.tracking import Tracker

log = logging.getLogger(__name__)

Folders = Callable[[str], Path]
"""Stage name -> the folder that stage owns."""
Artifact = (
    Corpus
    | PatchDimension
    | Encoder
    | PatchSample
    | Classified
    | Embeddings
    | Maps
    | Reduced
    | Graph
    | Clusterer
    | Diffusion
    | Probe
    | Linear
    | Finetuned
    | LowShot
    | Voc07
    | Evaluation
    | Exported
)

CLUSTERINGS = ("sela", "scan", "selflabel")
"""Stages that leave a Clusterer; the last one of a run is its result."""

HANDLES: dict[str, Callable[[Path], Artifact]] = {
    "ingest": Corpus.open,
    "dimension": PatchDimension.open,
    "pretext": Encoder.open,
    "sela": Clusterer.open,
    "whiten": PatchSample.open,
    "patches": Encoder.open,
    "classify": Classified.open,
    "embed": Embeddings.open,
    "maps": Maps.open,
    "reduce": Reduced.open,
    "graph": Graph.open,
    "scan": Clusterer.open,
    "selflabel": Clusterer.open,
    "diffuse": Diffusion.open,
    "probe": Probe.open,
    "linear": Linear.open,
    "finetune": Finetuned.open,
    "lowshot": LowShot.open,
    "voc07": Voc07.open,
    "evaluate": Evaluation.open,
    "export": Exported.open,
}


def open_artifact(path: Path | str) -> Artifact:
    """Return the handle on a finished stage's folder, of the type that stage makes.

    Raises ArtifactError when nothing has finished there, or something that is no stage's.
    """
    path = located(path)
    stage = read_done(path).stage
    if stage not in HANDLES:
        raise ArtifactError(
            f"{path} holds a `{stage}`, which has no handle. Open the folder of one of "
            f"{', '.join(HANDLES)}."
        )
    return HANDLES[stage](path)


def run_stage(stage: str, experiment: Experiment, at: Folders, tracker: Tracker | None) -> None:
    """Run one stage, or find its folder current; its inputs must have finished.

    Raises whatever the stage raises, ArtifactError when an input is missing.
    """
    RUN[stage](experiment, at, tracker)


def require_packages(experiment: Experiment, stages: Sequence[str]) -> None:
    """Raise ConfigError unless the optional packages that these stages use are installed."""
    maps, exported = experiment.maps, experiment.export
    if maps and "maps" in stages and "tsne" in maps.methods and maps.tsne == "opentsne":
        require_opentsne()
    if exported and "export" in stages and "onnx" in exported.formats:
        require_onnx()


def _ingest(e: Experiment, at: Folders, tracker: Tracker | None) -> None:
    ingest(None, e.ingest, out=at("ingest"), tracker=tracker)


def _dimension(e: Experiment, at: Folders, tracker: Tracker | None) -> None:
    corpus = Corpus.open(at("ingest"))
    patch_dimension(corpus, e.dimension, out=at("dimension"), tracker=tracker)


def _pretext(e: Experiment, at: Folders, tracker: Tracker | None) -> None:
    pretrain(Corpus.open(at("ingest")), e.pretext, out=at("pretext"), tracker=tracker)


def _sela(e: Experiment, at: Folders, tracker: Tracker | None) -> None:
    sela(Corpus.open(at("ingest")), e.sela, out=at("sela"), tracker=tracker)


def _whiten(e: Experiment, at: Folders, tracker: Tracker | None) -> None:
    whiten(Corpus.open(at("ingest")), e.whiten, out=at("whiten"), tracker=tracker)


def _patches(e: Experiment, at: Folders, tracker: Tracker | None) -> None:
    corpus, sample = Corpus.open(at("ingest")), PatchSample.open(at("whiten"))
    fit_patches(corpus, sample, e.patches, out=at("patches"), tracker=tracker)


def _encoder(e: Experiment, at: Folders) -> Encoder:
    assert e.encoder is not None, "the experiment checks that there is an encoder"
    return Encoder.open(at(e.encoder))


def _classify(e: Experiment, at: Folders, tracker: Tracker | None) -> None:
    corpus = Corpus.open(at("ingest"))
    if not corpus.has_labels:
        log.warning("classify: left out, since no image has a label")
        return
    encoder = Encoder.open(at("patches")) if "patches" in e.stages else None
    classify(corpus, e.classify, encoder=encoder, out=at("classify"), tracker=tracker)


def _images(e: Experiment, at: Folders) -> Corpus | ImportedImages:
    """Return what is known of the images: the corpus, or less of imported rows."""
    if e.is_imported:
        return ImportedImages(Embeddings.open(at("embed")))
    return Corpus.open(at("ingest"))


def _embed(e: Experiment, at: Folders, tracker: Tracker | None) -> None:
    if e.embed is not None and e.embed.imported is not None:
        embed_imported(e.embed, out=at("embed"))
        return
    corpus, encoder = Corpus.open(at("ingest")), _encoder(e, at)
    embed(corpus, encoder, e.embed, out=at("embed"), tracker=tracker)


def _maps(e: Experiment, at: Folders, tracker: Tracker | None) -> None:
    corpus, encoder = Corpus.open(at("ingest")), _encoder(e, at)
    draw_maps(corpus, encoder, e.maps, out=at("maps"), tracker=tracker)


def _reduce(e: Experiment, at: Folders, tracker: Tracker | None) -> None:
    reduce(Embeddings.open(at("embed")), e.reduce, out=at("reduce"), tracker=tracker)


def searched(e: Experiment, at: Folders) -> Embeddings | Reduced:
    """Return the rows that the graph is built on: the reduced ones where there are any."""
    if "reduce" in e.stages:
        return Reduced.open(at("reduce"))
    return Embeddings.open(at("embed"))


def _graph(e: Experiment, at: Folders, tracker: Tracker | None) -> None:
    corpus = _images(e, at)
    labels = corpus.labels if corpus.has_labels else None  # for the report's figure alone
    build_graph(searched(e, at), e.graph, out=at("graph"), labels=labels, tracker=tracker)


def _scan(e: Experiment, at: Folders, tracker: Tracker | None) -> None:
    assert e.scan is not None
    corpus, encoder = Corpus.open(at("ingest")), _encoder(e, at)
    scan(corpus, encoder, Graph.open(at("graph")), e.scan, out=at("scan"), tracker=tracker)


def _selflabel(e: Experiment, at: Folders, tracker: Tracker | None) -> None:
    corpus, clusterer = Corpus.open(at("ingest")), Clusterer.open(at("scan"))
    self_label(corpus, clusterer, e.selflabel, out=at("selflabel"), tracker=tracker)


def _diffuse(e: Experiment, at: Folders, tracker: Tracker | None) -> None:
    corpus = _images(e, at)
    if not corpus.has_labels:
        log.warning("diffuse: left out, since no image has a label")
        return
    graph = Graph.open(at("graph"))
    diffuse(graph, corpus.labels, e.diffuse, out=at("diffuse"), tracker=tracker)


def _probe(e: Experiment, at: Folders, tracker: Tracker | None) -> None:
    corpus = Corpus.open(at("ingest"))
    if not corpus.has_labels:
        log.warning("probe: left out, since no image has a label")
        return
    assert e.probe is not None
    probe(
        Embeddings.open(at("embed")),
        corpus.labels,
        e.probe,
        out=at("probe"),
        sources=corpus.sources,
        graph=Graph.open(at("graph")) if e.probe.knn_index == "graph" else None,
        tracker=tracker,
    )


def _linear(e: Experiment, at: Folders, tracker: Tracker | None) -> None:
    assert e.linear is not None
    corpus, encoder = Corpus.open(at("ingest")), _encoder(e, at)
    if not corpus.has_labels:
        log.warning("linear: left out, since no image has a label")
        return
    stored = e.linear.features == "embeddings"
    features = Embeddings.open(at("embed")) if stored else None
    linear(corpus, encoder, e.linear, out=at("linear"), features=features, tracker=tracker)


def _finetune(e: Experiment, at: Folders, tracker: Tracker | None) -> None:
    assert e.finetune is not None
    corpus, encoder = Corpus.open(at("ingest")), _encoder(e, at)
    if not corpus.has_labels:
        log.warning("finetune: left out, since no image has a label")
        return
    finetune(corpus, encoder, e.finetune, out=at("finetune"), tracker=tracker)


def _lowshot(e: Experiment, at: Folders, tracker: Tracker | None) -> None:
    assert e.lowshot is not None
    corpus, embeddings = _images(e, at), Embeddings.open(at("embed"))
    if not corpus.has_labels:
        log.warning("lowshot: left out, since no image has a label")
        return
    low_shot(
        searched(e, at),
        corpus.labels,
        e.lowshot,
        out=at("lowshot"),
        linear_features=embeddings if "reduce" in e.stages else None,
        sources=corpus.sources,
        class_names=corpus.class_names,
        tracker=tracker,
    )


def _voc07(e: Experiment, at: Folders, tracker: Tracker | None) -> None:
    assert e.voc07 is not None
    corpus, features = Corpus.open(at("ingest")), Embeddings.open(at("embed"))
    voc07(corpus, features, e.voc07, out=at("voc07"), tracker=tracker)


def _evaluate(e: Experiment, at: Folders, tracker: Tracker | None) -> None:
    evaluate_run(
        {name: Clusterer.open(at(name)) for name in CLUSTERINGS if name in e.stages},
        Corpus.open(at("ingest")),
        e.evaluate,
        out=at("evaluate"),
        features=Embeddings.open(at("embed")),
        graph=Graph.open(at("graph")) if "graph" in e.stages else None,
        tracker=tracker,
    )


def _export(e: Experiment, at: Folders, tracker: Tracker | None) -> None:
    names = [name for name in CLUSTERINGS if name in e.stages]
    clusterer = Clusterer.open(at(names[-1])) if names else None
    corpus, encoder = Corpus.open(at("ingest")), _encoder(e, at)
    spread = "diffuse" in e.stages and corpus.has_labels  # without labels diffuse is left out
    diffusion = Diffusion.open(at("diffuse")) if spread else None
    out = at("export")
    export(corpus, encoder, clusterer, e.export, out=out, diffusion=diffusion, tracker=tracker)


RUN: dict[str, Callable[[Experiment, Folders, Tracker | None], None]] = {
    "ingest": _ingest,
    "dimension": _dimension,
    "pretext": _pretext,
    "sela": _sela,
    "whiten": _whiten,
    "patches": _patches,
    "classify": _classify,
    "embed": _embed,
    "maps": _maps,
    "reduce": _reduce,
    "graph": _graph,
    "scan": _scan,
    "selflabel": _selflabel,
    "diffuse": _diffuse,
    "probe": _probe,
    "linear": _linear,
    "finetune": _finetune,
    "lowshot": _lowshot,
    "voc07": _voc07,
    "evaluate": _evaluate,
    "export": _export,
}
