"""The scores of a run: its headline, clusterings side by side with k-means, embeddings, probes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from selfsup_ray.artifacts import read_json
from selfsup_ray.report_classes import class_table
from selfsup_ray.report_html import Section, paragraph, plain, table
from selfsup_ray.report_run import Run

Scores = Mapping[str, Any]

MEANING = {
    "accuracy": "share of labelled images in the cluster matched to their class, one to one",
    "nmi": "normalized mutual information of clusters and classes, 0 to 1",
    "ari": "adjusted Rand index: pairs on which clusters and classes agree, 0 by chance",
    "ami": "mutual information corrected for chance",
    "accuracy_many_to_one": "accuracy when every cluster takes its most frequent class (purity)",
    "num_clusters": "clusters, K",
    "empty_clusters": "clusters without an image",
    "size_balance": "entropy of the cluster sizes over ln K: 1 is balanced",
    "largest_cluster": "share of the images in the largest cluster",
    "mean_confidence": "mean probability of an image's cluster",
    "confident_share": "share of images whose cluster has a probability above 0.99",
    "silhouette": "how much closer images are to their own cluster than to the next, -1 to 1",
    "neighbor_agreement": "share of graph neighbors in the same cluster",
    "scan_score": "SCAN's label-free score: consistency less entropy, lower is better",
    "scan_consistency": "mean of -ln <p_i, p_j> over graph pairs",
    "knn_accuracy": "share of labelled images whose graph neighbors vote for their class",
    "neighbor_accuracy": "share of graph neighbors with the same class",
    "knn_neighbors": "neighbors that vote",
    "effective_rank": "RankMe: exp of the entropy of the singular values, 1 is collapse",
    "embedding_std": "standard deviation of a dimension: 1/√d is even, 0 is collapse",
    "uniformity": "ln of the mean of exp(-2 |x - y|²): lower is more even, 0 is collapse",
}
FREE = ("mean_confidence", "neighbor_agreement", "silhouette")
"""Headline of a run without labels."""
BASELINES = {"pixels": "k-means on pixels", "embeddings": "k-means on embeddings"}


def headline_scores(run: Run) -> Iterator[tuple[str, str, str]]:
    """Yield (name, value, remark) of the scores that come first: with labels, or those without."""
    scores = _evaluated(run)
    named = run.clusters.named if run.clusters is not None else None
    is_many_to_one = named is not None and named.is_many_to_one
    accuracy = "accuracy_many_to_one" if is_many_to_one else "accuracy"
    remark = "many to one" if is_many_to_one else "one to one"
    if accuracy in (baseline := scores.get("baselines", {}).get("pixels", {})):
        remark += f"; k-means on pixels {baseline[accuracy]:.3f}"
    for key, name, note in ((accuracy, "ACC", remark), ("nmi", "NMI", ""), ("ari", "ARI", "")):
        if key in scores:
            yield name, f"{scores[key]:.3f}", note
    free = scores.get("label_free", {})
    for key in () if "accuracy" in scores else FREE:
        if free.get(key) is not None:
            yield key.replace("_", " "), f"{free[key]:.3f}", "needs no labels"
    knn = scores.get("embeddings", {}).get("knn_accuracy")
    if knn is not None:
        yield "kNN accuracy", f"{knn:.3f}", "of the embeddings"


def scores_section(run: Run) -> Section | str:
    """All scores of the stages evaluate, probe and voc07, with what each means."""
    scores, body = _evaluated(run), ""
    if scores:
        body += "".join(paragraph(note) for note in scores.get("notes", []))
        body += _clusterings(run, scores) + _embeddings(scores.get("embeddings", {}))
    body += _probe(run) + _voc07(run)
    if not body:
        return "No scores: none of evaluate, probe and voc07 has finished in this run."
    return Section("scores", "Scores", body)


def _evaluated(run: Run) -> dict[str, Any]:
    """Return metrics.json of the stage evaluate; {} when it has not finished."""
    stage = run.stage("evaluate")
    return {} if stage is None else dict(read_json(stage.path / "metrics.json"))


def _clusterings(run: Run, scores: Scores) -> str:
    """Return one column for each clustering, the result first, then k-means to compare with."""
    result = scores.get("clustering") or (run.clustering[0] if run.clustering else "clusters")
    columns: dict[str, Scores] = {str(result): _flat(scores)}
    for name, value in scores.items():
        if isinstance(value, dict) and "label_free" in value:
            columns[name] = _flat(value)
    baselines = scores.get("baselines", {})
    columns |= {BASELINES.get(kind, kind): _flat(value) for kind, value in baselines.items()}
    named = {key for key in MEANING if any(key in column for column in columns.values())}
    top = {key for column in columns.values() for key in column if key.startswith("accuracy_top")}
    keys = [
        key for key in [*list(MEANING)[:5], *sorted(top), *list(MEANING)[5:]] if key in named | top
    ]
    if not keys:
        return ""
    rows = [
        (_named(key), *(_shown(column.get(key)) for column in columns.values()), _meaning(key))
        for key in keys
    ]
    body = "<h3>Clusterings</h3>"
    if baselines:
        body += paragraph(_against(scores, baselines), note=True)
    numeric = range(1, len(columns) + 1)
    return body + table(("score", *columns, "meaning"), rows, numeric=numeric)


def _flat(scores: Scores) -> dict[str, Any]:
    """Return a clustering's numbers: those on top, and the label-free ones."""
    both = {**scores, **scores.get("label_free", {})}
    return {key: value for key, value in both.items() if isinstance(value, int | float)}


def _against(scores: Scores, baselines: Scores) -> str:
    """Say on which images k-means was scored, and how the result does on the same ones."""
    parts = []
    for kind, value in baselines.items():
        text = f"{BASELINES.get(kind, kind)}: {value['images']:,} images"
        if value.get("accuracy_here") is not None:
            text += f", on which the result has accuracy {value['accuracy_here']:.3f}"
        parts.append(f"{text} (the best by inertia of {value['n_init']}, seed {value['seed']}).")
    return " ".join(parts)


def _embeddings(scores: Scores) -> str:
    rows = [
        (_named(key), _shown(value), _meaning(key))
        for key, value in scores.items()
        if isinstance(value, int | float)
    ]
    if not rows:
        return ""
    return "<h3>Embeddings</h3>" + table(("score", "value", "meaning"), rows, numeric=(1,))


def _probe(run: Run) -> str:
    """Return linear and kNN accuracy on held-out labelled images."""
    stage = run.stage("probe")
    if stage is None:
        return ""
    scores = read_json(stage.path / "metrics.json")
    rows = []
    for key, name in (("linear", "linear classifier"), ("knn", "kNN classifier")):
        if key in scores:
            low, high = scores[key].get("interval") or (None, None)
            between = "" if low is None else f"{low:.3f} to {high:.3f}"
            rows.append((name, _shown(scores[key]["accuracy"]), between))
    text = f"On {scores['num_test']:,} held-out images, trained on {scores['num_train']:,}."
    head = ("of frozen embeddings", "accuracy", "95 % interval")
    body = "<h3>Probe</h3>" + paragraph(text, note=True) + table(head, rows, numeric=(1,))
    columns = {
        key: scores[key]["per_class"]
        for key in ("knn", "linear")
        if "per_class" in scores.get(key, {})  # runs of earlier versions have none
    }
    return body + (class_table(run, columns) if columns else "")


def _voc07(run: Run) -> str:
    """Return the average precision of each class of VOC 2007, and their mean."""
    stage = run.stage("voc07")
    if stage is None:
        return ""
    scores = read_json(stage.path / "metrics.json")
    rows = [
        (name, _shown(of["average_precision"]), plain(of["num_positive"]), f"{of['cost']:g}")
        for name, of in scores["classes"].items()
    ]
    text = (
        f"Mean average precision {scores['map']:.3f} by linear SVMs on frozen embeddings, the mean "
        f"of 11 points as in 2007; {scores['map_area']:.3f} as the area under the curve."
    )
    head = ("class", "average precision", "test images", "cost")
    return (
        "<h3>Pascal VOC 2007</h3>"
        + paragraph(text, note=True)
        + table(head, rows, numeric=(1, 2, 3))
    )


def _named(key: str) -> str:
    return key.upper() if key in ("nmi", "ari", "ami") else key.replace("_", " ")


def _meaning(key: str) -> str:
    if key.startswith("accuracy_top"):
        top = key.removeprefix("accuracy_top")
        return f"the class is matched to one of the {top} most probable clusters"
    return MEANING.get(key, "")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return "" if value is None else plain(value)
