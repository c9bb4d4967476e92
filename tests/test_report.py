"""The report of small runs: whole, without labels, unfinished, with hostile names, in a browser."""

import csv
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import nn

from selfsup_ray.artifacts import Array, ShardedArray, begin, finish
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.synthetic import SHAPES, corpus_of_arrays, shape_images
from selfsup_ray.errors import ArtifactError
from selfsup_ray.models.backbones import ResNetConfig, build_backbone
from selfsup_ray.models.clusterer import Clusterer, save_clusterer
from selfsup_ray.models.inputs import ImageInput
from selfsup_ray.report import write_report
from selfsup_ray.stages.embed import Embeddings
from selfsup_ray.stages.evaluate import EvaluateConfig, evaluate_run
from selfsup_ray.stages.graph import Graph
from selfsup_ray.tracking import open_run

N, CLUSTERS, NEIGHBORS = 90, 5, 6


@dataclass
class Page(HTMLParser):
    """What a page holds: its text, headings by anchor, tags, and every address it names."""

    text: list[str] = field(default_factory=list)
    anchors: list[str] = field(default_factory=list)
    tags: set[str] = field(default_factory=set)
    addresses: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        named = dict(attrs)
        if tag == "section":
            self.anchors.append(str(named["id"]))
        self.addresses += [str(v) for k, v in attrs if k in ("src", "href", "xlink:href", "action")]
        for value in named.values():
            self.addresses += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text())
    page.close()
    return page


def stage(out: Path, name: str, config: dict[str, object], facts: dict[str, object]) -> None:
    begin(out / name, stage=name, config=config, inputs={})
    finish(out / name, stage=name, config=config, inputs={}, seconds=2.0, facts=facts)


def write(path: Path, rows: Array, corpus: Corpus) -> None:
    shape = {"row_shape": rows.shape[1:], "dtype": rows.dtype.name}
    array = ShardedArray.create(path, shard_rows=corpus.shard_rows, **shape)
    for i in range(array.num_shards):
        array.write_shard(i, rows[array.offsets[i] : array.offsets[i + 1]])


def write_clusterer(out: Path, name: str, probabilities: Array, corpus: Corpus) -> None:
    backbone = build_backbone(ResNetConfig(name="resnet18", stem="stl", width=4))
    head = nn.Linear(backbone.dim, CLUSTERS)
    save_clusterer(out / name, backbone=backbone, head=head, images=ImageInput(image_size=16))
    write(out / name / "probabilities", probabilities, corpus)
    write(out / name / "assignments", probabilities.argmax(axis=1).astype(np.int32), corpus)
    stage(out, name, {"num_clusters": CLUSTERS, "epochs": 2}, {"head": 0})


def write_neighbors(out: Path, rows: Array, corpus: Corpus) -> None:
    similarity = rows @ rows.T
    np.fill_diagonal(similarity, -2)
    ids = np.argsort(-similarity, axis=1)[:, :NEIGHBORS]
    write(out / "graph" / "ids", ids.astype(np.int32), corpus)
    write(out / "graph" / "similarity", np.take_along_axis(similarity, ids, axis=1), corpus)
    stage(out, "graph", {"k": NEIGHBORS}, {"recall": 0.9987, "recall_sample": N})


def write_run(out: Path, *, labels: Array | None, class_names: list[str] | None = None) -> Corpus:
    """Write a run whose clusters follow the shapes, but for some noise, with all real handles."""
    images, shapes = shape_images(N, size=16)
    corpus = corpus_of_arrays(
        out / "ingest", images, labels, class_names=class_names, shard_size=40
    )
    generator = np.random.default_rng(0)
    rows = np.eye(8, dtype=np.float32)[shapes] + 0.2 * generator.normal(size=(N, 8))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    write(out / "embed" / "rows", rows, corpus)
    stage(out, "embed", {}, {"corpus": "../ingest", "images": N, "dim": 8})
    write_neighbors(out, rows, corpus)
    for name, sharpness in (("scan", 1.0), ("selflabel", 3.0)):
        logits = np.eye(CLUSTERS)[(shapes + 1) % CLUSTERS] + 0.5 * generator.normal(size=(N, 5))
        p = np.exp(sharpness * logits)
        write_clusterer(out, name, (p / p.sum(1, keepdims=True)).astype(np.float32), corpus)
    with open_run(out / "scan", name="scan") as tracker:
        for step in (10, 20, 30):
            tracker.log([{"step": step, "loss": 9 / step, "lr": 0.1, "images_per_s": 50.0}])
            tracker.log([{"step": step, "entropy": 1.5, "data_wait_share": 0.25}])
    evaluate_run(
        {name: Clusterer.open(out / name) for name in ("scan", "selflabel")},
        corpus,
        EvaluateConfig(baselines=("pixels",), baseline_starts=1),
        out=out / "evaluate",
        features=Embeddings.open(out / "embed"),
        graph=Graph.open(out / "graph"),
    )
    return corpus


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with labels, and its report."""
    out = tmp_path_factory.mktemp("runs") / "shapes"
    write_run(out, labels=shape_images(N, size=16)[1], class_names=list(SHAPES))
    write_report(out)
    return out


EVERY = ["clusters", "confusion", "scores", "map", "neighbors", "duplicates", "outliers", "hubs"]
EVERY += ["training", "corpus"]


def test_a_whole_run_has_every_section_and_a_table_of_contents(whole: Path):
    page = read(whole / "report.html")
    assert page.anchors == ["summary", *EVERY, "reproduce"]
    linked = [a for a in page.addresses if a.startswith("#") and a[1:] in page.anchors]
    assert linked == [f"#{anchor}" for anchor in page.anchors]


def test_the_page_refers_to_nothing_outside_itself_and_runs_no_script(whole: Path):
    page = read(whole / "report.html")
    foreign = [a for a in page.addresses if not a.startswith(("#", "data:"))]
    assert foreign == [] and "script" not in page.tags
    style = re.search(r"<style>(.*?)</style>", (whole / "report.html").read_text(), re.DOTALL)
    assert style is not None and "url(" not in style[1] and "@import" not in style[1]


def test_the_headline_numbers_are_those_of_scikit_learn(whole: Path):
    labels = Corpus.open(whole / "ingest").labels()
    clusters = np.asarray(Clusterer.open(whole / "selflabel").assignments)
    text = "|".join(read(whole / "report.html").text)
    assert f"|NMI|{normalized_mutual_info_score(labels, clusters):.3f}|" in text
    assert f"|ARI|{adjusted_rand_score(labels, clusters):.3f}|" in text
    assert "|images|90|" in text and "|by selflabel|" in text


def test_the_confusion_matrix_holds_the_counts_of_labels_and_clusters(whole: Path):
    labels = Corpus.open(whole / "ingest").labels()
    clusters = np.asarray(Clusterer.open(whole / "selflabel").assignments)
    text = (whole / "report.html").read_text()
    drawn = text[text.index('aria-label="confusion matrix"') :]
    written = re.findall(r"<text[^>]*>(\d+)</text>", drawn[: drawn.index("</svg>")])
    counts = [int(((labels == c) & (clusters == k)).sum()) for c in range(4) for k in range(5)]
    ticks = [str(k) for k in range(CLUSTERS)]
    assert sorted(written) == sorted(ticks + [str(n) for n in counts if n])


def test_a_cross_marks_the_images_that_are_not_of_their_cluster_s_class(whole: Path):
    corpus, text = Corpus.open(whole / "ingest"), (whole / "report.html").read_text()
    clusters = np.asarray(Clusterer.open(whole / "selflabel").assignments)
    labels = corpus.labels()
    tiles = re.findall(r'<i class="(thumb[^"]*)"[^>]*title="image (\d+), p = ([\d.]+)', text)
    assert len({id for _, id, _ in tiles}) > N / 2
    for kind, id, p in tiles:
        mates = labels[clusters == clusters[int(id)]]
        assert ("off" in kind) == (labels[int(id)] != np.bincount(mates).argmax())
        probability = Clusterer.open(whole / "selflabel").probabilities.rows(np.array([int(id)]))
        assert float(p) == pytest.approx(probability.max(), abs=5e-4)


def test_neighbor_strips_mark_same_and_other_labels(whole: Path):
    text = (whole / "report.html").read_text()
    labels = Corpus.open(whole / "ingest").labels()
    graph = Graph.open(whole / "graph")
    strips = text.split('<div class="strips">')[1].split("</section>")[0].split('class="query"')[1:]
    assert len(strips) == 10
    for strip in strips:
        query, *neighbors = [int(id) for id in re.findall(r'title="image (\d+)', strip)]
        listed = graph.ids.rows(np.array([query]))[0]
        assert neighbors == listed.tolist()
        marks = re.findall(r">\d\.\d\d (.)<", strip)
        assert marks == ["✓" if labels[i] == labels[query] else "✗" for i in listed]


def test_all_numbers_of_a_step_are_on_one_curve_and_titles_state_the_finding(whole: Path):
    text = " ".join(read(whole / "report.html").text)
    for finding in ("loss 0.9 to 0.3", "50 images/s (median)", "25.0 % of the time waiting"):
        assert finding in text


def test_the_same_run_gives_the_same_bytes(whole: Path):
    before = (whole / "report.html").read_bytes()
    write_report(whole)
    assert (whole / "report.html").read_bytes() == before


def test_without_labels_there_is_no_confusion_matrix_and_a_sentence_says_so(tmp_path: Path):
    write_run(tmp_path, labels=None)
    page = read(write_report(tmp_path))
    assert page.anchors == ["summary", *[s for s in EVERY if s != "confusion"], "reproduce"]
    text = " ".join(page.text)
    assert "No confusion matrix: no clustered image has a label." in text
    assert "None of the 90 images has a label" in text and "neighbor agreement" in text
    assert "✗" not in text


def test_labels_of_a_few_images_are_enough_for_the_confusion_matrix(tmp_path: Path):
    labels = np.full(N, -1)
    labels[:8] = shape_images(8, size=16)[1]
    write_run(tmp_path, labels=labels)
    text = " ".join(read(write_report(tmp_path)).text)
    assert "8 labelled images." in text and "8 of them have a label (4 classes)" in text


def test_ingest_alone_makes_a_report_that_says_what_is_not_there(tmp_path: Path):
    corpus_of_arrays(tmp_path / "ingest", shape_images(3, size=16)[0])
    page = read(write_report(tmp_path))
    assert page.anchors == ["summary", "corpus", "reproduce"]
    assert sum(text.startswith("No ") for text in page.text) >= 6


def test_an_empty_corpus_makes_a_report(tmp_path: Path):
    corpus_of_arrays(tmp_path / "ingest", np.empty((0, 16, 16, 3), np.uint8))
    assert read(write_report(tmp_path)).anchors == ["summary", "corpus", "reproduce"]


def test_a_stage_still_training_shows_its_curves(tmp_path: Path):
    begin(tmp_path / "pretext", stage="pretext", config={"epochs": 9}, inputs={})
    with open_run(tmp_path / "pretext", name="pretext") as tracker:
        tracker.log([{"step": 5, "loss": 4.5, "embedding_std": 0.01}])
    text = " ".join(read(write_report(tmp_path)).text)
    assert "not finished" in text and "loss 4.5 to 4.5" in text and "0 when they collapse" in text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(ArtifactError, match="holds no stage of a run"):
        write_report(tmp_path)


def test_refused_files_are_counted_by_reason_and_copies_by_group(tmp_path: Path):
    corpus_of_arrays(tmp_path / "ingest", shape_images(6, size=16)[0])
    with open(tmp_path / "ingest" / "quarantine.csv", "w", newline="") as file:
        rows = [(f"{i}.jpg", "truncated" if i % 3 else "zero_bytes", "", 0) for i in range(30)]
        csv.writer(file).writerows([("source", "reason", "detail", "size_bytes"), *rows])
    with open(tmp_path / "ingest" / "duplicates.csv", "w", newline="") as file:
        rows = [("d0", i, f"a/{i}") for i in range(4)] + [("d1", i, f"b/{i}") for i in (4, 5)]
        csv.writer(file).writerows([("digest", "id", "source"), *rows])
    text = "|".join(read(write_report(tmp_path)).text)
    assert "|truncated|20|1.jpg; 2.jpg; 4.jpg|zero_bytes|10|0.jpg; 3.jpg; 6.jpg|" in text
    assert "30 files (83.3 %) refused" in text
    assert (
        "6 images come from files of which another is the same, byte for byte, in 2 groups" in text
    )
    assert "|4|0, 1, 2|a/0; a/1; a/2|2|4, 5|b/4; b/5|" in text


def test_names_are_text_and_never_markup(tmp_path: Path):
    hostile = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "$x$", "靴"]
    write_run(tmp_path, labels=shape_images(N, size=16)[1], class_names=hostile)
    page = read(write_report(tmp_path))
    assert "script" not in page.tags
    assert [a for a in page.addresses if not a.startswith(("#", "data:"))] == []
    assert "靴" in " ".join(page.text)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


def opened(path: Path, folder: Path) -> tuple[str, list[str], list[str]]:
    """Open a file in headless Chromium; return its DOM, console messages, addresses it asked for.

    No name resolves; what the browser asks for on its own has "not an origin" as initiator.
    """
    assert CHROMIUM is not None
    flags = ["--headless", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    flags += ["--no-sandbox"] if os.getuid() == 0 else []  # Chromium refuses root otherwise
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}"]
    flags += [f"--log-net-log={folder / 'net.json'}", "--enable-logging=stderr", "--dump-dom"]
    command = [CHROMIUM, *flags, path.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    events = json.loads((folder / "net.json").read_text())["events"]
    asked = [e["params"] for e in events if "initiator" in e.get("params", {})]
    urls = [p["url"] for p in asked if p["initiator"] != "not an origin"]
    return run.stdout, [line for line in run.stderr.splitlines() if "CONSOLE" in line], urls


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH to open the page with")
def test_a_browser_opens_the_page_without_errors_or_requests(whole: Path, tmp_path: Path):
    dom, console, urls = opened(whole / "report.html", tmp_path)
    assert re.findall(r'<section id="(\w+)">', dom) == ["summary", *EVERY, "reproduce"]
    assert dom.count("<svg") == dom.count("</svg>") >= 10
    assert console == [] and urls == []


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH to open the page with")
def test_the_browser_check_sees_an_error_and_a_request(tmp_path: Path):
    page = tmp_path / "page.html"
    page.write_text('<img src="http://example.invalid/x.png"><script>missing()</script>')
    _, console, urls = opened(page, tmp_path)
    assert "missing is not defined" in console[0] and urls == ["http://example.invalid/x.png"]
