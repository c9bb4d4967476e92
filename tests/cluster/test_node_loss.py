"""A whole node is killed in the middle of a graph and of a diffusion: the files are the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_node_killed_in_the_middle_of_graph_and_diffusion_changes_no_byte(tmp_path: Path):
    script = Path(__file__).with_name("node_loss.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=1400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "same.json").read_text())
    assert set(results) == {"cells", "actors", "diffuse", "ingest", "embed"}
    for name, (was_running, is_same, *failed) in results.items():
        assert is_same, f"{name}: {failed}"
        assert was_running, f"{name} had ended before the node was killed"
