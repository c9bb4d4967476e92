"""A training loses the node of rank 0 and gets another: each image once an epoch all the same."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(2500)
def test_a_training_goes_on_with_fewer_nodes_and_grows_again_to_the_same_weights(tmp_path: Path):
    script = Path(__file__).with_name("elastic.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=2400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["steps"] == 20
    assert all(count == 1 for epoch in found["seen"] for count in epoch)
    # Step 7 lost its node: on with one worker from the checkpoint before it, and back to two from
    # that before step 13.
    assert found["workers"] == [2] * 6 + [1] * 6 + [2] * 8
    assert found["difference"] < 1e-6
    elastic, alone = found["losses"]
    assert elastic == pytest.approx(alone, rel=1e-4)
    for size, notes in itertools.groupby(found["notes"], key=lambda note: note["workers"]):
        nodes = {(note["rank"], note["node"]) for note in notes}
        assert len(nodes) == len({node for _, node in nodes}) == size, "spread: one on each node"
