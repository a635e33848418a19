"""Where quantized checkpoints are served: the runtimes, the hardware, and how tables describe them.

Read from the sources of vLLM 0.32, SGLang 0.5.23, TensorRT-LLM and transformers 5.23.
"""

from __future__ import annotations

from dataclasses import dataclass

RUNTIMES = ("vllm", "sglang", "tensorrt-llm", "transformers")
HARDWARE = ("blackwell", "hopper", "ada", "ampere", "turing", "cpu")

# What vLLM does on a kind of hardware, where it serves the scheme at all.
NATIVE = "native"  # computes what the scheme says
WEIGHTS = "weights"  # stores the codes and leaves inputs in bfloat16


@dataclass(frozen=True)
class Support:
    """Whether a runtime loads a scheme or a file format.

    loads: the runtime loads it and computes what it says.
    note: the condition, or why not; it follows the runtime's name in a sentence.
    """

    loads: bool
    note: str = ""


YES = Support(True)
MULTIPLES_OF_128 = Support(True, "128-multiples")
