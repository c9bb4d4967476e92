"""A training loses a node, gets one and gives it back: each image once an epoch all the same."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(2500)
def test_a_training_that_loses_gets_and_gives_back_nodes_ends_with_the_same_weights(tmp_path: Path):
    script = Path(__file__).with_name("elastic.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=2400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["steps"] == 20
    assert all(count == 1 for epoch in found["seen"] for count in epoch)
    # Step 7 lost its node: on with one worker from the checkpoint at 6. It wrote one at step 14,
    # at the notice that there is room for two, and these one at 16, when their node was drained:
    # no step is trained twice.
    assert found["workers"] == [2] * 6 + [1] * 8 + [2] * 2 + [1] * 4
    trained = [(note["step"], note["workers"]) for note in found["notes"] if note["rank"] == 0]
    assert len(trained) == len(set(trained)) and (14, 1) not in trained
    assert found["difference"] < 1e-5  # rounding
    elastic, alone = found["losses"]
    assert elastic == pytest.approx(alone, rel=1e-4)
    for size, notes in itertools.groupby(found["notes"], key=lambda note: note["workers"]):
        nodes = {(note["rank"], note["node"]) for note in notes}
        assert len(nodes) == len({node for _, node in nodes}) == size, "spread: one on each node"
