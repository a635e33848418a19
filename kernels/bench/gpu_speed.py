"""Speed of the CUDA kernels compared with torch's, on one GPU.

    python kernels/bench/gpu_speed.py FILE.jsonl [--seconds 180]

A line of FILE for each figure, written when it is measured; what time doesn't suffice for is left
out. A figure is the median of replays of a CUDA graph whose calls go around so many weights that
together they are over three times the L2 cache. Data are random.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit import ops  # noqa: F401  (declares the ops)
from quantkit.ops import cuda

E4M3 = torch.float8_e4m3fn
# (out_features, in_features) of Llama-3.1-8B
SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
# Of most interest first: what time doesn't suffice for is the rest.
TOKENS = (8192, 1, 16, 2048, 512, 128, 64)
KINDS = ("fp8", "int8", "fp8-block", "int8-weight", "fp8-weight")
REPLAYS, REPLAY_SECONDS = 7, 0.004
OPS = torch.ops.quantkit


def measure(calls: list[Callable[[], Any]]) -> dict[str, float]:
    """Microseconds of one call: median, least and most over replays of a graph in which the calls
    follow each other.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
        stream.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        calls[0]()
        end.record()
        stream.synchronize()
        rounds = max(
            1, round(REPLAY_SECONDS * 1e3 / max(start.elapsed_time(end), 1e-3) / len(calls))
        )
        rounds = min(rounds, max(1, 400 // len(calls)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(rounds):
                for call in calls:
                    call()
        graph.replay()
        stream.synchronize()
        taken = []
        for _ in range(REPLAYS):
            start.record()
            graph.replay()
            end.record()
            stream.synchronize()
            taken.append(start.elapsed_time(end) * 1e3 / (rounds * len(calls)))
    return {"microseconds": statistics.median(taken), "least": min(taken), "most": max(taken)}


def attempt(calls: Callable[[], list[Callable[[], Any]]]) -> dict[str, Any]:
    """As `measure`, or the text of what went wrong: torch doesn't take every case."""
    try:
        return measure(calls())
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        return {"error": str(error).splitlines()[0][:200]}


def copies_of(tensor: Tensor) -> list[Tensor]:
    """So many that they don't fit three times into the L2 cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return [tensor, *(tensor.clone() for _ in range(min(3 * cache // tensor.nbytes, 63)))]


def around(weights: list[Tensor], call: Callable[[Tensor], Any]) -> list[Callable[[], Any]]:
    return [lambda weight=weight: call(weight) for weight in weights]


def ceilings() -> dict[str, Any]:
    """What this device reaches at most: a copy (bytes read and written), and torch's own large
    products.
    """
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_(0, 256)
    target = torch.empty_like(source)
    copied = measure([lambda: target.copy_(source)])
    size = 8192
    left, right = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    one = torch.ones((), device="cuda")
    fast_left, fast_right = left.to(E4M3), right.to(E4M3)
    whole_left, whole_right = (
        torch.randint(-127, 128, (size, size), dtype=torch.int8, device="cuda") for _ in range(2)
    )
    found = {"copy_gb_per_s": 2 * source.nbytes / copied["microseconds"] / 1e3}
    for name, calls in (
        ("bfloat16_tflops", lambda: [lambda: left @ right.t()]),
        (
            "fp8_fast_tflops",
            lambda: [
                lambda: torch._scaled_mm(
                    fast_left,
                    fast_right.t(),
                    one,
                    one,
                    out_dtype=torch.bfloat16,
                    use_fast_accum=True,
                )
            ],
        ),
        ("int8_tflops", lambda: [lambda: torch._int_mm(whole_left, whole_right.t())]),
    ):
        figure = attempt(calls)
        found[name] = (
            2 * size**3 / figure["microseconds"] / 1e6 if "error" not in figure else figure["error"]
        )
    return found


def multiplication(kind: str, out_features: int, in_features: int, tokens: int) -> dict[str, Any]:
    inputs = torch.randn(tokens, in_features, device="cuda").bfloat16()
    weight = torch.randn(out_features, in_features, device="cuda").bfloat16()
    scale = torch.rand(1, out_features, device="cuda") / in_features
    bfloat16 = torch.bfloat16
    rivals: dict[str, Callable[[], list[Callable[[], Any]]]] = {}
    weight_bytes = out_features * in_features
    if kind in ("fp8", "fp8-block"):
        codes = copies_of(weight.to(E4M3))
        packed = [code.view(torch.uint8) for code in codes]
        if kind == "fp8":
            rows, own = OPS.quantize_rows(inputs, in_features, "FP8_E4M3", "dynamic")
            ours = around(
                packed,
                lambda w: OPS.matmul_fp8(rows, own, w, scale, in_features, False, None, bfloat16),
            )
            rivals["torch._scaled_mm rowwise"] = lambda: around(
                codes,
                lambda w: torch._scaled_mm(
                    rows,
                    w.t(),
                    scale_a=own,
                    scale_b=scale,
                    out_dtype=bfloat16,
                    use_fast_accum=False,
                ),
            )
            rivals["torch._scaled_mm rowwise, fast sums"] = lambda: around(
                codes,
                lambda w: torch._scaled_mm(
                    rows, w.t(), scale_a=own, scale_b=scale, out_dtype=bfloat16, use_fast_accum=True
                ),
            )
        else:
            rows, own = OPS.quantize_rows(inputs, 128, "FP8_E4M3", "dynamic")
            blocks = (
                torch.rand(in_features // 128, out_features // 128, device="cuda") / in_features
            )
            ours = around(
                packed, lambda w: OPS.matmul_fp8(rows, own, w, blocks, 128, False, None, bfloat16)
            )
            # torch wants the scales of 1 x 128 groups with neighbouring tokens side by side, those
            # of blocks with neighbours along in_features.
            turned, turned_blocks = own.t().contiguous().t(), blocks.t().contiguous().t()
            rivals["torch._scaled_mm block-wise"] = lambda: around(
                codes,
                lambda w: torch._scaled_mm(
                    rows, w.t(), scale_a=turned, scale_b=turned_blocks, out_dtype=bfloat16
                ),
            )
    elif kind == "int8":
        codes = copies_of(torch.randint(-127, 128, weight.shape, dtype=torch.int8, device="cuda"))
        rows, own = OPS.quantize_rows(inputs, in_features, "INT8", "dynamic")
        ours = around(
            [code.view(torch.uint8) for code in codes],
            lambda w: OPS.matmul_int8(rows, own, w, scale, in_features, None, None, None, bfloat16),
        )
        rivals["torch._int_mm and dequantize"] = lambda: around(
            codes, lambda w: (torch._int_mm(rows, w.t()).float() * own * scale).to(bfloat16)
        )
    else:
        packing = kind.removesuffix("-weight").replace("fp8", "e4m3")
        codes = copies_of(
            weight.to(E4M3).view(torch.uint8)
            if packing == "e4m3"
            else torch.randint(0, 256, weight.shape, dtype=torch.uint8, device="cuda")
        )
        ours = around(
            codes,
            lambda w: OPS.matmul_weight_only(
                inputs, w, packing, scale, in_features, False, None, bfloat16
            ),
        )
    weights = copies_of(weight)
    rivals["bfloat16 linear"] = lambda: around(
        weights, lambda w: torch.nn.functional.linear(inputs, w)
    )
    figure = measure(ours)
    seconds = figure["microseconds"] / 1e6
    moved = (
        weight_bytes
        + tokens * in_features * (2 if kind.endswith("-weight") else 1)
        + 2 * tokens * out_features
    )
    return {
        "what": kind,
        "out_features": out_features,
        "in_features": in_features,
        "tokens": tokens,
        **figure,
        "tflops": 2 * tokens * weight_bytes / seconds / 1e12,
        "gb_per_s": moved / seconds / 1e9,
        "rivals": {name: attempt(calls) for name, calls in rivals.items()},
    }


def conversions() -> Iterator[dict[str, Any]]:
    """Quantization per token, per group and of keys, compared with a copy of as many bytes."""
    for tokens, features in ((8192, 4096), (8192, 14336), (2048, 4096)):
        inputs = copies_of(torch.randn(tokens, features, device="cuda").bfloat16())
        moved = tokens * features * 3
        room = copies_of(torch.empty(moved // 2, dtype=torch.uint8, device="cuda"))
        copy = attempt(lambda room=room: around(room, lambda part: part.clone()))
        for name, call in (
            (
                "quantize_rows FP8 per token",
                lambda x, f=features: OPS.quantize_rows(x, f, "FP8_E4M3", "dynamic"),
            ),
            (
                "quantize_rows INT8 per token",
                lambda x, f=features: OPS.quantize_rows(x, f, "INT8", "dynamic"),
            ),
            (
                "quantize_rows FP8 per group",
                lambda x: OPS.quantize_rows(x, 128, "FP8_E4M3", "dynamic"),
            ),
        ):
            yield _conversion(name, tokens, features, measure(around(inputs, call)), moved, copy)
    states, scale = (
        torch.randn(4, 8, 8192, 128, device="cuda").bfloat16(),
        torch.full((8,), 0.02, device="cuda"),
    )
    moved = states.numel() * 3
    room = copies_of(torch.empty(moved // 2, dtype=torch.uint8, device="cuda"))
    figure = measure(around(copies_of(states), lambda x: OPS.quantize_kv(x, scale, "FP8_E4M3")))
    yield _conversion(
        "quantize_kv FP8 per head",
        states.shape[0] * states.shape[2],
        8 * 128,
        figure,
        moved,
        attempt(lambda: around(room, lambda part: part.clone())),
    )


def _conversion(
    what: str,
    tokens: int,
    features: int,
    figure: dict[str, float],
    moved: int,
    copy: dict[str, Any],
) -> dict[str, Any]:
    seconds = figure["microseconds"] / 1e6
    return {
        "what": what,
        "tokens": tokens,
        "in_features": features,
        **figure,
        "gb_per_s": moved / seconds / 1e9,
        "rivals": {"copy of as many bytes": copy},
    }


def figures() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    yield lambda: [{"what": "ceilings", **ceilings()}]
    yield lambda: list(conversions())
    for tokens in TOKENS:
        for kind in KINDS:
            for shape in SHAPES:
                yield lambda kind=kind, shape=shape, tokens=tokens: [
                    multiplication(kind, *shape, tokens)
                ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=180)
    arguments = parser.parse_args()
    reason = cuda.missing_reason()
    if reason:
        raise SystemExit(reason)
    began = time.monotonic()
    torch.manual_seed(0)
    with arguments.output.open("w") as output, torch.inference_mode():
        for number, figure in enumerate(figures()):
            if time.monotonic() - began > arguments.seconds:
                print(f"{number} cases were measured before the time was over", flush=True)
                break
            for line in figure():
                output.write(json.dumps(line) + "\n")
                output.flush()


if __name__ == "__main__":
    main()
