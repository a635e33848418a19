"""The benchmark programs are imported, and the checkpoints that they rewrite keep their codes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantkit.checkpoint.formats import read_quantization_config, stored_linears
from quantkit.checkpoint.reader import Checkpoint
from quantkit.cli.bench import BENCHMARK_KINDS
from quantkit.exporter.verify import verify
from quantkit.ops.reference import QuantizedTensor, quantize
from quantkit.schemes.scheme import SCHEMES, QuantScheme

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import error_budget  # noqa: E402
import served  # noqa: E402


@pytest.mark.slow
def test_every_program_is_imported():
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


def decoded(path: Path, module: str) -> tuple[QuantizedTensor, QuantScheme]:
    checkpoint = Checkpoint.open(path)
    config = read_quantization_config(checkpoint.config)
    scheme = config.scheme_of(module)
    suffixes = stored_linears(checkpoint.tensors)[module]
    tensors = {suffix: checkpoint.read(f"{module}.{suffix}") for suffix in suffixes}
    return config.file_format.decode(tensors, scheme, module)[0], scheme


def test_the_error_budgets_copies_differ_in_the_inputs_alone(llama, export_to, tmp_path):
    original = export_to("int8-dynamic")
    copied = error_budget.without_inputs(original, tmp_path / "copy", "down_proj")
    assert not verify(copied, llama).faults
    for part, has_inputs in (("down_proj", False), ("up_proj", True)):
        name = f"model.layers.0.mlp.{part}"
        (before, scheme), (after, found) = decoded(original, name), decoded(copied, name)
        assert torch.equal(before.qdata, after.qdata) and torch.equal(before.scale, after.scale)
        assert scheme.input is not None and (found.input is not None) == has_inputs


def test_dequantized_copies_hold_the_values_of_the_codes(llama, export_to, tmp_path):
    quantized = export_to("fp8-dynamic")
    values = Checkpoint.open(served.dequantized(quantized, llama, tmp_path / "values"))
    name = "model.layers.0.mlp.down_proj.weight"
    weight = quantize(Checkpoint.open(llama).read(name).float(), SCHEMES["fp8-dynamic"].weight)
    assert torch.equal(values.read(name), weight.dequantize().bfloat16())
    assert read_quantization_config(values.config) is None


@pytest.mark.slow
def test_the_bench_of_multiplications_has_a_table_of_each_kind(tmp_path):
    out = tmp_path / "matmul.md"
    program = ROOT / "kernels" / "bench" / "matmul.py"
    options = [
        "--turns",
        "1",
        "--shape",
        "64x64",
        "-o",
        str(out),
        "--json",
        str(tmp_path / "m.json"),
    ]
    subprocess.run([sys.executable, str(program), *options], check=True, capture_output=True)
    text = out.read_text()
    for kind in BENCHMARK_KINDS:
        heading = text.index(f"## {kind}")
        assert "| 64" in text[heading : text.find("\n## ", heading + 1)], kind
