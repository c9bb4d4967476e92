"""What Ray adds to each stage: seconds of the same work in one process and through workers.

    python experiments/benchmarks/ray_overhead.py --seconds 90 --rounds 2
    python experiments/benchmarks/ray_overhead.py --seconds 90 --rounds 2 --workers 2

Every stage runs four times: small and large, with `workers: 0` and with `--workers` of Ray, in one
session of Ray that is started before, and that has run the stage before where its workers stay.
`--seconds` is about what the large run takes of one core. Prints one JSON line per stage:

`added_time`, `added_cpu`: of the large run, Ray / here - 1 (time means something with one worker);
`per_work`: (Ray large - Ray small) / (here large - here small) - 1, what Ray adds to work;
`fixed_s`: what is left of the small runs' difference, what Ray costs a stage however small it is;
`at_a_minute`: per_work + fixed_s / 60, the whole for a stage of one minute on one core.

CPU seconds are those of this process and of all that it starts, without those of the measuring
itself; `system_s` of them, Ray's own daemons, grow with the time that passes, not with the work, so
they are told apart: on a machine that is busy with other things they would be counted many times
over. Ray starts a worker for every CPU in advance, and each actor takes one, or a new one (1 to 2
CPU seconds) when these are used up; so they are used up before the first run that counts, or the
small run would find its worker and the large one pay for its own. Bar: at most 0.10 is added to
work of a minute or more.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from photos import write_jpegs
from scale import family, write_rows

SYSTEM = ("gcs_server", "raylet", "dashboard", "log_monitor", "monitor.py", "agent")
LOOK_EVERY_S = 0.2  # what a process uses after the last look before its end is not seen
SETTLE_S = 20.0
FILES = 200  # JPEG files that are made; more images are links to them
TRAINED = ("pretext", "scan")
Work = Callable[[int, Path], Any]
Features = namedtuple("Features", ["array", "fingerprint"])


class Seconds:
    """CPU seconds of this process and its family, those that ended meanwhile included."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[float, bool]] = {}
        self.looking = 0.0
        self.lock = threading.Lock()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.look()
            time.sleep(LOOK_EVERY_S)

    def look(self) -> None:
        """Note what every living process has used; what the look itself uses is kept apart."""
        with self.lock:
            began = time.thread_time()
            for pid in family(os.getpid()):
                try:
                    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                except OSError:  # it has just ended
                    continue
                used = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
                is_system = pid != os.getpid() and any(name in words for name in SYSTEM)
                self.known[pid] = (used, is_system)
            self.looking += time.thread_time() - began

    def total(self, *, system: bool) -> float:
        """Return the seconds of Ray's daemons, or of all others, so far."""
        self.look()
        with self.lock:
            own = 0.0 if system else self.looking
            return sum(used for used, is_system in self.known.values() if is_system == system) - own

    def settle(self) -> None:
        """Wait until nothing is started or ended any more, so that no later run pays for it."""
        deadline, before = time.monotonic() + SETTLE_S, self.total(system=False)
        while time.monotonic() < deadline:
            time.sleep(2.0)
            now = self.total(system=False)
            if now - before < 0.2:
                return
            before = now


class Stages:
    """The stages at one size; inputs are made once, in this process, and not counted."""

    def __init__(self, folder: Path, share: float) -> None:
        self.folder, self.share = folder, share
        folder.mkdir()

    def size(self, at_thirty_seconds: int, least: int = 64) -> int:
        """Return a size for `share` of 30 seconds of one core."""
        return max(least, int(at_thirty_seconds * self.share))

    def ingest(self) -> Work:
        """Decode, check and store JPEGs of 256 pixels."""
        from selfsup_ray.config import Resources
        from selfsup_ray.stages.ingest import IngestConfig, ingest

        made, n = self.folder / "photos", self.size(70_000)
        write_jpegs(made / "0", min(n, FILES), side=256)
        files = sorted((made / "0").rglob("*.jpg"))
        for i in range(len(files), n):
            link = made / str(1 + i // 1000) / f"{i:06d}.jpg"
            link.parent.mkdir(exist_ok=True)
            os.link(files[i % len(files)], link)

        def work(workers: int, out: Path) -> None:
            resources = Resources(workers=workers)
            config = IngestConfig(image_size=64, labels="none", resources=resources)
            ingest(made, config, out=out)

        return work

    def _corpus(self, n: int) -> Any:
        from selfsup_ray.data.corpus import Corpus
        from selfsup_ray.data.synthetic import corpus_of_arrays, shape_images

        out = self.folder / f"corpus-{n}"
        if not out.exists():
            images, labels = shape_images(min(n, 2000), size=32)
            repeated = [i % len(images) for i in range(n)]
            corpus_of_arrays(out, images[repeated], labels[repeated])
        return Corpus.open(out)

    def _encoder(self) -> Any:
        import torch

        from selfsup_ray.models.backbones import ResNetConfig, build_backbone
        from selfsup_ray.models.encoder import Encoder, save_encoder
        from selfsup_ray.models.inputs import ImageInput

        out = self.folder / "encoder"
        if not out.exists():
            torch.manual_seed(0)
            backbone = build_backbone(ResNetConfig(stem="cifar", width=16))
            save_encoder(out, backbone=backbone, images=ImageInput(image_size=32))
        return Encoder.open(out)

    def pretext(self) -> Work:
        """SimCLR on a narrow ResNet-18, through Ray Train."""
        from selfsup_ray.config import override
        from selfsup_ray.models.backbones import ResNetConfig
        from selfsup_ray.stages.pretext import PretextConfig, pretrain

        corpus = self._corpus(self.size(14_000, 128))
        config = PretextConfig(
            backbone=ResNetConfig(stem="cifar", width=16), epochs=1, batch_size=64
        )

        def work(workers: int, out: Path) -> None:
            pretrain(corpus, override(config, {"resources.workers": workers}), out=out)

        return work

    def embed(self) -> Work:
        """One pass of the encoder over all images, through an actor pool of Ray Data."""
        from selfsup_ray.config import Resources
        from selfsup_ray.stages.embed import EmbedConfig, embed

        corpus, encoder = self._corpus(self.size(56_000)), self._encoder()

        def work(workers: int, out: Path) -> None:
            embed(corpus, encoder, EmbedConfig(resources=Resources(workers=workers)), out=out)

        return work

    def whiten(self) -> Work:
        """Patches of all images and their moments, as tasks."""
        from selfsup_ray.config import Resources
        from selfsup_ray.stages.whiten import WhitenConfig, whiten

        corpus, patches = self._corpus(self.size(330_000)), self.size(660_000)

        def work(workers: int, out: Path) -> None:
            config = WhitenConfig(patches=patches, resources=Resources(workers=workers))
            whiten(corpus, config, out=out)

        return work

    def patches(self) -> Work:
        """k-means of patches, by an actor that holds them."""
        from selfsup_ray.cluster.kmeans import kmeans_sharded
        from selfsup_ray.config import Resources

        rows = self._rows(self.size(1_200_000, 8192), 75)

        def work(workers: int, out: Path) -> None:
            out.mkdir()
            kmeans_sharded(rows, 2048, iterations=25, resources=Resources(workers=workers), out=out)

        return work

    def _rows(self, n: int, dim: int) -> Any:
        from selfsup_ray.artifacts import ShardedArray

        path = self.folder / f"rows-{n}-{dim}"
        if not path.exists():
            write_rows(path, n, dim)
        return ShardedArray.open(path)

    def _graph(self, n: int, method: Any) -> Work:
        from selfsup_ray.config import Resources
        from selfsup_ray.stages.graph import GraphConfig, build_graph

        rows = self._rows(n, 128)

        def work(workers: int, out: Path) -> None:
            asked = Resources(workers=workers)
            config = GraphConfig(k=20, method=method, min_recall=0, resources=asked)
            build_graph(Features(rows, "rows"), config, out=out)

        return work

    def graph_exact(self) -> Work:
        """All pairs, by an actor that takes steps; quadratic, so the size goes with the root."""
        from selfsup_ray.cluster.methods import ExactConfig

        return self._graph(max(36_000, int(188_000 * self.share**0.5)), ExactConfig())

    def graph_cells(self) -> Work:
        """The cell join, four rounds of tasks."""
        from selfsup_ray.stages.cell_graph import CellsConfig

        return self._graph(self.size(840_000, 20_000), CellsConfig())

    def diffuse(self) -> Work:
        """Labels spread over a graph, by tasks."""
        import numpy as np

        from selfsup_ray.config import Resources
        from selfsup_ray.stages.diffuse import DiffuseConfig, diffuse
        from selfsup_ray.stages.graph import Graph

        n = self.size(330_000, 20_000)
        if not (self.folder / "graph").exists():
            from selfsup_ray.stages.cell_graph import CellsConfig

            self._graph(n, CellsConfig(probes=4))(0, self.folder / "graph")
        labels = np.random.default_rng(0).integers(0, 100, n)
        seeds = np.where(np.arange(n) % 50 == 0, labels, -1)

        def work(workers: int, out: Path) -> None:
            config = DiffuseConfig(niter=200, resources=Resources(workers=workers))
            diffuse(Graph.open(self.folder / "graph"), seeds, config, out=out)

        return work

    def scan(self) -> Work:
        """SCAN on the encoder, through Ray Train, then a pass over all images."""
        from selfsup_ray.config import Resources, override
        from selfsup_ray.stages.embed import EmbedConfig, embed
        from selfsup_ray.stages.graph import GraphConfig, build_graph
        from selfsup_ray.stages.scan import ScanConfig, scan

        corpus, encoder = self._corpus(self.size(9_500, 128)), self._encoder()
        here = Resources(workers=0)
        rows = embed(corpus, encoder, EmbedConfig(resources=here), out=self.folder / "for-scan")
        graph = build_graph(
            rows, GraphConfig(k=10, resources=here), out=self.folder / "graph-for-scan"
        )
        config = ScanConfig(num_clusters=10, num_neighbors=10, epochs=1, batch_size=64)

        def work(workers: int, out: Path) -> None:
            config_here = override(config, {"resources.workers": workers})
            scan(corpus, encoder, graph, config_here, out=out)

        return work


NAMES = tuple("ingest pretext embed whiten patches graph_exact graph_cells diffuse scan".split())


def measured(work: Work, workers: int, out: Path, seconds: Seconds) -> dict[str, float]:
    """Run once and return CPU seconds of the work and of Ray's daemons, and wall seconds."""
    before = [seconds.total(system=one) for one in (False, True)]
    began = time.perf_counter()
    work(workers, out)
    wall = time.perf_counter() - began
    seconds.settle()
    used, system = (
        seconds.total(system=one) - old for one, old in zip((False, True), before, strict=True)
    )
    return {"cpu_s": used, "system_s": system, "wall_s": wall}


def compared(
    name: str, works: tuple[Work, Work], folder: Path, seconds: Seconds, given: argparse.Namespace
) -> dict[str, Any]:
    """Return the figures of a stage, medians over rounds that take turns."""
    runs: dict[tuple[str, int], list[dict[str, float]]] = {}
    small, large = works
    small(0, folder / "warm")  # compiled kernels, opened files
    if name not in TRAINED:  # whose workers are new each time; those of tasks stay
        for i in range(2):  # until no run finds a worker that was started before it
            small(given.workers, folder / f"warm-ray-{i}")
    seconds.settle()
    for i in range(given.rounds):
        for workers in (0, given.workers):
            for size, work in (("small", small), ("large", large)):
                one = measured(work, workers, folder / f"{size}-{workers}-{i}", seconds)
                runs.setdefault((size, workers), []).append(one)
    cpu = {key: median(run["cpu_s"] for run in some) for key, some in runs.items()}
    wall = {key: median(run["wall_s"] for run in some) for key, some in runs.items()}
    here = cpu["large", 0] - cpu["small", 0]
    many = given.workers
    per_work = (cpu["large", many] - cpu["small", many]) / here - 1
    fixed = cpu["small", many] - cpu["small", 0] * (1 + per_work)

    def every(what: str) -> dict[str, list[float]]:
        return {f"{n}, {w}": [round(run[what], 2) for run in some] for (n, w), some in runs.items()}

    return {
        "added_time": round(wall["large", many] / wall["large", 0] - 1, 3),
        "added_cpu": round(cpu["large", many] / cpu["large", 0] - 1, 3),
        "here_s": round(cpu["large", 0], 2),
        "ray_s": round(cpu["large", many], 2),
        "per_work": round(per_work, 3),
        "fixed_s": round(fixed, 2),
        "at_a_minute": round(per_work + fixed / 60, 3),
        "system_s": round(median(run["system_s"] for run in runs["large", many]), 2),
        "all_cpu_s": every("cpu_s"),
        "all_time_s": every("wall_s"),
    }


def main() -> None:
    """Measure the stages and print a JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30, help="of one core, the large runs")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1, help="of Ray; in the driver there are 0")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")  # or others' memory kills workers
    import torch

    from selfsup_ray.cluster.session import session

    torch.set_num_threads(1)
    line = {"benchmark": "ray_overhead"} | {k: v for k, v in vars(given).items() if k != "only"}
    seconds, began = Seconds(), time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary, session(num_cpus=max(2, given.workers)):
        seconds.settle()
        start = sum(seconds.total(system=one) for one in (False, True))
        wall = time.perf_counter() - began
        began_s = {"session_cpu_s": round(start, 1), "wall_s": round(wall, 1)}
        print(json.dumps({**line, **began_s}), flush=True)
        small = Stages(Path(temporary, "small"), given.seconds / 30 / 10)
        large = Stages(Path(temporary, "large"), given.seconds / 30)
        for name in given.only:
            works = getattr(small, name)(), getattr(large, name)()
            folder = Path(temporary, name)
            folder.mkdir()
            found = compared(name, works, folder, seconds, given)
            load = {"cpus": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
            print(json.dumps({**line, "stage": name, **found, **load}), flush=True)


if __name__ == "__main__":
    main()
