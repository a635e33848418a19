"""The architectures that are tested, in which schemes, and what vLLM and transformers are known to
serve of them.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from tiny_models import ARCHITECTURES, MASKED, MULTIMODAL, TARGET

SERVED = Path(__file__).parent.parent.parent / "benchmarks" / "results" / "architectures.json"
PACKED_MODULES = json.loads((Path(__file__).parent / "packed_modules.json").read_text())[
    "architectures"
]
# What all are exported in, and what a few are beside it: where a scheme's shape or its scales could
# go wrong in another way.
SCHEMES = ("fp8-dynamic", "int8-dynamic")
MORE_SCHEMES = {
    "llama": ("int8-static", "fp8-block", "int8-weight-only", "mxfp8"),
    "gpt2": ("int8-static", "fp8-block", "int8-weight-only"),
    "qwen3_moe": ("fp8-tensor", "fp8-block"),
    "granitemoe": ("fp8-static", "int8-weight-only"),
    "deepseek_v3": ("fp8-tensor",),
    "llama4_text": ("fp8-static", "int8-static", "fp8-tensor"),
    "qwen3_next": ("int8-static",),
    "gemma3": ("fp8-static",),
}
# GPT-OSS keeps experts with biases that no runtime reads in 8 bits; the rest of it is quantized.
OPTIONS = {"gpt_oss": {"allow_unreached": True}}
# Where transformers' own loader computes something else than the file says, and what.
_EXPERTS = "keeps experts in the model's dtype"
TRANSFORMERS = {
    "gpt2": "refused: it reads the codes of Conv1D as weights",
    "opt": "doesn't quantize inputs of two dimensions",
    "llama4_text": "doesn't quantize inputs of two dimensions, experts' among them",
    "granitemoe": "gives experts random weights, as it looks for them stacked",
    **dict.fromkeys(
        (
            "qwen3_moe",
            "mixtral",
            "gpt_oss",
            "deepseek_v2",
            "deepseek_v3",
            "qwen3_next",
            "qwen3_5_moe_text",
            "minimax",
            "olmoe",
            "deepseek_v32",
            "hunyuan_v1_moe",
        ),
        _EXPERTS,
    ),
}


KINDS = (*ARCHITECTURES, *MULTIMODAL, *MASKED, *TARGET)
# Those that stand for the others in `make check`: a decoder, transposed weights, stacked experts,
# an encoder, both.
QUICK = ("llama", "gpt2", "t5")


def parameters(kinds: Iterable[str]) -> list:
    """A fixture's or a test's parameters for these kinds."""
    return [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


def of_kinds(*kinds: str):
    """A test of these only."""
    return pytest.mark.parametrize("tiny", parameters(kinds), indirect=True, scope="module")


# Those that benchmarks/architectures.py was not run for: encoders, and what came to the matrix
# since.
NOT_ASKED = (*MASKED, *TARGET)


def served_by_vllm(kind: str) -> str:
    """What benchmarks/architectures.py found: the schemes in which vLLM's probabilities are those
    of the file, and why others aren't among them.
    """
    if kind in NOT_ASKED:
        return "not tried"
    found = [row for row in json.loads(SERVED.read_text())["rows"] if row["architecture"] == kind]
    by_verdict: dict[str, list[str]] = {}
    for row in found:
        said = f"{row['verdict']}: {row['why']}" if "why" in row else row["verdict"]
        by_verdict.setdefault(said, []).append(row["scheme"])
    parts = [", ".join(by_verdict.pop("agrees", []))]
    parts += [
        said if len(schemes) == len(found) else f"{', '.join(schemes)} {said}"
        for said, schemes in by_verdict.items()
    ]
    return "; ".join(part for part in parts if part)


def architecture_table() -> str:
    """What is tested here, as a table for docs/models.md: architecture × command."""
    lines = [
        (
            "| architecture | calibrate, verify | export | eval scores | transformers' loader"
            " | vLLM |"
        ),
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind in sorted(KINDS):
        schemes = ", ".join((*SCHEMES, *MORE_SCHEMES.get(kind, ()))) + (
            ", experts skipped" if kind in OPTIONS else ""
        )
        scored = (
            "masked tokens"
            if kind in MASKED
            else "the target text"
            if kind in TARGET
            else "the next token"
        )
        name = f"`{kind}`" + (" (vision tower skipped)" if kind in MULTIMODAL else "")
        lines.append(
            f"| {name} | yes | {schemes} | {scored} | {TRANSFORMERS.get(kind, 'the same logits')} |"
            f" {served_by_vllm(kind)} |"
        )
    return "\n".join(lines) + "\n"
