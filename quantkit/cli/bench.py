"""`quantkit bench`: the compiled kernels compared with torch's own ops, on one thread.

In each case, the kernel and torch's ops run in turns. A time is the median over the turns, in CPU
time of the thread. A ratio is the median of the ratios within a turn: other load on the machine
slows both sides of a turn.
"""

from __future__ import annotations

import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli.console import Output, command
from quantkit.cli.options import Shape
from quantkit.cli.tables import Progress, print_json, print_table
from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from torch import Tensor

BENCHMARK_KINDS = ("int8", "fp8", "weight-only", "bf16", "convert")
SHAPES = ((576, 1536), (2048, 2048), (4096, 4096))
TOKENS = (1, 16, 128, 512)
# Operations of a case: torch multiplies FP8 at 0.4 GFLOP/s, so larger cases are left out.
MOST_SCALED_MM = 3e8
# Bytes of weight copies for one token: they come from memory, as they do while a server decodes.
COLD_BYTES = 256 << 20
# What is compared in one case: the kernel, under that name, and its rivals.
Sides = dict[str, Callable[[], Any]]


@command("bench")
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice(BENCHMARK_KINDS),
    help="Kernels to measure; repeatable.  [default: all]",
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    type=Shape(),
    help="Input × output features, e.g. 4096x4096; repeatable.  [default: three of small models]",
)
@click.option(
    "--tokens",
    multiple=True,
    type=click.IntRange(1),
    help="Tokens per call; repeatable.  [default: 1, 16, 128, 512]",
)
def bench_command(
    out: Output,
    kinds: tuple[str, ...],
    shapes: tuple[tuple[int, int], ...],
    tokens: tuple[int, ...],
) -> None:
    """Compare the speed of the compiled kernels with torch's own ops, on one thread."""
    cases = (kinds or BENCHMARK_KINDS, shapes or SHAPES, tokens or TOKENS)
    total = len(cases[1]) * sum(3 if kind == "convert" else len(cases[2]) for kind in cases[0])
    with Progress("bench", out.quiet) as progress:
        figures, bandwidth = [], read_bandwidth()
        for figure in benchmark(*cases):
            figures.append(figure)
            progress("kernels", len(figures), total)
    machine = describe() | {"read_gb_per_s": bandwidth}
    if out.as_json:
        print_json({"machine": machine, "figures": [asdict(figure) for figure in figures]})
        return
    out.note(
        f"{machine['processor']}, kernels {machine['kernels']}, torch {machine['torch']}, one"
        f" thread; memory bandwidth {bandwidth:.1f} GB/s"
    )
    headings, rows = benchmark_rows(figures)
    print_table(headings, rows, right=range(1, len(headings)), verbose=out.verbose)


@dataclass(frozen=True)
class Figure:
    """One kernel on one shape.

    kind: one of `BENCHMARK_KINDS`.
    what: the kernel or conversion.
    in_features, out_features: of the weight.
    tokens: rows of the input; 0 for a conversion.
    microseconds: CPU time of a call.
    gops: 10⁹ multiplications and additions per second; None for a conversion.
    gb_per_s: 10⁹ bytes per second of weights read, or of values read and written.
    times: rival → speed of the kernel as a multiple of the rival's.
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
    """Measure each kind with each shape (in_features, out_features) and number of tokens.

    turns: how often each side runs.
    seconds: the least time that a side runs in a turn.

    Raises QuantkitError where there are no compiled kernels.
    """
    import torch

    from quantkit import ops  # noqa: F401  (declares them)
    from quantkit.ops.native import cpu_kernels

    if cpu_kernels() is None:
        raise QuantkitError("there are no compiled kernels to measure; `quantkit doctor` says why")
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
    """The GB/s at which one thread reads memory, from a sum over 512 MB."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    values = torch.ones(128 << 20)
    taken = _turns({"read": values.sum}, turns, 0.0)["read"]
    torch.set_num_threads(threads)
    return values.nbytes / statistics.median(taken) / 1e9


def processor() -> str:
    """The processor's name, from the system."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.is_file() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def describe() -> dict[str, Any]:
    """The machine and the versions that times depend on."""
    import torch

    from quantkit.ops.native import cpu_level

    return {
        "processor": processor(),
        "kernels": cpu_level(),
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
    }


def benchmark_rows(figures: Sequence[Figure]) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    """Headings and rows of `bench`."""
    rivals = list(dict.fromkeys(name for figure in figures for name in figure.times))
    rows = [
        (
            figure.what,
            f"{figure.in_features} × {figure.out_features}",
            str(figure.tokens or ""),
            f"{figure.microseconds:.1f}",
            "" if figure.gops is None else f"{figure.gops:.0f}",
            f"{figure.gb_per_s:.1f}",
            *(f"{figure.times[name]:.2f}×" if name in figure.times else "" for name in rivals),
        )
        for figure in figures
    ]
    return (
        "kernel",
        "in × out",
        "tokens",
        "µs",
        "GOP/s",
        "GB/s",
        *(f"against {name}" for name in rivals),
    ), rows


def _multiplication(
    kind: str, in_features: int, out_features: int, tokens: int, turns: int, seconds: float
) -> Figure:
    """Inputs [tokens, in_features] times weights [out_features, in_features]."""
    import torch

    weight = torch.randn(out_features, in_features).bfloat16()
    inputs = torch.randn(tokens, in_features).bfloat16()
    weights = _cold(weight, tokens)
    sides = _MULTIPLICATIONS[kind](weight, inputs)
    sides["bfloat16 linear"] = lambda: torch.nn.functional.linear(inputs, weights())
    taken = _turns(sides, turns, seconds)
    own = statistics.median(taken["kernel"])
    products = in_features * out_features
    return Figure(
        kind,
        f"matmul_{kind.replace('-', '_')}",
        in_features,
        out_features,
        tokens,
        own * 1e6,
        2 * tokens * products / own / 1e9,
        products * (2 if kind == "bf16" else 1) / own / 1e9,
        _ratios(taken),
    )


def _bf16_sides(weight: Tensor, inputs: Tensor) -> Sides:
    import torch

    ops, tokens, out_features = torch.ops.quantkit, len(inputs), len(weight)
    packed = _cold(ops.pack_weight(weight, "bf16"), tokens)
    float_inputs, float_weight = inputs.float(), _cold(weight.float(), tokens)
    return {
        "kernel": lambda: ops.matmul_bf16(inputs, packed(), out_features, None, torch.float32),
        "float32 linear": lambda: torch.nn.functional.linear(float_inputs, float_weight()),
    }


def _int8_sides(weight: Tensor, inputs: Tensor) -> Sides:
    import torch

    ops, tokens, group = torch.ops.quantkit, len(inputs), weight.shape[1]
    codes, scale = _int8_codes(weight), _scales(weight)
    packed = _cold(ops.pack_weight(codes, "int8_dot"), tokens)

    def kernel() -> Tensor:
        rows, own = ops.quantize_rows(inputs, group, "INT8", "dynamic")
        return ops.matmul_int8(rows, own, packed(), scale, group, None, None, None, torch.bfloat16)

    return {"kernel": kernel, "onednn.qlinear": _qlinear(codes, scale, inputs, tokens)}


def _fp8_sides(weight: Tensor, inputs: Tensor) -> Sides:
    import torch

    ops, tokens, group = torch.ops.quantkit, len(inputs), weight.shape[1]
    codes, scale = weight.to(torch.float8_e4m3fn), _scales(weight)
    packed = _cold(ops.pack_weight(codes, "e4m3"), tokens)

    def kernel() -> Tensor:
        rows, own = ops.quantize_rows(inputs, group, "FP8_E4M3", "dynamic")
        return ops.matmul_fp8(rows, own, packed(), scale, group, False, None, torch.bfloat16)

    sides: Sides = {"kernel": kernel}
    if 2 * tokens * weight.numel() <= MOST_SCALED_MM:
        quantized, one = inputs.to(torch.float8_e4m3fn), torch.ones(())
        with suppress(RuntimeError):  # oneDNN has it for some instruction sets only
            sides["torch._scaled_mm"] = _tried(
                lambda: torch._scaled_mm(quantized, codes.t(), one, one, out_dtype=torch.bfloat16)
            )
    return sides


def _weight_only_sides(weight: Tensor, inputs: Tensor) -> Sides:
    import torch

    ops, group, scale = torch.ops.quantkit, weight.shape[1], _scales(weight)
    packed = _cold(ops.pack_weight(_int8_codes(weight), "int8"), len(inputs))
    return {
        "kernel": lambda: ops.matmul_weight_only(
            inputs, packed(), "int8", scale, group, False, None, torch.bfloat16
        )
    }


_MULTIPLICATIONS: dict[str, Callable[[Tensor, Tensor], Sides]] = {
    "int8": _int8_sides,
    "fp8": _fp8_sides,
    "weight-only": _weight_only_sides,
    "bf16": _bf16_sides,
}


def _int8_codes(weight: Tensor) -> Tensor:
    import torch

    return torch.randint(-127, 128, weight.shape, dtype=torch.int8)


def _scales(weight: Tensor) -> Tensor:
    """One scale for each output channel, [1, out_features]."""
    import torch

    return torch.rand(1, len(weight)) / weight.shape[1]


def _tried(run: Callable[[], Any]) -> Callable[[], Any]:
    """Return `run` after running it once; raises what it raises."""
    run()
    return run


def _qlinear(codes: Tensor, scale: Tensor, inputs: Tensor, tokens: int) -> Callable[[], Any]:
    """torch's INT8 Linear as torch's own quantization runs it: activations as unsigned bytes with
    one scale, multiplied by prepacked weights, to bfloat16.
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
    """E4M3 codes [out_features, in_features] to floats and back."""
    import torch

    shape = (out_features, in_features)
    codes, one = torch.randn(shape).to(torch.float8_e4m3fn), torch.ones(1, 1)
    for what, bytes_each, kernel, rival in (
        _decoding("bfloat16", 3, codes, one),
        _decoding("float32", 5, codes, one),
        _encoding("bfloat16", 3, shape, one),
        _encoding("float32", 5, shape, one),
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
            codes.numel() * bytes_each / own / 1e9,
            _ratios(taken),
        )


def _decoding(
    dtype: str, bytes_each: int, codes: Tensor, one: Tensor
) -> tuple[str, int, Callable[[], Any], Callable[[], Any]]:
    """A conversion: its name, bytes read and written per element, the kernel, torch's own."""
    import torch

    ops, torch_dtype = torch.ops.quantkit, getattr(torch, dtype)
    return (
        f"E4M3 → {dtype}",
        bytes_each,
        lambda: ops.dequantize_blocks(codes, one, *codes.shape, torch_dtype),
        lambda: codes.to(torch_dtype),
    )


def _encoding(
    dtype: str, bytes_each: int, shape: tuple[int, int], one: Tensor
) -> tuple[str, int, Callable[[], Any], Callable[[], Any]]:
    import torch

    ops, values = torch.ops.quantkit, torch.randn(shape).to(getattr(torch, dtype))
    return (
        f"{dtype} → E4M3",
        bytes_each,
        lambda: ops.encode_blocks(values, one, *shape, "FP8_E4M3"),
        lambda: values.to(torch.float8_e4m3fn),
    )


def _cold(weight: Tensor, tokens: int) -> Callable[[], Tensor]:
    """Returns a weight. For one token it returns copies in turn, so that each comes from memory."""
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


def _turns(sides: Sides, turns: int, seconds: float) -> dict[str, list[float]]:
    """Side → thread CPU seconds of a call, in each turn."""
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
    """Rival → its time as a multiple of the kernel's: the median over turns."""
    return {
        name: statistics.median(rival / own for rival, own in zip(rivals, taken["kernel"]))
        for name, rivals in taken.items()
        if name != "kernel"
    }
