"""The runtimes and the hardware that serve quantized checkpoints.

Source: the code of vLLM 0.32, SGLang 0.5.23, TensorRT-LLM and transformers 5.23.
"""

from __future__ import annotations

from dataclasses import dataclass

RUNTIMES = ("vllm", "sglang", "tensorrt-llm", "transformers")
HARDWARE = ("blackwell", "hopper", "ada", "ampere", "turing", "cpu")

# How `eval` runs Linears: kernels where there are any, kernels alone, or the reference arithmetic.
EXECUTIONS = ("auto", "kernel", "reference")

# How vLLM runs a scheme on some hardware, if it can.
NATIVE = "native"  # with the scheme's arithmetic
WEIGHTS = "weights"  # W8A16: with quantized weights, and inputs in bfloat16


@dataclass(frozen=True)
class Support:
    """Whether a runtime supports a scheme or a checkpoint format.

    loads: whether the runtime loads it and runs it correctly.
    note: a condition, or the reason why not; it follows the runtime's name in a sentence.
    """

    loads: bool
    note: str = ""


YES = Support(True)
MULTIPLES_OF_128 = Support(True, "128-multiples")
