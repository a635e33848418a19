"""libquantkit_cuda.so as it was compiled: its architectures, what ptxas said of each kernel, and
the instructions in its machine code. Needs no GPU.
"""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from quantkit.ops import native

LIBRARY = native.find_library(native.CUDA_LIBRARY_NAME)
if LIBRARY is None:
    pytest.skip(
        "the CUDA kernels weren't built: there was no nvcc when quantkit was installed",
        allow_module_level=True,
    )

ARCHITECTURES = ["80", "89", "90a", "100", "120"]
KERNEL = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\w+)'\n(\d+) bytes stack frame, (\d+) bytes spill"
    r" stores, (\d+) bytes spill loads\nUsed (\d+) registers"
)
# One of each file.
STEMS = [
    "decode6matmul",
    "tile6matmul",
    "wgmma_tile6matmul",
    "quantize_long",
    "quantize_groups",
    "encode",
    "decodeI",
]


def cuobjdump() -> str | None:
    spec = importlib.util.find_spec("triton")
    beside = (
        Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if spec and spec.origin
        else None
    )
    return str(beside) if beside and beside.is_file() else shutil.which("cuobjdump")


def test_the_library_loads_without_a_gpu_and_has_every_architecture():
    assert native.open_cuda_library(LIBRARY) is not None
    assert (
        native.open_cuda_library(LIBRARY).qk_cuda_architectures().decode().split() == ARCHITECTURES
    )


def test_no_kernel_spills_registers_on_any_architecture():
    report = LIBRARY.with_name(LIBRARY.name + ".txt").read_text()
    kernels = KERNEL.findall(report)
    assert len(kernels) == report.count("Compiling entry function")
    for architecture in ARCHITECTURES:
        compiled = [name for name, of, *_ in kernels if of == architecture]
        assert all(any(stem in name for name in compiled) for stem in STEMS), architecture
    spilling = [
        (name, architecture)
        for name, architecture, stack, stores, loads, _ in kernels
        if (stack, stores, loads) != ("0", "0", "0")
    ]
    assert not spilling


def test_the_compiler_does_not_warn():
    """Such as of wgmma that had to wait for each other, or of setmaxnreg that was ignored."""
    report = LIBRARY.with_name(LIBRARY.name + ".txt").read_text()
    assert not re.findall(r".*(?:[Ww]arning|Performance Loss).*", report)


@pytest.mark.skipif(cuobjdump() is None, reason="no disassembler: the package triton brings one")
@pytest.mark.parametrize(
    "architecture, wanted, unwanted",
    [
        ("80", {"IMMA", "HMMA", "LDSM", "LDGSTS"}, {"QMMA", "QGMMA"}),
        ("89", {"QMMA", "IMMA", "HMMA"}, {"QGMMA"}),
        ("90a", {"QGMMA", "IGMMA", "UTMALDG", "USETMAXREG", "IMMA"}, set()),
        ("100", {"IMMA", "HMMA"}, {"QGMMA"}),
        ("120", {"QMMA", "IMMA", "HMMA"}, {"QGMMA"}),
    ],
)
def test_tensor_cores_get_the_instructions_of_their_generation(architecture, wanted, unwanted):
    code = subprocess.run(
        [cuobjdump(), "--dump-sass", "-arch", f"sm_{architecture}", str(LIBRARY)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = set(
        re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", code, re.MULTILINE)
    )
    assert wanted <= found
    assert not unwanted & found
    assert not {"LDL", "STL"} & found  # registers that went to memory
