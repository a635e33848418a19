"""torch.ops.quantkit: which function runs an op, and what it gives."""

from dataclasses import replace

import pytest
import torch

from quantkit import ops
from quantkit.ops import cpu, fallback, native, reference
from quantkit.ops.torch_ops import ALL_OPS
from quantkit.schemes.number_formats import INT8, NUMBER_FORMATS
from quantkit.schemes.quant_spec import CHANNEL, QuantSpec, group

OPS = torch.ops.quantkit
SYMMETRIC_INT4 = replace(INT8, name="INT4_IN_BYTES", min=-7, max=7)


@pytest.fixture
def unknown_format(monkeypatch):
    """A number format that ops can name and that no kernel has a number for."""
    monkeypatch.setitem(NUMBER_FORMATS, SYMMETRIC_INT4.name, SYMMETRIC_INT4)
    return SYMMETRIC_INT4


@pytest.mark.parametrize("granularity", [CHANNEL, group(8)])
def test_a_format_that_kernels_do_not_know_runs_by_the_reference(unknown_format, granularity):
    torch.manual_seed(0)
    values, spec = torch.randn(5, 24), QuantSpec(unknown_format, granularity)
    expected = reference.quantize(values, spec)
    assert expected.qdata.abs().max() == 7
    found = ops.quantize(values, spec)
    assert torch.equal(found.qdata, expected.qdata) and torch.equal(found.scale, expected.scale)
    assert torch.equal(ops.dequantize(found), expected.dequantize())
    blocks = granularity.block_shape(*values.shape)
    codes = OPS.encode_blocks(values, expected.scale, *blocks, unknown_format.name)
    assert torch.equal(codes, expected.qdata)
    for ours, theirs in zip(
        OPS.quantize_rows(values, blocks[1], unknown_format.name, "stored"),
        (expected.qdata, expected.scale),
    ):
        assert torch.equal(ours, theirs)
    states, scale = values.reshape(1, 1, 5, 24), torch.tensor([0.25])
    codes = OPS.quantize_kv(states, scale, unknown_format.name)
    assert torch.equal(codes, (states / 0.25).round().clamp(-7, 7).to(torch.int8))


def test_fakes_know_every_format(unknown_format):
    codes, scale = OPS.quantize_rows(
        torch.empty(3, 20, device="meta"), 8, unknown_format.name, "dynamic"
    )
    assert codes.dtype == torch.int8 and codes.shape == (3, 20) and scale.shape == (3, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_a_dtype_that_kernels_do_not_know_runs_by_the_reference(dtype):
    """Values in it are quantized, and results are converted to it."""
    values = torch.arange(-12, 12).reshape(2, 12).to(dtype)
    codes, scale = OPS.quantize_rows(values, 12, "INT8", "dynamic")
    expected = fallback.quantize_rows(values.float(), 12, "INT8", "dynamic")
    assert torch.equal(codes, expected[0]) and torch.equal(scale, expected[1])
    packed = OPS.pack_weight(codes, "int8_dot")
    product = (codes, scale, packed, scale.T.contiguous(), 12, None, None, None)
    assert torch.equal(OPS.matmul_int8(*product, dtype), fallback.matmul_int8(*product, dtype))
    assert OPS.dequantize_blocks(codes, scale, 1, 12, dtype).dtype == dtype


def test_no_states_have_no_codes():
    codes = OPS.quantize_kv(torch.empty(1, 2, 0, 8), torch.ones(1), "FP8_E4M3")
    assert codes.shape == (1, 2, 0, 8) and codes.dtype == torch.float8_e4m3fn


def test_without_the_library_every_cpu_kernel_declines(monkeypatch):
    monkeypatch.setattr(cpu, "cpu_kernels", lambda: None)
    values, scale = torch.randn(2, 64), torch.ones(2, 1)
    codes = torch.ones(2, 64, dtype=torch.int8)
    packed = fallback.pack_weight(codes, "int8_dot")
    product = (codes, scale, packed, torch.ones(1, 2), 64, None, None, None, torch.float32)
    for kernel, given in (
        (cpu.block_amax, (values, 1, 64)),
        (cpu.quantize_rows, (values, 64, "INT8", "stored")),
        (cpu.encode_blocks, (values, scale, 1, 64, "INT8")),
        (cpu.dequantize_blocks, (codes, scale, 1, 64)),
        (cpu.pack_weight, (codes, "int8")),
        (cpu.matmul_int8, product),
    ):
        assert kernel(*given) is NotImplemented
    assert torch.equal(OPS.matmul_int8(*product), fallback.matmul_int8(*product))


def test_each_op_is_declared_once_with_its_name_everywhere():
    names = [op.name for op in ALL_OPS]
    assert len(set(names)) == len(names) == 13
    for op in ALL_OPS:
        functions = [function for function in (op.reference, op.cpu, op.cuda) if function]
        assert {function.__name__ for function in functions} == {op.name}


@pytest.mark.skipif(native.cpu_kernels() is None, reason="there are no CPU kernels here")
def test_kernels_run_where_they_take_the_arguments(monkeypatch):
    """A reference that gives something else isn't called."""
    values = torch.randn(3, 16)
    expected = reference.quantize(values, QuantSpec(INT8, CHANNEL))
    monkeypatch.setattr(reference, "quantize", None)
    codes, _ = OPS.quantize_blocks(values, 1, 16, "INT8", "stored")
    assert torch.equal(codes, expected.qdata)
