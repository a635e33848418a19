"""kernels/cpu/matmul_*.cpp against exact integers, exact small sums and float64, with every
instruction set that this processor has.
"""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from levels import LIBRARY, levels_here, on_level
from torch import Tensor

from quantkit import ops
from quantkit.ops import fallback, native
from quantkit.ops.arguments import PACKINGS
from quantkit.ops.linear import QuantizedLinear, kernel_for
from quantkit.schemes.scheme import SCHEMES, QuantScheme

if LIBRARY is None:
    pytest.skip(
        "the CPU kernels weren't built, or QUANTKIT_KERNELS asks for the reference",
        allow_module_level=True,
    )

OPS = torch.ops.quantkit
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
UNIT = 2.0**-24  # rounding of float32
# One past each tile's height on every level, both of AMX's, and one past a superblock.
TOKENS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65, 130, 257]
# (out_features, in_features): panels and their rests, one past a vector, a step of each instruction
# and a chunk.
WEIGHTS = [(1, 1), (16, 64), (5, 7), (33, 65), (48, 128), (100, 300), (130, 200), (17, 1030)]
E4M3 = torch.float8_e4m3fn
LEVELS_HERE = levels_here()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=LEVELS_HERE, ids=[native.LEVELS[level] for level in LEVELS_HERE])
def level(request):
    with on_level(request.param):
        yield request.param


def int8_codes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def e4m3_codes(*shape: int) -> Tensor:
    """All finite codes, the large ones seldom."""
    return (
        (torch.randn(shape) * torch.exp2(torch.randint(-9, 6, shape).float()))
        .clamp(-448, 448)
        .to(E4M3)
    )


def within(output: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> None:
    """output against left [tokens, k] times right [n, k] transposed in float64, with the bound of a
    float32 sum in any order, scaled twice.
    """
    left, right = left.double(), right.double()
    exact, size = left @ right.T, left.abs() @ right.abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    bound = (left.shape[1] + 4) * UNIT * size + 1e-30
    assert bool(((output.double() - exact).abs() <= bound).all()), (
        f"{((output.double() - exact).abs() / bound).max():.3g} times the bound"
    )


def test_int8_equals_exact_integers(level):
    torch.manual_seed(level)
    for out_features, in_features in WEIGHTS:
        codes, bias, scale = (
            int8_codes(out_features, in_features),
            torch.randn(out_features),
            torch.rand(1, out_features),
        )
        packed = OPS.pack_weight(codes, "int8_dot")
        for tokens in TOKENS:
            activations, own = int8_codes(tokens, in_features), torch.rand(tokens, 1)
            sums = (activations.long() @ codes.long().T).float()
            dtype = DTYPES[tokens % 3]
            expected = (sums * own * scale + bias).to(dtype)
            assert torch.equal(
                OPS.matmul_int8(
                    activations, own, packed, scale, in_features, None, None, bias, dtype
                ),
                expected,
            )
            expected = (sums * own[:1] * scale).to(dtype)
            assert torch.equal(
                OPS.matmul_int8(
                    activations, own[:1], packed, scale, in_features, None, None, None, dtype
                ),
                expected,
            )
            zero = torch.randint(-128, 128, (tokens,), dtype=torch.int32)
            shifted = ((activations.long() - zero[:, None]) @ codes.long().T).float() * own * scale
            assert torch.equal(
                OPS.matmul_int8(
                    activations,
                    own,
                    packed,
                    scale,
                    in_features,
                    zero,
                    codes.sum(1, dtype=torch.int32),
                    None,
                    torch.float32,
                ),
                shifted,
            )


def test_int8_sums_at_their_ends_do_not_saturate(level):
    in_features = 4096
    for left, right in ((-128, -128), (127, 127), (-128, 127), (127, -128)):
        packed = OPS.pack_weight(torch.full((17, in_features), right, dtype=torch.int8), "int8_dot")
        ones = torch.ones(1, 1), torch.ones(1, 17)
        for tokens in (1, 8, 33):
            output = OPS.matmul_int8(
                torch.full((tokens, in_features), left, dtype=torch.int8),
                ones[0],
                packed,
                ones[1],
                in_features,
                None,
                None,
                None,
                torch.float32,
            )
            assert torch.equal(output, torch.full((tokens, 17), float(left * right * in_features)))


def test_int8_output_may_be_a_subnormal(level):
    """What rounds to bfloat16 in one instruction takes subnormals as zero; it may run only where
    there are none.
    """
    packed = OPS.pack_weight(torch.ones(16, 64, dtype=torch.int8), "int8_dot")
    activations = torch.ones(1, 64, dtype=torch.int8)
    own, scale = torch.full((1, 1), 2.0**-70), torch.full((1, 16), 2.0**-66)
    output = OPS.matmul_int8(activations, own, packed, scale, 64, None, None, None, torch.bfloat16)
    assert (
        torch.equal(output, torch.full((1, 16), 2.0**-130, dtype=torch.bfloat16))
        and output.max() > 0
    )


def test_fp8_small_integers_give_exact_sums(level):
    torch.manual_seed(level)
    for out_features, in_features in WEIGHTS:
        codes = torch.randint(-16, 17, (out_features, in_features)).float().to(E4M3)
        packed = OPS.pack_weight(codes, "e4m3")
        scale = torch.exp2(torch.randint(-3, 4, (1, out_features)).float())
        for tokens in TOKENS:
            activations = torch.randint(-16, 17, (tokens, in_features)).float().to(E4M3)
            expected = activations.double() @ codes.double().T * scale
            output = OPS.matmul_fp8(
                activations,
                torch.ones(1, 1),
                packed,
                scale,
                in_features,
                False,
                None,
                torch.float32,
            )
            assert torch.equal(output.double(), expected)


def test_every_e4m3_code_is_read_right_on_both_sides(level):
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3)
    identity = torch.eye(256).to(E4M3)
    one, ones = torch.ones(1, 1), torch.ones(1, 256)
    finite = codes.float().nan_to_num(0.0).to(E4M3)
    for tokens in (1, 16, 256):
        # Activations: row t holds code t alone, and all of them.
        rows = torch.diag(finite.float()).to(E4M3)[:tokens]
        output = OPS.matmul_fp8(
            rows, one, OPS.pack_weight(identity, "e4m3"), ones, 256, False, None, torch.float32
        )
        assert torch.equal(output, rows.float())
        # Weights: each output feature has one code.
        packed = OPS.pack_weight(torch.diag(finite.float()).to(E4M3), "e4m3")
        picked = torch.eye(256)[:tokens]
        assert torch.equal(
            OPS.matmul_fp8(picked.to(E4M3), one, packed, ones, 256, False, None, torch.float32),
            picked * finite.float(),
        )
        assert torch.equal(
            OPS.matmul_weight_only(
                picked.bfloat16(), packed, "e4m3", ones, 256, False, None, torch.float32
            ),
            picked * finite.float(),
        )
    for code in (127, 255):
        nan = torch.zeros(3, 64).to(E4M3)
        nan[1, 5] = codes[code]
        output = OPS.matmul_fp8(
            nan,
            one,
            OPS.pack_weight(identity[:16, :64].contiguous(), "e4m3"),
            ones[:, :16],
            64,
            False,
            None,
            torch.float32,
        )
        assert output[1].isnan().all() and not output[0].isnan().any()


def test_every_int8_weight_is_read_right(level):
    codes = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8)
    weight = torch.zeros(256, 256, dtype=torch.int8)
    weight[range(256), range(256)] = codes
    packed = OPS.pack_weight(weight, "int8")
    for tokens in (1, 40, 256):
        picked = torch.eye(256)[:tokens]
        output = OPS.matmul_weight_only(
            picked.bfloat16(), packed, "int8", torch.ones(1, 256), 256, False, None, torch.float32
        )
        assert torch.equal(output, picked * codes.float())


def test_float_products_are_within_float32s_rounding(level):
    torch.manual_seed(level)
    for out_features, in_features in WEIGHTS:
        e4m3, int8, weight = (
            e4m3_codes(out_features, in_features),
            int8_codes(out_features, in_features),
            torch.randn(out_features, in_features).bfloat16(),
        )
        packed = {
            kind: OPS.pack_weight(codes, kind)
            for kind, codes in (("e4m3", e4m3), ("int8", int8), ("bf16", weight))
        }
        scale, bias = torch.rand(1, out_features) + 0.1, torch.randn(out_features)
        for tokens in TOKENS[::3]:
            activations, own, inputs = (
                e4m3_codes(tokens, in_features),
                torch.rand(tokens, 1) + 0.1,
                torch.randn(tokens, in_features).bfloat16(),
            )
            output = OPS.matmul_fp8(
                activations, own, packed["e4m3"], scale, in_features, False, bias, torch.float32
            )
            within(output, activations.double() * own, e4m3.double() * scale.T, bias)
            for kind, codes in (("e4m3", e4m3), ("int8", int8)):
                output = OPS.matmul_weight_only(
                    inputs, packed[kind], kind, scale, in_features, False, bias, torch.float32
                )
                within(output, inputs, codes.double() * scale.T, bias)
            within(
                OPS.matmul_bf16(inputs, packed["bf16"], out_features, bias, torch.float32),
                inputs,
                weight,
                bias,
            )


@pytest.mark.parametrize("group", [4, 32, 100, 128])
def test_groups_have_scales_of_their_own(level, group):
    torch.manual_seed(group)
    for out_features, in_features in ((33, 65), (48, 256), (100, 300)):
        groups = -(-in_features // group)
        scale, bias = torch.rand(groups, out_features) + 0.1, torch.randn(out_features)
        e4m3, int8 = e4m3_codes(out_features, in_features), int8_codes(out_features, in_features)

        def spread(scales: Tensor, length: int = in_features) -> Tensor:
            return scales.double().repeat_interleave(group, dim=1)[:, :length]

        for tokens in (1, 9, 40):
            for own in (torch.rand(tokens, groups) + 0.1, torch.rand(tokens, 1) + 0.1):
                left, right = spread(own) if own.shape[1] > 1 else own.double(), spread(scale.T)
                activations = e4m3_codes(tokens, in_features)
                output = OPS.matmul_fp8(
                    activations,
                    own,
                    OPS.pack_weight(e4m3, "e4m3"),
                    scale,
                    group,
                    False,
                    bias,
                    torch.float32,
                )
                within(output, activations.double() * left, e4m3.double() * right, bias)
                activations = int8_codes(tokens, in_features)
                output = OPS.matmul_int8(
                    activations,
                    own,
                    OPS.pack_weight(int8, "int8_dot"),
                    scale,
                    group,
                    None,
                    None,
                    bias,
                    torch.float32,
                )
                within(output, activations.double() * left, int8.double() * right, bias)
            inputs = torch.randn(tokens, in_features).bfloat16()
            within(
                OPS.matmul_weight_only(
                    inputs,
                    OPS.pack_weight(int8, "int8"),
                    "int8",
                    scale,
                    group,
                    False,
                    bias,
                    torch.float32,
                ),
                inputs,
                int8.double() * right,
                bias,
            )


def test_powers_of_two_go_into_the_operands_without_a_loss(level):
    """MX: sums of small integers times powers of two are exact, so they equal float64's."""
    torch.manual_seed(level)
    for out_features, in_features in ((33, 64), (17, 100)):
        groups = -(-in_features // 32)
        codes = torch.randint(-8, 9, (out_features, in_features)).float().to(E4M3)
        scale = torch.exp2(torch.randint(-2, 3, (groups, out_features)).float())
        for tokens in (1, 7, 40):
            activations = torch.randint(-8, 9, (tokens, in_features)).float().to(E4M3)
            own = torch.exp2(torch.randint(-2, 3, (tokens, groups)).float())
            left = activations.double() * own.double().repeat_interleave(32, dim=1)[:, :in_features]
            right = codes.double() * scale.T.double().repeat_interleave(32, dim=1)[:, :in_features]
            output = OPS.matmul_fp8(
                activations,
                own,
                OPS.pack_weight(codes, "e4m3"),
                scale,
                32,
                True,
                None,
                torch.float32,
            )
            assert torch.equal(output.double(), left @ right.T)


def calls(tokens: int = 33, out_features: int = 50, in_features: int = 96) -> dict[str, tuple]:
    """Arguments of each op."""
    torch.manual_seed(0)
    int8, e4m3, weight = (
        int8_codes(out_features, in_features),
        e4m3_codes(out_features, in_features),
        torch.randn(out_features, in_features).bfloat16(),
    )
    own, scale, bias = torch.rand(tokens, 1), torch.rand(1, out_features), torch.randn(out_features)
    inputs = torch.randn(tokens, in_features).bfloat16()
    return {
        "matmul_int8": (
            int8_codes(tokens, in_features),
            own,
            OPS.pack_weight(int8, "int8_dot"),
            scale,
            in_features,
            None,
            None,
            bias,
            torch.bfloat16,
        ),
        "matmul_fp8": (
            e4m3_codes(tokens, in_features),
            own,
            OPS.pack_weight(e4m3, "e4m3"),
            scale,
            in_features,
            False,
            bias,
            torch.bfloat16,
        ),
        "matmul_weight_only": (
            inputs,
            OPS.pack_weight(int8, "int8"),
            "int8",
            scale,
            in_features,
            False,
            bias,
            torch.bfloat16,
        ),
        "matmul_bf16": (inputs, OPS.pack_weight(weight, "bf16"), out_features, bias, torch.float32),
    }


@pytest.mark.parametrize("name", calls())
def test_same_bits_twice_with_strided_rows_and_on_several_threads(level, name):
    for tokens in (3, 70):
        activations, *rest = calls(tokens)[name]
        expected = getattr(OPS, name)(activations, *rest)
        assert torch.equal(getattr(OPS, name)(activations, *rest), expected)
        wide = torch.empty(tokens, activations.shape[1] + 13, dtype=activations.dtype)
        # NaN in E4M3 and bfloat16: what is read beyond a row shows
        wide.view(torch.uint8).fill_(0x7F)
        wide[:, : activations.shape[1]] = activations
        assert torch.equal(getattr(OPS, name)(wide[:, : activations.shape[1]], *rest), expected)
        torch.set_num_threads(3)
        assert torch.equal(getattr(OPS, name)(activations, *rest), expected)
        torch.set_num_threads(1)
        with ThreadPoolExecutor(4) as pool:
            outputs = [pool.submit(getattr(OPS, name), activations, *rest) for _ in range(8)]
            assert all(torch.equal(output.result(), expected) for output in outputs)


@pytest.mark.parametrize("name", calls())
@pytest.mark.parametrize("tokens", [0, 1, 18])
def test_schemas_and_fakes_describe_the_ops(name, tokens):
    arguments = calls(tokens)[name]
    # What checks the schema multiplies tensors, which torch can't in FP8.
    tests = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    torch.library.opcheck(
        getattr(OPS, name).default,
        arguments,
        test_utils=tests[1:] if name == "matmul_fp8" else tests,
    )


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_quantized_linear_compiles_whole_and_agrees_with_the_reference(scheme: QuantScheme):
    torch.manual_seed(0)
    weight, bias = (
        ops.quantize(torch.randn(144, 320).bfloat16(), scheme.weight),
        torch.randn(144).bfloat16(),
    )
    scale = torch.tensor([0.02]) if scheme.needs_calibration else None
    fast, slow = (
        QuantizedLinear(weight, scheme, scale, bias, torch.bfloat16, use_kernel)
        for use_kernel in (True, False)
    )
    assert fast.kernel is not None and slow.kernel is None
    assert torch.equal(
        fast.weight().qdata.view(torch.uint8), weight.qdata.view(torch.uint8)
    ) and torch.equal(fast.weight().scale, weight.scale)
    for inputs in (
        torch.randn(2, 9, 320).bfloat16(),
        torch.randn(1, 320).bfloat16(),
        torch.randn(0, 320).bfloat16(),
    ):
        output, expected = fast(inputs), slow(inputs)
        assert output.shape == expected.shape and output.dtype == expected.dtype
        if fast.kernel == "matmul_int8":
            assert torch.equal(output, expected)
        else:  # sums in another order, rounded to bfloat16
            torch.testing.assert_close(output, expected, rtol=2.0**-7, atol=320 * UNIT * 60)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    inputs = torch.randn(5, 320).bfloat16()
    assert torch.equal(compiled(inputs), fast(inputs))


def test_where_no_kernel_runs_the_reason_is_given():
    int8, fp8, block = SCHEMES["int8-dynamic"], SCHEMES["fp8-dynamic"], SCHEMES["fp8-block"]
    assert kernel_for(int8.weight, int8.input, 64, torch.float32, "cpu") == ("matmul_int8", "")
    for weight, inputs, in_features, dtype, device, reason in (
        (int8.weight, int8.input, 64, torch.bfloat16, "meta", "no kernels for meta"),
        (int8.weight, fp8.input, 64, torch.bfloat16, "cpu", "INT8 weights by FP8_E4M3"),
        (int8.weight, None, 64, torch.float16, "cpu", "bfloat16 activations"),
        (int8.weight, int8.input, 1 << 17, torch.bfloat16, "cpu", "int32"),
        (block.weight, SCHEMES["mxfp8"].input, 256, torch.bfloat16, "cpu", "different sizes"),
    ):
        name, why_not = kernel_for(weight, inputs, in_features, dtype, device)
        assert name is None and reason in why_not


@pytest.mark.parametrize("name", calls())
def test_what_a_kernel_would_read_or_write_beyond_is_refused(name):
    activations, *rest = calls()[name]
    for wrong in (activations[:, :64].contiguous(), activations.float(), activations[0]):
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            getattr(OPS, name)(wrong, *rest)
    packed = next(
        index for index, value in enumerate(rest) if isinstance(value, Tensor) and value.dim() == 3
    )
    with pytest.raises(ValueError, match="packed weight"):
        getattr(OPS, name)(
            activations, *rest[:packed], rest[packed][:-1].contiguous(), *rest[packed + 1 :]
        )
    bias = next(
        index for index, value in enumerate(rest) if isinstance(value, Tensor) and value.dim() == 1
    )
    with pytest.raises(ValueError, match="bias"):
        getattr(OPS, name)(activations, *rest[:bias], rest[bias][:-1], *rest[bias + 1 :])


def test_a_kernel_writes_its_output_alone(level):
    """Guard bytes around the output, for each rest of rows and columns."""
    for tokens, out_features in ((1, 5), (7, 33), (33, 48), (17, 100)):
        inputs, weight = (
            torch.randn(tokens, 70).bfloat16(),
            torch.randn(out_features, 70).bfloat16(),
        )
        packed = OPS.pack_weight(weight, "bf16")
        guarded = torch.full((tokens * out_features + 128,), 12345.0)
        output = guarded[64:-64]
        status = LIBRARY.qk_matmul_bf16(
            inputs.data_ptr(),
            tokens,
            70,
            70,
            packed.data_ptr(),
            out_features,
            None,
            output.data_ptr(),
            2,
            1,
        )
        assert status == 0
        assert torch.all(guarded[:64] == 12345.0) and torch.all(guarded[-64:] == 12345.0)
        assert torch.equal(
            output.reshape(tokens, out_features),
            OPS.matmul_bf16(inputs, packed, out_features, None, torch.float32),
        )


def test_the_library_refuses_arguments_that_no_kernel_takes():
    null = ctypes.c_void_p()
    assert LIBRARY.qk_matmul_bf16(null, 0, 8, 8, null, 8, null, null, 0, 1) == -1
    assert LIBRARY.qk_matmul_bf16(null, 4, 8, 7, null, 8, null, null, 0, 1) == -1
    assert LIBRARY.qk_matmul_bf16(null, 4, 8, 8, null, 8, null, null, 3, 1) == -1
    assert LIBRARY.qk_matmul_bf16(null, 4, 8, 8, null, 8, null, null, 0, 0) == -1
    assert (
        LIBRARY.qk_matmul_int8(
            null,
            4,
            1 << 17,
            1 << 17,
            null,
            8,
            1 << 17,
            null,
            0,
            0,
            null,
            0,
            null,
            null,
            0,
            1,
            null,
            0,
            null,
        )
        == -1
    )
    assert (
        LIBRARY.qk_matmul_fp8(
            null, 4, 64, 64, null, 8, 30, null, 0, 0, null, 0, null, null, 0, 1, 0
        )
        == -1
    )
    assert (
        LIBRARY.qk_matmul_weight_only(null, 4, 64, 64, null, 3, 8, 64, null, 0, null, null, 0, 1, 0)
        == -1
    )
    assert LIBRARY.qk_pack_weight(4, null, 1, 1, 1, null) == -1


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (16, 64), (33, 100)])
def test_packing_equals_its_reference_and_can_be_undone(packing, shape):
    codes = {"e4m3": e4m3_codes, "bf16": lambda *shape: torch.randn(shape).bfloat16()}.get(
        packing, int8_codes
    )(*shape)
    packed = OPS.pack_weight(codes, packing)
    assert torch.equal(packed, fallback.pack_weight(codes, packing))
    assert torch.equal(
        ops.unpack_weight(packed, packing, *shape).view(torch.uint8), codes.view(torch.uint8)
    )
    with pytest.raises(ValueError, match="packs"):
        OPS.pack_weight(codes.float(), packing)
    with pytest.raises(ValueError, match="unknown packing"):
        OPS.pack_weight(codes, "int4")
