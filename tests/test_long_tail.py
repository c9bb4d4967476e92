"""The script that cuts a corpus to classes of unequal size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SCRIPT = Path(__file__).parents[1] / "experiments" / "sela" / "long_tail.py"


def test_classes_shrink_by_equal_factors_and_rows_stay_whole(tmp_path: Path):
    labels = np.tile(np.arange(3), 100)
    table = pa.table({"label": labels, "path": [f"{i}.png" for i in range(300)]})
    pq.write_table(table, tmp_path / "all.parquet")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "all.parquet")]
    for name in ("few.parquet", "again.parquet"):
        done = subprocess.run(
            [*command, str(tmp_path / name), "--ratio", "25"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "[100, 20, 4] images" in done.stdout  # 100 / 25^(c / 2)
    few = pq.read_table(tmp_path / "few.parquet")
    assert few.equals(pq.read_table(tmp_path / "again.parquet"))
    own = [int(Path(path).stem) for path in few["path"].to_pylist()]
    assert own == sorted(set(own))
    assert few["label"].to_pylist() == labels[own].tolist()
