"""kernels/cuda compiled by the C++ compiler against tests/kernels/emulator: a library with the CUDA
library's functions, run by the CPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from quantkit.ops import native

ROOT = Path(__file__).parent.parent.parent
SOURCES = [
    *sorted((ROOT / "kernels" / "cuda").glob("*.cu")),
    ROOT / "tests" / "kernels" / "emulator" / "hooks.cpp",
]
INCLUDED = [
    *(ROOT / "kernels" / "cuda").glob("*.h"),
    *(ROOT / "tests" / "kernels" / "emulator").glob("*.h"),
]
# 800: everything by mma.sync, E4M3 through float16. 900: wgmma and the copy engine; E4M3 by
# mma.sync itself.
ARCHITECTURES = (800, 900)
FLAGS = [
    "-x",
    "c++",
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-ffp-contract=off",
    '-DQK_ARCHITECTURES="emulated"',
    "-w",
]


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def build(
    directory: Path, name: str = "emulated", defines: tuple[str, ...] = ()
) -> dict[int, ctypes.CDLL]:
    """The libraries by architecture, compiled unless `directory` has them of the same sources."""
    digest = hashlib.sha256(" ".join([*FLAGS, *defines]).encode())
    for path in sorted([*SOURCES, *INCLUDED]):
        digest.update(path.read_bytes())
    libraries = {
        architecture: directory / f"{name}-{architecture}-{digest.hexdigest()[:16]}.so"
        for architecture in ARCHITECTURES
    }
    wanted = [
        (architecture, source)
        for architecture in ARCHITECTURES
        if not libraries[architecture].is_file()
        for source in SOURCES
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda pair: _compile(directory, *pair, defines), wanted))
    for architecture in dict.fromkeys(architecture for architecture, _ in wanted):
        objects = [_object(directory, architecture, source) for source in SOURCES]
        _run([compiler(), "-shared", "-o", f"{libraries[architecture]}.new", *objects])
        # of older sources
        for path in [*directory.glob(f"{name}-{architecture}-*.so"), *map(Path, objects)]:
            path.unlink()
        Path(f"{libraries[architecture]}.new").replace(libraries[architecture])
    return {
        architecture: native.open_cuda_library(path) for architecture, path in libraries.items()
    }


def _object(directory: Path, architecture: int, source: Path) -> str:
    return str(directory / f"{source.stem}-{architecture}-{os.getpid()}.o")


def _compile(directory: Path, architecture: int, source: Path, defines: tuple[str, ...]) -> None:
    include = [
        "-I",
        str(ROOT / "kernels" / "cuda"),
        "-I",
        str(ROOT / "tests" / "kernels" / "emulator"),
    ]
    _run(
        [
            compiler(),
            *FLAGS,
            *defines,
            f"-DQK_EMULATED={architecture}",
            *include,
            "-c",
            str(source),
            "-o",
            _object(directory, architecture, source),
        ]
    )


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
