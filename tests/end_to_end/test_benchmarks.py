"""The programs that measure start: each is imported, with all that it names in quantkit."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_every_benchmark_is_imported():
    """In one process, in which benchmarks/ is where programs are looked for, as Python has it."""
    names = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
    assert "quality" in names and "served" in names
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(f"import {name}" for name in names)],
        cwd=ROOT / "benchmarks",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
