"""Sizes and tables as plans and summaries print them."""

from __future__ import annotations

from io import StringIO

from rich.console import Console
from rich.table import Table


def size(num_bytes: int | None) -> str:
    """Return bytes as people write them: 12 MB, 3.4 GB; "" when unknown."""
    if num_bytes is None:
        return ""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            value = num_bytes / scale
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return f"{num_bytes} B"


def drawn(table: Table) -> str:
    """Return a rich table as plain text."""
    console = Console(file=StringIO(), width=110, color_system=None)
    console.print(table)
    file = console.file
    assert isinstance(file, StringIO)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())
