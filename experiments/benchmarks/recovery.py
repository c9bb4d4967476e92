"""A whole pipeline killed again and again at random moments, against one that nobody disturbs.

    python experiments/benchmarks/recovery.py --kills 21 --seed 0

The experiment is small (240 generated images) and goes through ingest (Ray Data tasks), pretext
(Ray Train), embed (Ray Data actors), graph (index actors), scan, selflabel, diffuse (Ray tasks),
probe, evaluate, export and the report. It runs once undisturbed; then again while victims drawn by
the seed get a SIGKILL at random moments: the driver, a worker in the midst of a task, an actor of
the work (Ray Train's and Ray Data's are some), an agent of the node, the raylet, the GCS, or every
process of the run at once. A run that stopped gets the same command again; when
it is finished before the last kill, another begins from nothing. Then the run folders are compared
byte by byte, see `comparable`, and the MLflow runs by name and state.

Prints one JSON line: kills by kind, what was hit, starts and runs it took, `identical` or the names
of the files that differ, the sentences that were said, `untold` ends (neither success, nor death of
the driver, nor one sentence and exit code 2, or 1 when Ray's C++ ended the program), wall and CPU
seconds. A kill is survived when the run it hit comes to its end with the same files. Bar: all of 20
or more.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from ray._private.services import psutil  # Ray's own copy

from selfsup_ray.data.synthetic import write_shapes

KINDS = ("driver", "worker", "actor", "agent", "raylet", "gcs", "all")
TITLES = {
    "agent": re.compile(r"ray::\w+Agent"),
    "worker": re.compile(r"ray::([a-z]|Read)"),  # ReadRange: a task of Ray Data
    "actor": re.compile(r"ray::(?!IDLE)[A-Z]"),
}
"""What Ray calls its processes; those that wait for work or serve Ray alone are none of these."""
SPOKEN_S = 0.5
"""Until what waits beside a program has said that it was ended."""
LIMIT_S = 600.0
"""Longest that one start of the command may take; longer counts as hanging."""
TIMES = ("time", "seconds", "images_per_s", "data_wait_share", "rows_per_s", "links_per_s")
"""Numbers in JSON files that are durations, dates or rates: no two runs share them."""
LEFT_OUT = ("mlflow.json", "report.html")
"""Ids that MLflow draws; a page that shows dates and durations."""


def experiment(folder: Path, *, training_workers: int) -> Path:
    """Write the images and an experiment on them, in folder/runs/run; return its file."""
    write_shapes(folder / "photos", 240, size=16)
    two, here = {"workers": 2}, {"workers": 0}
    trained = {"batch_size": 48, "precision": "float32", "log_every": 2, "checkpoint_every": 2}
    values = {
        "out": str(folder / "runs" / "run"),
        "ingest": {"source": str(folder / "photos"), "image_size": 16, "shard_size": 24},
        "pretext": {
            **trained,
            "backbone": {"name": "resnet18", "stem": "stl", "width": 8},
            **{"epochs": 6, "resources": {"workers": training_workers}},
        },
        "embed": {"resources": two},
        "graph": {"k": 5, "method": {"name": "ivf", "piece_rows": 64}, "min_recall": 0},
        "scan": {**trained, "num_clusters": 4, "num_neighbors": 5, "epochs": 4},
        "selflabel": {**trained, "threshold": 0.3, "epochs": 4},
        "diffuse": {"labels_per_class": 3, "niter": 4, "mode": "rows", "memory_gb": 0.0001},
        **{"probe": {}, "evaluate": {}, "export": {}},
    }
    for stage in ("ingest", "graph", "diffuse"):
        values[stage]["resources"] = two  # type: ignore[index]
    for stage in ("scan", "selflabel", "probe"):
        values[stage]["resources"] = here  # type: ignore[index]
    path = folder / "recovery.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@dataclass
class Run:
    """The command on one experiment, started as often as it takes."""

    path: Path
    log: Path
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0

    def start(self) -> None:
        """Give the command (again)."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("RAY_ADDRESS", None)
        command = [sys.executable, "-m", "selfsup_ray", "run", str(self.path)]
        with open(self.log, "ab") as log:
            log.write(b"--- start\n")
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self.began = time.monotonic()

    @property
    def code(self) -> int | None:
        """Exit code; None while it runs. A start that hangs is killed and counts as 1."""
        assert self.process is not None
        code = self.process.poll()
        if code is None and time.monotonic() - self.began > LIMIT_S:
            kill_all(self.process.pid)
            return 1
        return code

    def last(self) -> list[str]:
        """Return the lines of the last start."""
        return self.log.read_text(errors="replace").split("--- start\n")[-1].splitlines()

    def is_at_work(self) -> bool:
        """Return whether the last start has begun a stage: Ray is up then."""
        return any(": stage " in line for line in self.last())

    def sentences(self) -> list[str]:
        """Return what the last start said of its end, paths and numbers left out."""
        said = [line for line in self.last() if "he same command" in line]
        return [re.sub(r"/\S+|\d+", "…", line.partition(": ")[2]) for line in said]


def below(pid: int) -> list[psutil.Process]:
    """Return all processes that a process has started, and what those have."""
    with suppress(psutil.NoSuchProcess):
        return list(psutil.Process(pid).children(recursive=True))
    return []


def kill_all(pid: int) -> None:
    """Kill a process and everything below it."""
    for process in [*below(pid), psutil.Process(pid)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def role(process: psutil.Process) -> tuple[str, str]:
    """Return what a process of a run is, one of KINDS or nothing, and its title."""
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied, IndexError):
        title = process.cmdline()[0]
        name = Path(title).name
        if name in ("raylet", "gcs_server"):
            return {"raylet": "raylet", "gcs_server": "gcs"}[name], name
        if title.startswith("ray::"):
            return next((kind for kind, names in TITLES.items() if names.match(title)), ""), title
    return "", ""


def victims(pid: int, kind: str) -> list[tuple[psutil.Process, str]]:
    """Return the processes of a run that a kill of some kind may hit, each with its title."""
    if kind in ("driver", "all"):
        return [(psutil.Process(pid), kind)]
    found = [(process, *role(process)) for process in below(pid)]
    return [(process, title) for process, is_a, title in found if is_a == kind]


@dataclass
class Tally:
    """What was killed and what came of it."""

    planned: list[str]
    rng: random.Random
    gap_s: float
    settled: bool
    done: Counter[str] = field(default_factory=Counter)
    said: Counter[str] = field(default_factory=Counter)
    titles: Counter[str] = field(default_factory=Counter)
    untold: list[str] = field(default_factory=list)


def say(text: str) -> None:
    """Write a line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def wait(run: Run, true: Callable[[], bool]) -> bool:
    """Return whether a condition came true before the run ended."""
    while run.code is None:
        if true():
            return True
        time.sleep(0.02)
    return False


def strike(run: Run, tally: Tally) -> str | None:
    """Kill one victim at a random moment and return its kind; None when the run ended before."""
    assert run.process is not None
    kind, pid = tally.planned[0], run.process.pid
    if tally.settled and not wait(run, run.is_at_work):
        return None
    moment = time.monotonic() + tally.rng.uniform(0, tally.gap_s)
    if not wait(run, lambda: time.monotonic() >= moment and bool(victims(pid, kind))):
        return None
    found = sorted(victims(pid, kind), key=lambda victim: victim[1])
    if not found:
        return None
    victim, title = tally.rng.choice(found)
    with suppress(psutil.NoSuchProcess):
        if kind == "all":
            kill_all(pid)
        else:
            victim.send_signal(signal.SIGKILL)
    tally.planned.pop(0)
    tally.done[kind] += 1
    tally.titles[title.split("(")[0]] += 1
    say(f"kill {sum(tally.done.values())}: {kind} {title}")
    return kind


def settle(run: Run, struck: list[str], tally: Tally) -> bool:
    """Judge the end of one start by what was killed in it; return whether the run is finished.

    What ends without a word, and not by its own death, is noted, though the run may recover.
    """
    code = run.code
    assert code is not None
    time.sleep(SPOKEN_S)
    sentences = run.sentences()
    tally.said.update(sentences)
    by_signal = bool({"driver", "all"} & set(struck))
    told = code == 0 or (code in (1, 2) and len(sentences) == 1) or (code < 0 and by_signal)
    say(f"exit {code} after {struck}: {sentences}")
    if not told:
        tally.untold.append(f"exit {code} after {struck}: " + " | ".join(run.last()[-8:]))
    return code == 0


def disturbed(run: Run, tally: Tally) -> int:
    """Bring a run to its end, striking as long as kills are planned; return how many starts."""
    starts = 0
    while True:
        assert starts < 100, "the run never ends"
        run.start()
        starts += 1
        struck = list[str]()
        while tally.planned and (kind := strike(run, tally)):
            struck.append(kind)
            if kind in ("driver", "all"):
                break
        wait(run, lambda: False)
        if settle(run, struck, tally):
            return starts


def comparable(out: Path) -> dict[str, str]:
    """Return a hash of every file of a run folder; LEFT_OUT is left out, TIMES in JSON too."""
    found = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file() and p.name not in LEFT_OUT):
        data = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            lines = data.decode().splitlines() if path.suffix == ".jsonl" else [data.decode()]
            values = [_timeless(json.loads(line)) for line in lines]
            data = json.dumps(values, sort_keys=True).encode()
        found[str(path.relative_to(out))] = hashlib.sha256(data).hexdigest()
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in TIMES}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Return the names that only one folder has, or whose contents differ."""
    names = one.keys() | other.keys()
    return sorted(name for name in names if one.get(name) != other.get(name))


def results(runs: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return the hashes of a finished run's files, and its MLflow runs by name."""
    return comparable(runs / "run"), mlflow_runs(runs / "mlflow.db")


def mlflow_runs(store: Path) -> dict[str, str]:
    """Return the states of the runs in a store, by name; a name that is there twice says so."""
    found = dict[str, str]()
    with closing(sqlite3.connect(store)) as database:
        for name, status in database.execute("SELECT name, status FROM runs"):
            found[name] = "more than one" if name in found else status
    return found


def recover(
    folder: Path,
    *,
    kills: int,
    seed: int,
    gap_s: float,
    kinds: Sequence[str] = KINDS,
    training_workers: int = 2,
    settled: bool = False,
) -> dict[str, Any]:
    """Run once undisturbed, then under `kills` kills; return what happened and what differs.

    training_workers: of Ray Train, for pretext; 0 trains in the driver. settled: strike when Ray is
    up only.
    """
    began, rng = time.monotonic(), random.Random(seed)
    path = experiment(folder, training_workers=training_workers)
    if not (folder / "whole").exists():
        whole = Run(path, folder / "whole.log")
        whole.start()
        wait(whole, lambda: False)
        assert whole.code == 0, "\n".join(whole.last()[-20:])
        (folder / "runs").rename(folder / "whole")
    alone_s = time.monotonic() - began
    say(f"undisturbed: {alone_s:.0f} s")
    wanted, wanted_runs = results(folder / "whole")
    planned = [kinds[i % len(kinds)] for i in range(kills)]
    rng.shuffle(planned)
    tally, differ, runs, starts = Tally(planned, rng, gap_s, settled), list[str](), 0, 0
    while tally.planned or not runs:
        runs += 1
        name = f"killed-{seed}-{runs}"
        starts += disturbed(Run(path, folder / f"{name}.log"), tally)
        files, tracked = results((folder / "runs").rename(folder / name))
        differ += [f"{name}/{file}" for file in differing(wanted, files)]
        differ += [f"{name}/mlflow:{run}" for run in differing(wanted_runs, tracked)]
    return {
        "kills": dict(tally.done),
        "killed": dict(tally.titles),
        "runs": runs,
        "starts": starts,
        "files": len(wanted),
        "identical": differ or True,
        "untold": tally.untold,
        "said": dict(tally.said),
        "undisturbed_s": round(alone_s, 1),
        "wall_s": round(time.monotonic() - began, 1),
        "cpu_s": round(sum(os.times()[2:4]), 1),
        "seed": seed,
    }


def main() -> None:
    """Print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=21)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gap", type=float, default=40, help="most seconds between two kills")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--folder",
        type=Path,
        help="keep runs and logs here; an undisturbed run in it is not redone",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        how = {"kills": options.kills, "seed": options.seed, "gap_s": options.gap}
        print(json.dumps(recover(folder, **how, kinds=options.kinds)))


if __name__ == "__main__":
    main()
