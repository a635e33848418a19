"""What a result depends on in addition to its inputs: the device and the software versions."""

from __future__ import annotations

from quantkit import __version__


def device_name(device: str) -> str:
    """The CPU's instruction set as torch uses it ("AVX2"), or the GPU's name.

    device: "cpu", "cuda" or "cuda:N".
    """
    import torch

    if device.split(":")[0] == "cpu":
        return torch.backends.cpu.get_cpu_capability()
    return torch.cuda.get_device_name(device)


def device_identity(device: str) -> str:
    """The device's type and name for a run's fingerprint, such as "cpu AVX2"."""
    return f"{device.split(':')[0]} {device_name(device)}"


def software_versions() -> dict[str, str]:
    """The versions of all software that decides a run's bytes, for its fingerprint."""
    import torch
    import transformers

    return {
        "quantkit version": __version__,
        "torch version": torch.__version__,
        "transformers version": transformers.__version__,
    }
