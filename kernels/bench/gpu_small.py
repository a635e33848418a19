"""Every CUDA kernel once on small awkward shapes, against the reference: what a GPU is asked first,
and what compute-sanitizer watches.

    python kernels/bench/gpu_small.py [NAME...]

A line for each kernel; exit code 1 if one is wrong. Names: those of CASES.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from quantkit.ops import cuda, fallback

E4M3 = torch.float8_e4m3fn
# (tokens, out_features) for each path: decode with one and two blocks, swapped tiles of 32 and 64,
# tiles of 128 rows, and of 256 where they are more than multiprocessors.
SHAPES = ((1, 272), (16, 272), (20, 272), (50, 272), (100, 272), (300, 272), (1100, 3456))
INNER = 400


def small(*shape: int) -> Tensor:
    """Integers whose sums of products are exact everywhere."""
    return torch.randint(-4, 5, shape).float()


def multiply(kind: str) -> Callable[[], bool]:
    def run() -> bool:
        right = True
        for tokens, features in SHAPES:
            left, weight, own, scale = (
                small(tokens, INNER),
                small(features, INNER),
                torch.rand(tokens, 1),
                torch.rand(1, features),
            )
            expected = left @ weight.T
            if kind == "int8":
                packed = cuda.pack_weight(weight.to(torch.int8).cuda(), "int8_dot")
                output = cuda.matmul_int8(
                    left.to(torch.int8).cuda(),
                    own.cuda(),
                    packed,
                    scale.cuda(),
                    INNER,
                    None,
                    None,
                    None,
                    torch.float32,
                )
                expected = expected * own * scale
            elif kind == "fp8":
                packed = cuda.pack_weight(weight.to(E4M3).cuda(), "e4m3")
                output = cuda.matmul_fp8(
                    left.to(E4M3).cuda(),
                    own.cuda(),
                    packed,
                    scale.cuda(),
                    INNER,
                    False,
                    None,
                    torch.float32,
                )
                expected = expected * own * scale
            elif kind == "fp8-block":
                packed, groups, blocks = (
                    cuda.pack_weight(weight.to(E4M3).cuda(), "e4m3"),
                    -(-INNER // 128),
                    -(-features // 128),
                )
                powers = torch.exp2(torch.arange(groups).float())
                own, scale = (
                    powers.expand(tokens, groups).contiguous(),
                    torch.exp2(torch.arange(blocks).float()).expand(groups, blocks).contiguous(),
                )
                output = cuda.matmul_fp8(
                    left.to(E4M3).cuda(),
                    own.cuda(),
                    packed,
                    scale.cuda(),
                    128,
                    False,
                    None,
                    torch.float32,
                )
                expected = (
                    (left * powers.repeat_interleave(128)[:INNER])
                    @ weight.T
                    * scale[0].repeat_interleave(128)[:features]
                )
            else:
                packing, codes = (
                    ("int8", weight.to(torch.int8))
                    if kind == "int8-weight"
                    else ("e4m3", weight.to(E4M3))
                )
                packed = cuda.pack_weight(codes.cuda(), packing)
                output = cuda.matmul_weight_only(
                    left.bfloat16().cuda(),
                    packed,
                    packing,
                    scale.cuda(),
                    INNER,
                    False,
                    None,
                    torch.float32,
                )
                expected = expected * scale
            if not torch.equal(output.cpu(), expected):
                print(
                    f"  {kind}, {tokens} tokens, {features} features:"
                    f" {int((output.cpu() != expected).sum())} of {expected.numel()} outputs are"
                    " wrong",
                    flush=True,
                )
                right = False
        return right

    return run


def quantize_rows() -> bool:
    rows = torch.randn(37, INNER).bfloat16()
    for group in (INNER, 128, 50):
        ours, expected = (
            cuda.quantize_rows(rows.cuda(), group, "FP8_E4M3", "dynamic"),
            fallback.quantize_rows(rows, group, "FP8_E4M3", "dynamic"),
        )
        if not torch.equal(
            ours[0].cpu().view(torch.uint8), expected[0].view(torch.uint8)
        ) or not torch.equal(ours[1].cpu(), expected[1]):
            return False
    return True


def quantize_kv() -> bool:
    states, scale = torch.randn(2, 3, 9, 64).bfloat16(), torch.rand(3) + 0.01
    ours, expected = (
        cuda.quantize_kv(states.cuda(), scale.cuda(), "FP8_E4M3"),
        fallback.quantize_kv(states, scale, "FP8_E4M3"),
    )
    return torch.equal(ours.cpu().view(torch.uint8), expected.view(torch.uint8))


def dequantize() -> bool:
    codes, scale = torch.randint(-128, 128, (130, 200), dtype=torch.int8), torch.rand(2, 2)
    return torch.equal(
        cuda.dequantize_blocks(codes.cuda(), scale.cuda(), 128, 128).cpu(),
        fallback.dequantize_blocks(codes, scale, 128, 128),
    )


CASES: dict[str, Callable[[], bool]] = {
    "quantize_rows": quantize_rows,
    "quantize_kv": quantize_kv,
    "dequantize": dequantize,
    **{kind: multiply(kind) for kind in ("int8", "fp8", "fp8-block", "int8-weight", "fp8-weight")},
}


def main() -> int:
    torch.manual_seed(0)
    reason = cuda.missing_reason()
    if reason:
        print(reason)
        return 1
    wrong = 0
    for name in sys.argv[1:] or CASES:
        right = CASES[name]()
        torch.cuda.synchronize()
        print(f"{name}: {'right' if right else 'WRONG'}", flush=True)
        wrong += not right
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
