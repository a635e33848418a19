"""`quantkit doctor`: whether packages, kernels and devices are there and work."""

from __future__ import annotations

import os
import platform
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quantkit import __version__
from quantkit.cli.console import Output, command
from quantkit.cli.tables import print_json, print_table
from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from quantkit.schemes.scheme import QuantScheme

# Package → the oldest version that quantkit works with; () for any.
REQUIRED: dict[str, tuple[int, ...]] = {
    "torch": (2, 10),
    "transformers": (5,),
    "safetensors": (),
    "click": (),
    "numpy": (),
    "PyYAML": (),
    "rich": (),
    "jinja2": (),
    "blake3": (),
}
# Package → the extra of quantkit that installs it. It may be missing.
OPTIONAL = {
    "gguf": "demo",
    "accelerate": "demo",
    "matplotlib": "report",
    "pyarrow": "hub",
    "datasets": "hub",
}
_USE_REFERENCE = "set QUANTKIT_KERNELS=reference"


@command("doctor")
def doctor_command(out: Output) -> None:
    """Check versions, kernels and devices; exit code 1 if something is broken."""
    examination = examine()
    if out.as_json:
        print_json(examination)
    else:
        print_table(
            ("check", "found", "status"),
            [(check["name"], check["found"], check["status"]) for check in examination["checks"]],
            verbose=out.verbose,
        )
    if not examination["ok"]:
        broken = [check for check in examination["checks"] if check["status"] == "broken"]
        raise QuantkitError(f"{broken[0]['name']} is broken: {broken[0]['found']}")


def examine() -> dict[str, Any]:
    """All checks, each with its name, what was found, and a status: "ok", "note" or "broken"."""
    checks = [_check("quantkit", __version__), _check("Python", platform.python_version())]
    for package, least in REQUIRED.items():
        checks.append(_package(package, least))
    for package, extra in OPTIONAL.items():
        found = _version(package)
        checks.append(
            _check(package, found)
            if found
            else _check(package, f"not installed (pip install 'quantkit[{extra}]')", "note")
        )
    if _version("torch"):
        checks += [_check_arithmetic(), _check_kernels(), _check_cuda_kernels(), *_devices()]
    return {"ok": all(check["status"] != "broken" for check in checks), "checks": checks}


def _check(name: str, found: str, status: str = "ok") -> dict[str, str]:
    return {"name": name, "found": found, "status": status}


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version  # a third of --help's time

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _package(package: str, least: tuple[int, ...]) -> dict[str, str]:
    found = _version(package)
    if found is None:
        return _check(package, "not installed; run pip install quantkit", "broken")
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
    if numbers < least:
        return _check(package, f"{found}; needs {'.'.join(map(str, least))} or newer", "broken")
    return _check(package, found)


def _check_arithmetic() -> dict[str, str]:
    """Whether this torch rounds a few values to the correct codes."""
    import torch

    from quantkit.ops.reference import encode_codes
    from quantkit.schemes.number_formats import FP8_E4M3, INT8

    # 17 is halfway between the E4M3 neighbours 16 and 18; the tie goes to 16, whose last mantissa
    # bit is even.
    fp8 = (
        encode_codes(torch.tensor([448.0, 1000.0, -1000.0, 17.0, 0.001]), FP8_E4M3).float().tolist()
    )
    int8 = encode_codes(torch.tensor([0.5, 1.5, 200.0, -200.0]), INT8).tolist()
    if fp8 == [448.0, 448.0, -448.0, 16.0, 0.001953125] and int8 == [0, 2, 127, -128]:
        return _check("FP8 and INT8 rounding", "correct")
    return _check(
        "FP8 and INT8 rounding",
        f"wrong with this torch: {fp8} {int8}; install another version",
        "broken",
    )


def _check_kernels() -> dict[str, str]:
    """Which CPU kernels run, and whether their results are those of the reference."""
    from quantkit.ops import native

    level = native.cpu_level()
    if level == "reference":
        why = _why_no_kernels("a C++ compiler")
        return _check(
            "CPU kernels", f"none ({why}); quantkit uses the slower reference arithmetic", "note"
        )
    fault = _quantization_fault()
    if fault is not None:
        return _check(
            "CPU kernels",
            f"{level}: codes for {fault} differ from the reference's; {_USE_REFERENCE}",
            "broken",
        )
    fault = _multiplication_fault()
    if fault is not None:
        return _check(
            "CPU kernels",
            f"{level}: products for {fault} differ from the reference's; {_USE_REFERENCE}",
            "broken",
        )
    return _check(
        "CPU kernels",
        f"{level}: quantize, dequantize, multiply INT8, FP8, bfloat16; equal to the reference",
    )


def _why_no_kernels(needs: str) -> str:
    if os.environ.get("QUANTKIT_KERNELS") == "reference":
        return "switched off by QUANTKIT_KERNELS"
    return f"not built: install quantkit again with {needs} available"


def _check_cuda_kernels() -> dict[str, str]:
    """Which CUDA kernels were built, which of them run on this machine's GPU, and whether their
    outputs agree with the reference.
    """
    import torch

    from quantkit.ops import cuda, native

    architectures = native.cuda_architectures()
    if not architectures:
        why = _why_no_kernels("nvcc, or together with its extra cuda-build")
        return _check(
            "CUDA kernels", f"none ({why}); on a GPU, quantkit uses torch's slower ops", "note"
        )
    built = f"built for {', '.join(f'sm_{name}' for name in architectures)}"
    if not torch.cuda.is_available():
        return _check("CUDA kernels", f"{built}; this machine has no CUDA device")
    missing = cuda.missing_reason()
    if missing:
        return _check(
            "CUDA kernels", f"{built}; {missing}; quantkit uses torch's slower ops", "note"
        )
    try:
        fault = _multiplication_fault("cuda")
    except RuntimeError as error:
        return _check(
            "CUDA kernels", f"{built}; {str(error).splitlines()[0]}; {_USE_REFERENCE}", "broken"
        )
    if fault is not None:
        return _check(
            "CUDA kernels",
            f"{built}; products for {fault} differ from the reference's; {_USE_REFERENCE}",
            "broken",
        )
    return _check(
        "CUDA kernels",
        f"{built}; in use: {cuda.what_runs(torch.cuda.get_device_capability())}; results agree with"
        " the reference",
    )


def _quantization_fault() -> str | None:
    """The first scheme whose weights the kernels and the reference quantize differently, if any."""
    import torch

    from quantkit import ops
    from quantkit.ops import reference
    from quantkit.schemes.scheme import SCHEMES

    values = torch.linspace(-3, 3, 257 * 33).reshape(257, 33).bfloat16()
    for scheme in SCHEMES.values():
        ours = ops.quantize(values, scheme.weight)
        expected = reference.quantize(values, scheme.weight)
        same_codes = torch.equal(ours.qdata.view(torch.uint8), expected.qdata.view(torch.uint8))
        if not same_codes or not torch.equal(ours.scale, expected.scale):
            return scheme.name
    return None


def _multiplication_fault(device: str = "cpu") -> str | None:
    """The first scheme whose products on this device differ from the reference's, if any."""
    import torch

    from quantkit import ops
    from quantkit.ops.linear import QuantizedLinear
    from quantkit.schemes.scheme import SCHEMES

    values = torch.linspace(-3, 3, 48 * 256).sin().reshape(48, 256).bfloat16()
    inputs = torch.linspace(-2, 2, 33 * 256).cos().reshape(33, 256).bfloat16()
    for scheme in SCHEMES.values():
        weight = ops.quantize(values, scheme.weight)
        scale = torch.tensor([0.0156]) if scheme.needs_calibration else None
        moved = replace(weight, qdata=weight.qdata.to(device), scale=weight.scale.to(device))
        moved_scale = None if scale is None else scale.to(device)
        kernel = QuantizedLinear(moved, scheme, moved_scale, None, torch.bfloat16)
        reference = QuantizedLinear(weight, scheme, scale, None, torch.bfloat16, False)
        ours, expected = kernel(inputs.to(device)).float().cpu(), reference(inputs).float()
        relative, absolute = _tolerances(scheme, device)
        if not torch.allclose(ours, expected, rtol=relative, atol=absolute):
            return scheme.name
    return None


def _tolerances(scheme: QuantScheme, device: str) -> tuple[float, float]:
    """Relative and absolute. INT8 sums are exact. Others differ by float32's rounding of 256
    products (on Hopper, FP8 sums have fewer bits), and then by one step of bfloat16 at most.
    """
    from quantkit.schemes.number_formats import INT8

    if scheme.weight.format == INT8 and scheme.input is not None:
        return 0.0, 0.0
    return 2.0**-7, 1e-4 if device == "cpu" else 0.05


def _devices() -> list[dict[str, str]]:
    import torch

    threads = torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    checks = [
        _check(
            "CPU", f"{platform.machine()}, {capability}, {threads} of {os.cpu_count()} cores used"
        )
    ]
    if not torch.cuda.is_available():
        return [
            *checks,
            _check("CUDA device", "none found; calibrate and eval run on the CPU", "note"),
        ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        checks.append(
            _check(
                f"CUDA device {index}",
                f"{properties.name}, sm_{properties.major}{properties.minor},"
                f" {properties.total_memory / 1e9:.0f} GB",
            )
        )
    return checks
