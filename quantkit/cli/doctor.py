"""`doctor`: what is installed, what will run, and what is broken."""

from __future__ import annotations

import os
import platform
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from quantkit import __version__

# The least version that quantkit works with; optional ones give features and are no fault when
# missing.
REQUIRED = {
    "torch": (2, 10),
    "transformers": (5,),
    "safetensors": (),
    "click": (),
    "numpy": (),
    "PyYAML": (),
    "rich": (),
    "blake3": (),
}
OPTIONAL = {
    "gguf": "demo",
    "accelerate": "demo",
    "matplotlib": "report",
    "pyarrow": "hub",
    "datasets": "hub",
}


def examine() -> dict[str, Any]:
    """Every check: name, what was found, status "ok", "note" or "broken"."""
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
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _package(package: str, least: tuple[int, ...]) -> dict[str, str]:
    found = _version(package)
    if found is None:
        return _check(package, "not installed; pip install quantkit brings it", "broken")
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
    if numbers < least:
        return _check(package, f"{found}; needs {'.'.join(map(str, least))} or newer", "broken")
    return _check(package, found)


def _check_arithmetic() -> dict[str, str]:
    """A few codes whose values are known, through this torch's casts."""
    import torch

    from quantkit.ops.reference import encode_codes
    from quantkit.schemes.number_formats import FP8_E4M3, INT8

    # 17 lies halfway between the E4M3 neighbours 16 and 18; the tie goes to 16, whose last mantissa
    # bit is even.
    fp8 = (
        encode_codes(torch.tensor([448.0, 1000.0, -1000.0, 17.0, 0.001]), FP8_E4M3).float().tolist()
    )
    int8 = encode_codes(torch.tensor([0.5, 1.5, 200.0, -200.0]), INT8).tolist()
    if fp8 == [448.0, 448.0, -448.0, 16.0, 0.001953125] and int8 == [0, 2, 127, -128]:
        return _check("FP8 and INT8 rounding", "right")
    return _check(
        "FP8 and INT8 rounding",
        f"wrong with this torch: {fp8} {int8}; install another version",
        "broken",
    )


def _check_kernels() -> dict[str, str]:
    """Which CPU kernels run, and whether they give the reference's codes here."""
    import torch

    from quantkit import ops
    from quantkit.ops import native, reference
    from quantkit.schemes.scheme import SCHEMES

    level = native.cpu_level()
    if level == "reference":
        asked = os.environ.get("QUANTKIT_KERNELS") == "reference"
        why = (
            "switched off by QUANTKIT_KERNELS"
            if asked
            else "not built: install quantkit again where there is a C++ compiler"
        )
        return _check("CPU kernels", f"none ({why}); the reference arithmetic runs, slower", "note")
    values = torch.linspace(-3, 3, 257 * 33).reshape(257, 33).bfloat16()
    for scheme in SCHEMES.values():
        ours, expected = (
            ops.quantize(values, scheme.weight),
            reference.quantize(values, scheme.weight),
        )
        if not torch.equal(
            ours.qdata.view(torch.uint8), expected.qdata.view(torch.uint8)
        ) or not torch.equal(ours.scale, expected.scale):
            return _check(
                "CPU kernels",
                f"{level} gives other codes than the reference for {scheme.name}; set"
                " QUANTKIT_KERNELS=reference",
                "broken",
            )
    fault = _multiplication_fault()
    if fault:
        return _check(
            "CPU kernels",
            f"{level} multiplies {fault} otherwise than the reference; set"
            " QUANTKIT_KERNELS=reference",
            "broken",
        )
    return _check(
        "CPU kernels",
        f"{level}: quantize, dequantize, multiply INT8, FP8, bfloat16; equal to the reference",
    )


def _check_cuda_kernels() -> dict[str, str]:
    """Which CUDA kernels there are, what this machine's device runs of them, and whether they give
    the reference's outputs.
    """
    import torch

    from quantkit.ops import cuda, native

    architectures = native.cuda_architectures()
    if not architectures:
        asked = os.environ.get("QUANTKIT_KERNELS") == "reference"
        why = (
            "switched off by QUANTKIT_KERNELS"
            if asked
            else (
                "not built: install quantkit again where there is nvcc, or beside its extra"
                " cuda-build"
            )
        )
        return _check("CUDA kernels", f"none ({why}); on a GPU torch's own ops run, slower", "note")
    built = f"built for {', '.join(f'sm_{name}' for name in architectures)}"
    if not torch.cuda.is_available():
        return _check("CUDA kernels", f"{built}; no CUDA device here to run them")
    missing = cuda.missing_reason()
    if missing:
        return _check("CUDA kernels", f"{built}; {missing}; torch's own ops run, slower", "note")
    try:
        fault = _multiplication_fault("cuda")
    except RuntimeError as error:
        return _check(
            "CUDA kernels",
            f"{built}; {str(error).splitlines()[0]}; set QUANTKIT_KERNELS=reference",
            "broken",
        )
    if fault:
        return _check(
            "CUDA kernels",
            f"{built}; {fault} is multiplied otherwise than by the reference; set"
            " QUANTKIT_KERNELS=reference",
            "broken",
        )
    return _check(
        "CUDA kernels",
        f"{built}; here {cuda.what_runs(torch.cuda.get_device_capability())}; agree with the"
        " reference",
    )


def _multiplication_fault(device: str = "cpu") -> str | None:
    """The scheme that a kernel multiplies wrong here, if one does."""
    import torch

    from quantkit import ops
    from quantkit.ops.linear import QuantizedLinear
    from quantkit.schemes.number_formats import INT8
    from quantkit.schemes.scheme import SCHEMES

    values, inputs = (
        torch.linspace(-3, 3, 48 * 256).sin().reshape(48, 256).bfloat16(),
        torch.linspace(-2, 2, 33 * 256).cos().reshape(33, 256).bfloat16(),
    )
    for scheme in SCHEMES.values():
        weight, scale = (
            ops.quantize(values, scheme.weight),
            torch.tensor([0.0156]) if scheme.needs_calibration else None,
        )
        moved, moved_scale = (
            replace(weight, qdata=weight.qdata.to(device), scale=weight.scale.to(device)),
            None if scale is None else scale.to(device),
        )
        ours = (
            QuantizedLinear(moved, scheme, moved_scale, None, torch.bfloat16)(inputs.to(device))
            .float()
            .cpu()
        )
        expected = QuantizedLinear(weight, scheme, scale, None, torch.bfloat16, False)(
            inputs
        ).float()
        exact = scheme.weight.format is INT8 and scheme.input is not None
        # INT8 sums are exact; others differ by float32's rounding of 256 products (on Hopper FP8
        # sums have fewer bits), and then by one step of bfloat16 at most.
        if not torch.allclose(
            ours,
            expected,
            **(
                {"rtol": 0, "atol": 0}
                if exact
                else {"rtol": 2.0**-7, "atol": 1e-4 if device == "cpu" else 0.05}
            ),
        ):
            return scheme.name
    return None


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
