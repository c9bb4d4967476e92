"""Which instructions of this machine's processor a benchmark ran on."""

from pathlib import Path


def cpu_path() -> str:
    """Return the instructions that bfloat16 products use here."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return next((f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in flags), "other")
