"""`bench`: the compiled kernels beside torch's own ops, on one thread.

Of each case kernel and rivals run in turns; a figure is the median of the turns' thread CPU times,
a ratio the median of the ratios within a turn, so that what else the machine does falls on both.
"""

from __future__ import annotations

import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.cli.options import BENCHMARK_KINDS
from quantkit.errors import QuantkitError
from quantkit.ops.native import cpu_kernels, cpu_level

if TYPE_CHECKING:
    from torch import Tensor

SHAPES = ((576, 1536), (2048, 2048), (4096, 4096))
TOKENS = (1, 16, 128, 512)
# torch multiplies FP8 with a loop of 0.4 GFLOP/s: no more than this is asked of it.
MOST_SCALED_MM = 3e8
# weights of one token's case, together: they come from memory, as they do while a server decodes
COLD_BYTES = 256 << 20


@dataclass(frozen=True)
class Figure:
    """One kernel on one shape. gops: 10⁹ multiplications and additions per second of CPU time;
    gb_per_s: weight bytes read, or bytes converted.

    times: rival → how many times as fast as it the kernel is.
    """

    kind: str
    what: str
    in_features: int
    out_features: int
    tokens: int
    microseconds: float
    gops: float | None
    gb_per_s: float
    times: dict[str, float]


def benchmark(
    kinds: Sequence[str] = BENCHMARK_KINDS,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    turns: int = 5,
    seconds: float = 0.03,
) -> Iterator[Figure]:
    """Figures of each kind, shape (in_features, out_features) and number of tokens. seconds: how
    long each side of a turn runs at least.
    """
    import torch

    from quantkit import ops  # noqa: F401  (declares them)

    if cpu_kernels() is None:
        raise QuantkitError(
            "there are no compiled kernels here to measure; `quantkit doctor` says why"
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch is about to move its quantized tensors
            for shape in shapes:
                for kind in kinds:
                    if kind == "convert":
                        yield from _conversions(*shape, turns, seconds)
                        continue
                    for count in tokens:
                        yield _multiplication(kind, *shape, count, turns, seconds)
    finally:
        torch.set_num_threads(threads)


def read_bandwidth(turns: int = 5) -> float:
    """GB/s at which one thread reads memory: a sum over 512 MB."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    values = torch.ones(128 << 20)
    taken = _turns({"read": values.sum}, turns, 0.0)["read"]
    torch.set_num_threads(threads)
    return values.nbytes / statistics.median(taken) / 1e9


def processor() -> str:
    """The processor's name, as the system has it."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.is_file() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def describe() -> dict[str, Any]:
    """The machine and versions that figures depend on."""
    import torch

    return {
        "processor": processor(),
        "kernels": cpu_level(),
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _multiplication(
    kind: str, in_features: int, out_features: int, tokens: int, turns: int, seconds: float
) -> Figure:
    import torch

    ops = torch.ops.quantkit
    weight = torch.randn(out_features, in_features).bfloat16()
    inputs = torch.randn(tokens, in_features).bfloat16()
    scale = torch.rand(1, out_features) / in_features
    group, end = in_features, (None, torch.bfloat16)
    sides: dict[str, Callable[[], Any]] = {}
    if kind == "bf16":
        rotated = _cold(ops.pack_weight(weight, "bf16"), tokens)
        sides["kernel"] = lambda: ops.matmul_bf16(
            inputs, rotated(), out_features, None, torch.float32
        )
        float_inputs, float_weight = inputs.float(), _cold(weight.float(), tokens)
        sides["float32 linear"] = lambda: torch.nn.functional.linear(float_inputs, float_weight())
    elif kind == "int8":
        codes = torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8)
        rotated = _cold(ops.pack_weight(codes, "int8_dot"), tokens)

        def int8() -> Tensor:
            quantized, own = ops.quantize_rows(inputs, in_features, "INT8", "dynamic")
            return ops.matmul_int8(quantized, own, rotated(), scale, group, None, None, *end)

        sides["kernel"] = int8
        sides["onednn.qlinear"] = _qlinear(codes, scale, inputs, tokens)
    elif kind == "fp8":
        codes = weight.to(torch.float8_e4m3fn)
        rotated = _cold(ops.pack_weight(codes, "e4m3"), tokens)

        def fp8() -> Tensor:
            quantized, own = ops.quantize_rows(inputs, in_features, "FP8_E4M3", "dynamic")
            return ops.matmul_fp8(quantized, own, rotated(), scale, group, False, *end)

        sides["kernel"] = fp8
        if 2 * tokens * in_features * out_features <= MOST_SCALED_MM:
            quantized, one = inputs.to(torch.float8_e4m3fn), torch.ones(())
            with suppress(RuntimeError):  # oneDNN has it for some instruction sets only
                sides["torch._scaled_mm"] = _tried(
                    lambda: torch._scaled_mm(
                        quantized, codes.t(), one, one, out_dtype=torch.bfloat16
                    )
                )
    else:
        codes = torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8)
        rotated = _cold(ops.pack_weight(codes, "int8"), tokens)
        sides["kernel"] = lambda: ops.matmul_weight_only(
            inputs, rotated(), "int8", scale, group, False, *end
        )
    weights = _cold(weight, tokens)
    sides["bfloat16 linear"] = lambda: torch.nn.functional.linear(inputs, weights())
    taken = _turns(sides, turns, seconds)
    own = statistics.median(taken["kernel"])
    operations, read = (
        2 * tokens * in_features * out_features,
        in_features * out_features * (2 if kind == "bf16" else 1),
    )
    return Figure(
        kind,
        f"matmul_{kind.replace('-', '_')}",
        in_features,
        out_features,
        tokens,
        own * 1e6,
        operations / own / 1e9,
        read / own / 1e9,
        _ratios(taken),
    )


def _tried(run: Callable[[], Any]) -> Callable[[], Any]:
    run()
    return run


def _qlinear(codes: Tensor, scale: Tensor, inputs: Tensor, tokens: int) -> Callable[[], Any]:
    """torch's INT8 Linear as its own quantization runs it: activations to unsigned bytes with one
    scale, then the prepacked product to bfloat16.
    """
    import torch

    packed = _cold(torch.ops.onednn.qlinear_prepack(codes, None), tokens)
    scales, zeros = scale[0].contiguous(), torch.zeros(codes.shape[0], dtype=torch.int32)

    def run() -> Tensor:
        quantized = torch.quantize_per_tensor(inputs.float(), 0.02, 128, torch.quint8).int_repr()
        return torch.ops.onednn.qlinear_pointwise(
            quantized,
            0.02,
            128,
            packed(),
            scales,
            zeros,
            None,
            1.0,
            0,
            torch.bfloat16,
            "none",
            [],
            "",
        )

    return run


def _conversions(
    in_features: int, out_features: int, turns: int, seconds: float
) -> Iterator[Figure]:
    import torch

    ops, shape = torch.ops.quantkit, (out_features, in_features)
    codes, one = torch.randn(shape).to(torch.float8_e4m3fn), torch.ones(1, 1)
    for what, kernel, rival, read in (
        (
            "E4M3 → bfloat16",
            lambda: ops.dequantize_blocks(codes, one, *shape, torch.bfloat16),
            lambda: codes.to(torch.bfloat16),
            3,
        ),
        (
            "E4M3 → float32",
            lambda: ops.dequantize_blocks(codes, one, *shape),
            lambda: codes.to(torch.float32),
            5,
        ),
        *(
            (
                f"{str(dtype).removeprefix('torch.')} → E4M3",
                *_encoding(torch.randn(shape).to(dtype), one),
                size,
            )
            for dtype, size in ((torch.bfloat16, 3), (torch.float32, 5))
        ),
    ):
        taken = _turns({"kernel": kernel, "torch's .to": rival}, turns, seconds)
        own = statistics.median(taken["kernel"])
        yield Figure(
            "convert",
            what,
            in_features,
            out_features,
            0,
            own * 1e6,
            None,
            codes.numel() * read / own / 1e9,
            _ratios(taken),
        )


def _encoding(values: Tensor, one: Tensor) -> tuple[Callable[[], Any], Callable[[], Any]]:
    import torch

    return lambda: torch.ops.quantkit.encode_blocks(
        values, one, *values.shape, "FP8_E4M3"
    ), lambda: values.to(torch.float8_e4m3fn)


def _cold(weight: Tensor, tokens: int) -> Callable[[], Tensor]:
    """A weight; for one token one of so many copies, in turn, that it comes from memory."""
    if tokens > 1:
        return lambda: weight
    copies = [
        weight,
        *(weight.clone() for _ in range(min(COLD_BYTES // max(weight.nbytes, 1), 400))),
    ]
    at = [0]

    def following() -> Tensor:
        at[0] = (at[0] + 1) % len(copies)
        return copies[at[0]]

    return following


def _turns(
    sides: dict[str, Callable[[], Any]], turns: int, seconds: float
) -> dict[str, list[float]]:
    """Thread CPU seconds of one call, of each side in each turn."""
    for run in sides.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(turns):
        for name, run in sides.items():
            count, started = 0, time.thread_time()
            while True:
                run()
                count += 1
                passed = time.thread_time() - started
                if passed >= seconds:
                    break
            taken[name].append(passed / count)
    return taken


def _ratios(taken: dict[str, list[float]]) -> dict[str, float]:
    return {
        name: statistics.median(rival / own for rival, own in zip(rivals, taken["kernel"]))
        for name, rivals in taken.items()
        if name != "kernel"
    }
