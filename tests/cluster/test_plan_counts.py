"""What a plan announces of tasks, actors and restarts is what Ray has on record afterwards."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "benchmarks" / "eight_nodes.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tasks_actors_and_restarts_on_two_nodes_are_those_of_the_plan():
    asked = ["--nodes", "2", "--images", "256", "--until", "patches", "--tasks-only"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *asked], capture_output=True, text=True, timeout=880
    )
    assert done.returncode == 0, done.stderr[-3000:]
    stages = json.loads(done.stdout.splitlines()[-1])["stages"]
    assert set(stages) == {"ingest", "whiten", "patches"}
    for name, found in stages.items():
        planned, measured = found["planned"], found["measured"]
        assert {key: measured[key] for key in planned} == planned, name
        assert measured["restarts"] == measured["kills"] == (1 if name == "patches" else 0), name
