"""kernels/cuda against exact integers, exact small sums, float64 and ops/reference.py: on the
device where there is one, and emulated on the CPU anywhere.

An emulated machine runs the same .cu files (tests/kernels/emulator/emulator.h): "emulated-80" by
mma.sync alone, "emulated-90" with wgmma and the copy engine.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import emulated
import pytest
import torch
from torch import Tensor

from quantkit import ops
from quantkit.ops import cuda, fallback, native, reference
from quantkit.ops.arguments import FLOAT_NUMBERS, FORMAT_NUMBERS
from quantkit.ops.linear import QuantizedLinear, kernel_for
from quantkit.ops.torch_ops import ALL_OPS
from quantkit.schemes.number_formats import FP8_E4M3, INT8
from quantkit.schemes.quant_spec import QuantSpec, block
from quantkit.schemes.scheme import SCHEMES

KERNELS = {op.name: op.cuda for op in ALL_OPS}
E4M3 = torch.float8_e4m3fn
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
UNIT = 2.0**-24  # rounding of float32
# Hopper's tensor cores keep of a sum of FP8 products fewer bits than float32 has; after 128 of them
# it is added in float32.
SHORT_UNIT = 2.0**-12
HAS_DEVICE = torch.cuda.is_available() and cuda.missing_reason() is None
MACHINES = [
    # Compiling the emulated libraries takes a minute of one core.
    pytest.param("emulated-80", marks=pytest.mark.slow),
    pytest.param("emulated-90", marks=pytest.mark.slow),
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not HAS_DEVICE, reason="no CUDA device, or no CUDA kernels"),
    ),
]


@dataclass(frozen=True)
class Machine:
    """Where kernels run. is_short: whether FP8 sums may have SHORT_UNIT."""

    name: str
    device: str
    library: ctypes.CDLL

    @property
    def is_short(self) -> bool:
        return self.device == "cuda" and torch.cuda.get_device_capability()[0] == 9

    def run(self, op: str, *arguments):
        """The op's kernel, its results on the CPU. No reference stands in for it."""
        moved = [
            argument.to(self.device) if isinstance(argument, Tensor) else argument
            for argument in arguments
        ]
        result = KERNELS[op](*moved)
        assert result is not NotImplemented, f"no kernel takes {op}"
        return tuple(part.cpu() for part in result) if isinstance(result, tuple) else result.cpu()

    def pack(self, codes: Tensor) -> Tensor:
        return cuda.pack_weight(
            codes.to(self.device), {torch.int8: "int8", E4M3: "e4m3"}[codes.dtype]
        )

    def matmul(
        self,
        activations: Tensor,
        own: Tensor | None,
        codes: Tensor,
        scale: Tensor,
        group: int,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """Whatever multiplication these operands need."""
        if activations.dtype == torch.bfloat16:
            packing = "int8" if codes.dtype == torch.int8 else "e4m3"
            return self.run(
                "matmul_weight_only",
                activations,
                cuda.pack_weight(codes, packing),
                packing,
                scale,
                group,
                False,
                bias,
                dtype,
            )
        if activations.dtype == torch.int8:
            return self.run(
                "matmul_int8",
                activations,
                own,
                cuda.pack_weight(codes, "int8_dot"),
                scale,
                group,
                None,
                None,
                bias,
                dtype,
            )
        return self.run(
            "matmul_fp8",
            activations,
            own,
            cuda.pack_weight(codes, "e4m3"),
            scale,
            group,
            False,
            bias,
            dtype,
        )


@pytest.fixture(scope="session")
def emulated_libraries(request, tmp_path_factory) -> dict[int, ctypes.CDLL]:
    if emulated.compiler() is None:
        pytest.skip("there is no C++ compiler to build the emulated kernels with")
    cache = getattr(request.config, "cache", None)  # a plugin that may be switched off
    return emulated.build(
        cache.mkdir("quantkit-emulator") if cache else tmp_path_factory.mktemp("emulator")
    )


@pytest.fixture(params=MACHINES)
def machine(request, monkeypatch) -> Machine:
    if request.param == "cuda":
        return Machine("cuda", "cuda", native.cuda_kernels())
    library = request.getfixturevalue("emulated_libraries")[int(request.param[-2:]) * 10]
    library.qk_emulator_configure(3, 0)
    monkeypatch.setattr(cuda, "cuda_kernels", lambda: library)
    return Machine(request.param, "cpu", library)


def int8_codes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def small_e4m3(*shape: int) -> Tensor:
    """Integers whose sums are exact in the fewest bits that tensor cores keep."""
    return torch.randint(-4, 5, shape).float().to(E4M3)


def e4m3_codes(*shape: int) -> Tensor:
    """All finite codes, the large ones seldom."""
    return (
        (torch.randn(shape) * torch.exp2(torch.randint(-9, 6, shape).float()))
        .clamp(-448, 448)
        .to(E4M3)
    )


def exact_int8(
    activations: Tensor,
    own: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    zero: Tensor | int = 0,
) -> Tensor:
    """What the reference computes, float32: sums in float64, which are exact here, then each step
    rounded.
    """
    sums = ((activations.double() - zero) @ codes.double().T).float()
    output = sums * own * scale
    return output if bias is None else output + bias


def within(
    output: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None, unit: float = UNIT
) -> None:
    """output against left [tokens, k] times right [n, k] transposed in float64, with the bound of a
    float32 sum in any order, scaled twice. unit: of sums of 128.
    """
    left, right = left.double(), right.double()
    exact, size = left @ right.T, left.abs() @ right.abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    bound = ((left.shape[1] + 4) * UNIT + (unit if unit > UNIT else 0.0)) * size + 1e-30
    assert bool(((output.double() - exact).abs() <= bound).all()), (
        f"{((output.double() - exact).abs() / bound).max():.3g} times the bound"
    )


# (tokens, out_features, in_features): around each kernel's tile and its rests; K one past a vector,
# a step and the swizzle's width. Emulated threads are slow.
EMULATED_SHAPES = [
    (1, 1, 1),
    (3, 5, 7),
    (8, 33, 65),
    (9, 16, 64),
    (16, 40, 600),
    (17, 130, 200),
    (32, 129, 144),
    (33, 150, 272),
    (64, 64, 128),
    (65, 17, 1030),
    (130, 300, 300),
    (257, 150, 144),
]
DEVICE_SHAPES = [
    (tokens, *weight)
    for weight in [
        (1, 1),
        (16, 64),
        (5, 7),
        (33, 65),
        (48, 128),
        (130, 200),
        (150, 272),
        (256, 1030),
        (1000, 512),
    ]
    for tokens in range(1, 131)
] + [
    (tokens, features, inner)
    for tokens in (257, 1100)
    for features in (130, 4096)
    for inner in (300, 4096)
]


def shapes_of(machine: Machine) -> list[tuple[int, int, int]]:
    return DEVICE_SHAPES if machine.device == "cuda" else EMULATED_SHAPES


# ---- Multiplications.


def test_int8_equals_exact_integers(machine):
    torch.manual_seed(0)
    for number, (tokens, out_features, in_features) in enumerate(shapes_of(machine)):
        codes, activations = int8_codes(out_features, in_features), int8_codes(tokens, in_features)
        own, scale, bias = (
            torch.rand(tokens, 1),
            torch.rand(1, out_features),
            torch.randn(out_features),
        )
        dtype = DTYPES[number % 3]
        assert torch.equal(
            machine.matmul(activations, own, codes, scale, in_features, bias, dtype),
            exact_int8(activations, own, codes, scale, bias).to(dtype),
        )
        zero = torch.randint(-128, 128, (tokens,), dtype=torch.int32)
        packed, sums = cuda.pack_weight(codes, "int8_dot"), codes.sum(1, dtype=torch.int32)
        output = machine.run(
            "matmul_int8",
            activations,
            own[:1],
            packed,
            scale,
            in_features,
            zero,
            sums,
            None,
            torch.float32,
        )
        assert torch.equal(
            output, exact_int8(activations, own[:1], codes, scale, None, zero[:, None])
        )


def test_int8_sums_at_their_ends_do_not_saturate(machine):
    for tokens in (1, 33, 130):
        for left, right in ((-128, -128), (-128, 127)):
            activations, codes = (
                torch.full((tokens, 1024), left, dtype=torch.int8),
                torch.full((17, 1024), right, dtype=torch.int8),
            )
            output = machine.matmul(
                activations, torch.ones(1, 1), codes, torch.ones(1, 17), 1024, None, torch.float32
            )
            assert torch.equal(output, torch.full((tokens, 17), float(left * right * 1024)))


def test_fp8_small_integers_give_exact_sums(machine):
    torch.manual_seed(0)
    for tokens, out_features, in_features in shapes_of(machine):
        codes, activations = small_e4m3(out_features, in_features), small_e4m3(tokens, in_features)
        scale = torch.exp2(torch.randint(-3, 4, (1, out_features)).float())
        output = machine.matmul(
            activations, torch.ones(1, 1), codes, scale, in_features, None, torch.float32
        )
        assert torch.equal(output, activations.float() @ codes.float().T * scale)


def test_float_products_are_within_float32s_rounding(machine):
    torch.manual_seed(0)
    for tokens, out_features, in_features in shapes_of(machine)[::2]:
        own, scale, bias = (
            torch.rand(tokens, 1) + 0.1,
            torch.rand(1, out_features) + 0.1,
            torch.randn(out_features),
        )
        codes, activations = e4m3_codes(out_features, in_features), e4m3_codes(tokens, in_features)
        output = machine.matmul(activations, own, codes, scale, in_features, bias, torch.float32)
        within(
            output,
            activations.double() * own,
            codes.double() * scale.T,
            bias,
            SHORT_UNIT if machine.is_short else UNIT,
        )
        inputs = torch.randn(tokens, in_features).bfloat16()
        for weight in (codes, int8_codes(out_features, in_features)):
            within(
                machine.matmul(inputs, None, weight, scale, in_features, bias, torch.float32),
                inputs,
                weight.double() * scale.T,
                bias,
            )


@pytest.mark.parametrize("group", [32, 64, 128, 160])
def test_groups_have_scales_of_their_own(machine, group):
    torch.manual_seed(group)
    for tokens, out_features, in_features in ((5, 33, 272), (40, 70, 300), (130, 150, 416)):
        groups = -(-in_features // group)
        own, scale, bias = (
            torch.rand(tokens, groups) + 0.1,
            torch.rand(groups, out_features) + 0.1,
            torch.randn(out_features),
        )

        def spread(scales: Tensor, length: int = in_features) -> Tensor:
            return scales.double().repeat_interleave(group, dim=1)[:, :length]

        codes, activations = e4m3_codes(out_features, in_features), e4m3_codes(tokens, in_features)
        output = machine.matmul(activations, own, codes, scale, group, bias, torch.float32)
        within(
            output,
            activations.double() * spread(own),
            codes.double() * spread(scale.T),
            bias,
            SHORT_UNIT if machine.is_short else UNIT,
        )
        codes, activations = int8_codes(out_features, in_features), int8_codes(tokens, in_features)
        output = machine.matmul(activations, own, codes, scale, group, bias, torch.float32)
        within(output, activations.double() * spread(own), codes.double() * spread(scale.T), bias)
        inputs = torch.randn(tokens, in_features).bfloat16()
        within(
            machine.matmul(inputs, None, codes, scale, group, bias, torch.float32),
            inputs,
            codes.double() * spread(scale.T),
            bias,
        )


@pytest.mark.parametrize("tokens", [1, 16, 20, 50, 130, 300])
def test_fp8_blocks_of_weights_share_a_scale(machine, tokens):
    """128 x 128 blocks of weights and groups of 128 activations: the scales go in during the
    sum.
    """
    torch.manual_seed(tokens)
    for out_features, in_features in ((200, 300), (256, 400)):
        activations, codes = e4m3_codes(tokens, in_features), e4m3_codes(out_features, in_features)
        down, across = -(-out_features // 128), -(-in_features // 128)
        own, scale = torch.rand(tokens, across) + 0.1, torch.rand(across, down) + 0.1
        output = machine.matmul(activations, own, codes, scale, 128, None, torch.float32)
        left = activations.double() * own.double().repeat_interleave(128, 1)[:, :in_features]
        right = (
            codes.double()
            * scale.T.double()
            .repeat_interleave(128, 0)[:out_features]
            .repeat_interleave(128, 1)[:, :in_features]
        )
        within(output, left, right, None, SHORT_UNIT if machine.is_short else UNIT)


def test_every_code_is_read_right_on_both_sides(machine):
    codes = torch.arange(256, dtype=torch.uint8)
    finite = codes.view(E4M3).float().nan_to_num(0.0)
    integers = codes.view(torch.int8).float()
    one, ones = torch.ones(1, 1), torch.ones(1, 256)
    for tokens in (8, 40, 256):
        picked = torch.eye(256)[:tokens]
        for values, dtype in ((finite, E4M3), (integers, torch.int8)):
            weight = torch.diag(values).to(dtype)
            if dtype == E4M3:
                assert torch.equal(
                    machine.matmul(
                        weight[:tokens],
                        one,
                        torch.eye(256).to(E4M3),
                        ones,
                        256,
                        None,
                        torch.float32,
                    ),
                    weight.float()[:tokens],
                )
                assert torch.equal(
                    machine.matmul(picked.to(E4M3), one, weight, ones, 256, None, torch.float32),
                    picked * values,
                )
            assert torch.equal(
                machine.matmul(picked.bfloat16(), None, weight, ones, 256, None, torch.float32),
                picked * values,
            )


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_nan_reaches_its_outputs_and_no_others(machine, code):
    nan = torch.tensor([code], dtype=torch.uint8).view(E4M3)
    for tokens in (3, 40, 130):
        weight = small_e4m3(150, 200)
        weight[77, 131] = nan[0]
        for activations in (small_e4m3(tokens, 200), torch.zeros(tokens, 200).bfloat16()):
            own = None if activations.dtype == torch.bfloat16 else torch.ones(1, 1)
            output = machine.matmul(
                activations, own, weight, torch.ones(1, 150), 200, None, torch.float32
            )
            assert (
                output[:, 77].isnan().all()
                and not output[:, :77].isnan().any()
                and not output[:, 78:].isnan().any()
            )
        activations = small_e4m3(tokens, 200)
        activations[2, 5] = nan[0]
        output = machine.matmul(
            activations,
            torch.ones(1, 1),
            small_e4m3(150, 200),
            torch.ones(1, 150),
            200,
            None,
            torch.float32,
        )
        assert (
            output[2].isnan().all()
            and not output[:2].isnan().any()
            and not output[3:].isnan().any()
        )


def test_rows_may_have_a_stride_and_end_anywhere(machine):
    """What lies between rows is NaN, or another code: it must not be read into a sum."""
    torch.manual_seed(0)
    for tokens, in_features, room in ((3, 96, 16), (20, 200, 24), (70, 145, 15), (130, 64, 13)):
        codes, scale = small_e4m3(50, in_features), torch.ones(1, 50)
        for activations in (
            small_e4m3(tokens, in_features),
            int8_codes(tokens, in_features),
            torch.randint(-8, 9, (tokens, in_features)).bfloat16(),
        ):
            weight = int8_codes(50, in_features) if activations.dtype == torch.int8 else codes
            wide = torch.empty(
                tokens, in_features + room, dtype=activations.dtype, device=machine.device
            )
            wide.view(torch.uint8).fill_(0x7F)
            wide[:, :in_features] = activations.to(machine.device)
            own = None if activations.dtype == torch.bfloat16 else torch.ones(tokens, 1)
            output = machine.matmul(
                wide[:, :in_features], own, weight, scale, in_features, None, torch.float32
            )
            assert torch.equal(output, activations.float() @ weight.float().T)


def test_a_kernel_writes_its_output_alone(machine):
    """Guard bytes around the output and poison in it, for each kernel and each rest of rows and
    columns.
    """
    torch.manual_seed(0)
    for tokens, out_features in ((1, 5), (9, 33), (20, 130), (40, 129), (130, 40), (300, 200)):
        for dtype in (torch.float32, torch.bfloat16):
            activations, codes = (
                small_e4m3(tokens, 144).to(machine.device),
                small_e4m3(out_features, 144),
            )
            guarded = torch.full(
                (tokens * out_features + 128,), 12345.0, dtype=dtype, device=machine.device
            )
            guarded[64:-64] = float("nan")
            packed = machine.pack(codes)
            scale = torch.ones(1, out_features, device=machine.device)
            product = native.Product(
                activations=activations.data_ptr(),
                weight=packed.data_ptr(),
                tokens=tokens,
                features=out_features,
                inner=144,
                group=144,
                row_stride=144,
                weight_scale=scale.data_ptr(),
                scale_columns=1,
                output=guarded.data_ptr() + 64 * guarded.element_size(),
                output_type=FLOAT_NUMBERS[dtype],
            )
            assert machine.library.qk_cuda_matmul_fp8(ctypes.byref(product), None) == 0
            written = guarded[64:-64].reshape(tokens, out_features).float().cpu()
            assert torch.equal(
                written, (activations.cpu().float() @ codes.float().T).to(dtype).float()
            )
            assert torch.all(guarded[:64] == torch.tensor(12345.0, dtype=dtype)) and torch.all(
                guarded[-64:] == torch.tensor(12345.0, dtype=dtype)
            )


@pytest.mark.parametrize("seed", [1, 2])
def test_the_order_of_threads_changes_no_bit(machine, seed):
    """A barrier that is missing shows when threads run in another order; on a device, when the same
    call comes again.
    """
    torch.manual_seed(0)
    # Steps enough for each stage to be used again.
    for tokens, in_features in ((5, 1040), (40, 1300), (257, 780)):
        own, scale, inputs = (
            torch.rand(tokens, 1),
            torch.rand(1, 50),
            torch.randn(tokens, in_features).bfloat16(),
        )
        pairs = [
            (e4m3_codes(tokens, in_features), e4m3_codes(50, in_features)),
            (int8_codes(tokens, in_features), int8_codes(50, in_features)),
        ]
        if tokens < 200:
            pairs.append((inputs, e4m3_codes(50, in_features)))
        outputs = []
        for run in range(2):
            if machine.device == "cpu":
                machine.library.qk_emulator_configure(2, run and seed)
            outputs.append(
                [
                    machine.matmul(left, own, right, scale, in_features, None, torch.float32)
                    for left, right in pairs
                ]
            )
        assert all(torch.equal(first, again) for first, again in zip(*outputs))


# ---- Quantization.


def quantization_inputs(machine: Machine) -> list[Tensor]:
    shapes = [(1, 1), (3, 7), (5, 130), (4, 256), (2, 1024), (7, 1500)] + (
        [(1000, 4096), (64, 28672)] if machine.device == "cuda" else [(2, 9000)]
    )
    inputs = []
    for rows, columns in shapes:
        values = torch.randn(rows, columns) * torch.exp2(torch.randint(-12, 12, (rows, 1)).float())
        values[0] = 0.0
        inputs.append(values)
    extremes = torch.randn(8, 256)
    extremes[0, 3], extremes[1, 5], extremes[2] = float("nan"), float("inf"), 1e-42
    extremes[3] *= 1e30
    extremes[4] *= 1e-30
    extremes[5, 0] = -0.0
    return [*inputs, extremes]


def same_codes(ours: Tensor, expected: Tensor, scale: Tensor) -> bool:
    """Bit for bit, but a NaN is like any other, and what INT8 makes of one is left open."""
    if ours.dtype == torch.int8:
        finite = scale.isfinite().all(1)
        return torch.equal(ours[finite], expected[finite])
    nan = expected.float().isnan()
    return torch.equal(ours.float().isnan(), nan) and torch.equal(
        ours.view(torch.uint8)[~nan], expected.view(torch.uint8)[~nan]
    )


@pytest.mark.parametrize("format", ["INT8", "FP8_E4M3"])
@pytest.mark.parametrize("rule", ["stored", "power_of_two", "dynamic"])
def test_rows_are_quantized_as_the_reference_does(machine, format, rule):
    torch.manual_seed(0)
    for values in quantization_inputs(machine):
        for dtype, part in zip(DTYPES, (128, 32, 50)):
            rows = values.to(dtype)
            for group in (rows.shape[1], part):
                codes, scale = machine.run("quantize_rows", rows, group, format, rule)
                expected, expected_scale = fallback.quantize_rows(rows, group, format, rule)
                assert torch.equal(scale.nan_to_num(-1.0), expected_scale.nan_to_num(-1.0))
                assert same_codes(codes, expected, expected_scale)


def test_rows_to_quantize_may_have_a_stride(machine):
    for dtype in DTYPES:
        for columns, room in ((256, 16), (130, 3)):
            wide = torch.full((5, columns + room), float("nan"), dtype=dtype)
            wide[:, :columns] = torch.randn(5, columns)
            for group in (columns, 128):
                ours = machine.run(
                    "quantize_rows",
                    wide.to(machine.device)[:, :columns],
                    group,
                    "FP8_E4M3",
                    "dynamic",
                )
                expected = fallback.quantize_rows(wide[:, :columns], group, "FP8_E4M3", "dynamic")
                assert torch.equal(
                    ours[0].view(torch.uint8), expected[0].view(torch.uint8)
                ) and torch.equal(ours[1], expected[1])


@pytest.mark.parametrize("format", ["INT8", "FP8_E4M3"])
def test_keys_and_values_are_quantized_by_static_scales(machine, format):
    torch.manual_seed(0)
    for shape in ((1, 2, 5, 64), (2, 3, 4, 7), (1, 8, 17, 128)):
        for dtype in DTYPES:
            states = (torch.randn(shape) * 50).to(dtype)
            for scale in (torch.tensor([0.11]), torch.rand(shape[1]) + 0.05):
                expected = fallback.quantize_kv(states, scale, format)
                assert torch.equal(
                    machine.run("quantize_kv", states, scale, format).view(torch.uint8),
                    expected.view(torch.uint8),
                )
                # as attention makes them: [batch, tokens, heads, width]
                turned = states.transpose(1, 2).contiguous().to(machine.device).transpose(1, 2)
                assert torch.equal(
                    machine.run("quantize_kv", turned, scale, format).view(torch.uint8),
                    expected.view(torch.uint8),
                )


def test_a_static_scale_serves_a_matrix_or_each_row(machine):
    values = torch.randn(9, 70).bfloat16() * 100
    for rows, scale in ((9, torch.tensor([[0.3]])), (1, torch.rand(9, 1) + 0.1)):
        ours = machine.run("encode_blocks", values, scale, rows, 70, "INT8")
        assert torch.equal(ours, fallback.encode_blocks(values, scale, rows, 70, "INT8"))


def test_dequantize_equals_its_reference(machine):
    torch.manual_seed(0)
    for rows, columns, block_rows, block_columns in (
        (5, 7, 1, 7),
        (130, 200, 128, 128),
        (9, 64, 1, 32),
        (64, 96, 64, 96),
    ):
        scale = torch.rand(-(-rows // block_rows), -(-columns // block_columns))
        for codes in (
            int8_codes(rows, columns),
            torch.arange(rows * columns).to(torch.uint8).view(E4M3).reshape(rows, columns),
        ):
            expected = reference.dequantize(codes, scale, block(block_rows, block_columns))
            for dtype in DTYPES:
                ours = machine.run(
                    "dequantize_blocks", codes, scale, block_rows, block_columns, dtype
                )
                assert torch.equal(ours.nan_to_num(7.0), expected.to(dtype).nan_to_num(7.0))


# ---- numbers.h, compiled for the host.


@pytest.fixture
def host(emulated_libraries) -> ctypes.CDLL:
    return emulated_libraries[900]


@pytest.mark.slow
@pytest.mark.parametrize(
    "number_format", [INT8, FP8_E4M3], ids=lambda number_format: number_format.name
)
def test_conversions_are_right_for_all_codes_and_midpoints(host, number_format):
    codes = torch.arange(256, dtype=torch.uint8)
    typed = codes.view(getattr(torch, number_format.torch_name))
    values = torch.empty(256)
    host.qk_host_decode(
        FORMAT_NUMBERS[number_format.name],
        ctypes.c_void_p(codes.data_ptr()),
        ctypes.c_int64(256),
        ctypes.c_void_p(values.data_ptr()),
    )
    assert torch.equal(values.nan_to_num(1e9), typed.float().nan_to_num(1e9))
    finite = typed.float()[~typed.float().isnan()].sort().values
    middles = (finite[1:] + finite[:-1]) / 2
    around = torch.cat(
        [
            finite,
            middles,
            *(torch.nextafter(middles, torch.tensor(end)) for end in (-1e9, 1e9)),
            torch.tensor([1e9, -1e9, torch.inf, -torch.inf, -0.0]),
        ]
    )
    ours = torch.empty(len(around), dtype=torch.uint8)
    host.qk_host_encode(
        FORMAT_NUMBERS[number_format.name],
        ctypes.c_void_p(around.data_ptr()),
        ctypes.c_int64(len(around)),
        ctypes.c_void_p(ours.data_ptr()),
    )
    assert torch.equal(ours, reference.encode_codes(around, number_format).view(torch.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bit_numbers_are_read_and_rounded_as_torch_does(host, dtype):
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    values = torch.empty(65536)
    host.qk_host_widen(
        FLOAT_NUMBERS[dtype],
        ctypes.c_void_p(bits.data_ptr()),
        ctypes.c_int64(65536),
        ctypes.c_void_p(values.data_ptr()),
    )
    expected = bits.view(dtype).float()
    assert torch.equal(values.nan_to_num(7.0), expected.nan_to_num(7.0))
    some = torch.cat(
        [
            expected,
            expected * (1 + 2.0**-9),
            expected * (1 + 2.0**-12),
            torch.randn(10000) * 1e-5,
            torch.tensor([65519.0, 65520.0, 1e30]),
        ]
    )
    narrowed = torch.empty(len(some), dtype=torch.int16)
    host.qk_host_narrow(
        FLOAT_NUMBERS[dtype],
        ctypes.c_void_p(some.data_ptr()),
        ctypes.c_int64(len(some)),
        ctypes.c_void_p(narrowed.data_ptr()),
    )
    assert torch.equal(
        narrowed.view(dtype).float().nan_to_num(7.0), some.to(dtype).float().nan_to_num(7.0)
    )


@pytest.mark.slow
def test_division_by_a_scale_is_correctly_rounded(host):
    torch.manual_seed(0)
    for scale in (0.3, 1.0, 2.0**-7, 1e-3, 7e-30, 1e-40, 3e30):
        values = torch.cat(
            [
                torch.randn(20000) * scale * 300,
                torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e38, 1e-44]),
            ]
        )
        ours = torch.empty_like(values)
        host.qk_host_divide(
            ctypes.c_void_p(values.data_ptr()),
            ctypes.c_int64(len(values)),
            ctypes.c_float(scale),
            ctypes.c_void_p(ours.data_ptr()),
        )
        expected = values / torch.tensor(scale)
        normal = ~((expected.abs() < 2.0**-40) & (expected != 0))  # below that every code is zero
        assert torch.equal(
            ours.nan_to_num(7.0)[normal], expected.nan_to_num(7.0)[normal]
        ) and torch.equal(ours.signbit(), expected.signbit())


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    range(4),
    ids=["E4M3 to float16", "E4M3 to bfloat16", "E4M3 to bfloat16 without NaN", "INT8 to bfloat16"],
)
def test_pairs_for_the_tensor_cores_hold_every_code(host, kind):
    codes = torch.arange(256, dtype=torch.uint8)[torch.randperm(256)].contiguous()
    pairs = torch.empty(256, dtype=torch.float16 if kind == 0 else torch.bfloat16)
    host.qk_host_pairs(
        kind,
        ctypes.c_void_p(codes.data_ptr()),
        ctypes.c_int64(64),
        ctypes.c_void_p(pairs.data_ptr()),
    )
    expected = codes.view(torch.int8).float() if kind == 3 else codes.view(E4M3).float()
    if kind == 2:
        expected = torch.where(expected.isnan(), 480.0 * (1 - 2 * (codes >= 128).float()), expected)
    assert torch.equal(pairs.float().nan_to_num(9.0), expected.nan_to_num(9.0))


# ---- Python's part.


def test_what_no_kernel_takes_is_left_to_the_reference(machine):
    own, scale, packed = (
        torch.ones(3, 1),
        torch.ones(1, 4),
        cuda.pack_weight(int8_codes(4, 64), "int8_dot"),
    )
    assert (
        cuda.matmul_int8(
            int8_codes(0, 64), own[:0], packed, scale, 64, None, None, None, torch.float32
        )
        is NotImplemented
    )
    assert (
        cuda.matmul_int8(
            int8_codes(3, 64),
            torch.ones(3, 4),
            packed,
            torch.ones(4, 4),
            16,
            None,
            None,
            None,
            torch.float32,
        )
        is NotImplemented
    )
    assert (
        cuda.quantize_rows(torch.ones(2, 2, dtype=torch.float64), 2, "INT8", "dynamic")
        is NotImplemented
    )
    assert cuda.quantize_blocks(torch.ones(2, 2), 2, 2, "INT8", "dynamic") is NotImplemented
    # A format that kernels have no number for.
    assert cuda.quantize_rows(torch.ones(2, 2), 2, "FP8_E5M2", "dynamic") is NotImplemented
    states = torch.ones(1, 1, 2, 2)
    assert cuda.quantize_kv(states, torch.ones(1), "FP8_E5M2") is NotImplemented
    assert cuda.dequantize_blocks(torch.ones(2, 2), torch.ones(2, 1), 1, 2) is NotImplemented


def test_what_a_kernel_would_read_beyond_is_refused(machine):
    own, scale, packed, activations = (
        torch.ones(3, 1),
        torch.ones(1, 4),
        cuda.pack_weight(int8_codes(4, 64), "int8_dot"),
        int8_codes(3, 64),
    )
    for wrong, message in (
        (
            (activations[:, :40], own, packed, scale, 40, None, None, None, torch.float32),
            "packed weight",
        ),
        (
            (activations.float(), own, packed, scale, 64, None, None, None, torch.float32),
            "not a matrix of torch.int8",
        ),
        ((activations, own[:2], packed, scale, 64, None, None, None, torch.float32), "shape"),
        ((activations, own, packed, scale[:, :3], 64, None, None, None, torch.float32), "shape"),
        ((activations, own, packed, scale, 64, None, None, torch.ones(3), torch.float32), "bias"),
        (
            (
                activations,
                own,
                packed,
                scale,
                64,
                torch.zeros(3, dtype=torch.int32),
                None,
                None,
                torch.float32,
            ),
            "weight_sums",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            cuda.matmul_int8(*wrong)
    with pytest.raises(ValueError, match="int8 or e4m3"):
        cuda.matmul_weight_only(
            activations.bfloat16(), packed, "int8_dot", scale, 64, False, None, torch.float32
        )
    with pytest.raises(ValueError, match="one for each head"):
        cuda.quantize_kv(torch.ones(1, 2, 3, 4), torch.ones(3), "INT8")


def test_the_library_refuses_arguments_that_no_kernel_takes(machine):
    library = machine.library
    right = {
        "tokens": 1,
        "features": 4,
        "inner": 64,
        "group": 64,
        "row_stride": 64,
        "weight_scale": 8,
        "scale_columns": 1,
        "output_type": 0,
    }
    for wrong in (
        {"tokens": 0},
        {"inner": 40},
        {"group": 16},
        {"row_stride": 72},
        {"weight_scale": None},
        {"scale_columns": 64},
        {"output_type": 3},
        {"zero_point": 8},
    ):
        assert (
            library.qk_cuda_matmul_int8(ctypes.byref(native.Product(**(right | wrong))), None) == -1
        )
    assert library.qk_cuda_matmul_weight_only(ctypes.byref(native.Product(**right)), 2, None) == -1
    assert library.qk_cuda_quantize_rows(None, 3, 1, 1, 1, 1, 0, 0, None, None, None) == -1
    assert library.qk_cuda_quantize_kv(None, 0, 1, 1, 0, 1, 0, 0, 0, None, 0, 0, None, None) == -1
    assert library.qk_cuda_dequantize(None, 2, 1, 1, 1, 1, 1, None, 0, None, None) == -1


def test_fakes_describe_what_cuda_gives():
    """Shapes and types without a device: as torch.compile asks for them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    quantkit = torch.ops.quantkit
    with FakeTensorMode():
        codes = torch.empty(40, 100, dtype=torch.int8, device="cuda")
        packed = quantkit.pack_weight(codes, "int8_dot")
        assert (
            packed.shape == (40, 112)
            and packed.dtype == torch.uint8
            and packed.device.type == "cuda"
        )
        inputs = torch.empty(3, 100, dtype=torch.bfloat16, device="cuda")
        rows, own = quantkit.quantize_rows(inputs, 100, "INT8", "dynamic")
        output = quantkit.matmul_int8(
            rows,
            own,
            packed,
            torch.empty(1, 40, device="cuda"),
            100,
            None,
            None,
            None,
            torch.float16,
        )
        assert (
            output.shape == (3, 40)
            and output.dtype == torch.float16
            and output.device.type == "cuda"
        )
        blocks = quantkit.matmul_fp8(
            torch.empty(3, 100, dtype=E4M3, device="cuda"),
            own,
            torch.empty(300, 112, dtype=torch.uint8, device="cuda"),
            torch.empty(1, 3, device="cuda"),
            100,
            False,
            None,
            torch.bfloat16,
        )
        assert blocks.shape == (3, 300)
        states = torch.empty(1, 2, 3, 64, dtype=torch.bfloat16, device="cuda")
        assert (
            quantkit.quantize_kv(states, torch.empty(2, device="cuda"), "FP8_E4M3").shape
            == states.shape
        )


def test_where_no_cuda_kernel_runs_the_reason_is_given(monkeypatch):
    int8, block_scheme = SCHEMES["int8-dynamic"], SCHEMES["fp8-block"]
    monkeypatch.setattr(cuda, "missing_reason", lambda device=None: "torch finds no CUDA device")
    assert kernel_for(int8.weight, int8.input, 64, torch.bfloat16, "cuda") == (
        None,
        "torch finds no CUDA device",
    )
    monkeypatch.setattr(cuda, "missing_reason", lambda device=None: None)
    assert kernel_for(int8.weight, int8.input, 64, torch.bfloat16, "cuda") == ("matmul_int8", "")
    assert kernel_for(block_scheme.weight, block_scheme.input, 256, torch.bfloat16, "cuda") == (
        "matmul_fp8",
        "",
    )
    by_16 = QuantSpec(INT8, block(1, 16))
    name, why_not = kernel_for(by_16, None, 64, torch.bfloat16, "cuda")
    assert name is None and "multiple of 32" in why_not
    monkeypatch.setattr(cuda, "cuda_kernels", lambda: None)
    monkeypatch.undo()
    monkeypatch.setattr(cuda, "cuda_kernels", lambda: None)
    assert "no compiled CUDA kernels" in cuda.missing_reason()


# ---- On a device alone.

on_device = pytest.mark.skipif(not HAS_DEVICE, reason="no CUDA device, or no CUDA kernels")


@on_device
@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 64, 65, 300])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_quantized_linear_agrees_with_the_reference(scheme, tokens):
    torch.manual_seed(0)
    weight, bias = (
        ops.quantize(torch.randn(144, 320).bfloat16(), scheme.weight),
        torch.randn(144).bfloat16(),
    )
    moved = type(weight)(weight.qdata.cuda(), weight.scale.cuda(), weight.spec)
    scale = torch.tensor([0.02]) if scheme.needs_calibration else None
    inputs = torch.randn(tokens, 320).bfloat16()
    fast = QuantizedLinear(
        moved, scheme, None if scale is None else scale.cuda(), bias.cuda(), torch.bfloat16
    )
    slow = QuantizedLinear(weight, scheme, scale, bias, torch.bfloat16, False)
    assert fast.kernel is not None
    assert torch.equal(fast.weight().qdata.view(torch.uint8).cpu(), weight.qdata.view(torch.uint8))
    output, expected = fast(inputs.cuda()).cpu(), slow(inputs)
    if fast.kernel == "matmul_int8":
        assert torch.equal(output, expected)
    else:
        torch.testing.assert_close(output, expected, rtol=2.0**-7, atol=320 * SHORT_UNIT)


@on_device
@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_calls_may_be_captured_in_a_graph_and_replayed_on_a_stream(tokens):
    torch.manual_seed(0)
    codes = int8_codes(200, 300)
    packed, scale = cuda.pack_weight(codes.cuda(), "int8_dot"), torch.rand(1, 200)
    inputs, on_device_scale = torch.randn(tokens, 300).bfloat16().cuda(), scale.cuda()

    def run() -> Tensor:
        rows, own = torch.ops.quantkit.quantize_rows(inputs, 300, "INT8", "dynamic")
        return torch.ops.quantkit.matmul_int8(
            rows, own, packed, on_device_scale, 300, None, None, None, torch.float32
        )

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            output = run()
        for _ in range(3):
            changed = torch.randn(tokens, 300).bfloat16()
            inputs.copy_(changed)
            graph.replay()
            stream.synchronize()
            rows, own = fallback.quantize_rows(changed, 300, "INT8", "dynamic")
            assert torch.equal(output.cpu(), exact_int8(rows, own, codes, scale))


@on_device
def test_the_ops_are_the_kernels():
    """torch.ops.quantkit on CUDA tensors gives what the kernels give, and the schemas are kept."""
    codes, own, scale = (
        int8_codes(18, 96).cuda(),
        torch.rand(18, 1).cuda(),
        torch.rand(1, 50).cuda(),
    )
    packed = torch.ops.quantkit.pack_weight(int8_codes(50, 96).cuda(), "int8_dot")
    arguments = (codes, own, packed, scale, 96, None, None, None, torch.bfloat16)
    assert torch.equal(torch.ops.quantkit.matmul_int8(*arguments), cuda.matmul_int8(*arguments))
    torch.library.opcheck(torch.ops.quantkit.matmul_int8.default, arguments)
