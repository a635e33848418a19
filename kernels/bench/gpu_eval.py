"""`quantkit eval --device cuda --exec kernel` beside `--exec reference`, on a model with random
weights in an 8B model's layer shapes, or on one given.

    python kernels/bench/gpu_eval.py FOLDER RESULT.json [--model DIR] [--layers 2] [--schemes
    int8-dynamic,fp8-dynamic,fp8-block]

RESULT: each scheme's perplexity under both, and how far they are apart. The folder holds models and
checkpoints while it runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# Hidden, intermediate size, heads and key heads of Llama-3.1-8B; its layers have the GEMMs (6144,
# 4096), (4096, 4096), (28672, 4096), (4096, 14336), some in parts.
SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
# INT8 sums are exact: what may differ is nothing. FP8 sums have fewer bits on Hopper.
BOUND = {"int8-dynamic": 1e-6, "fp8-dynamic": 2e-3, "fp8-block": 2e-3}


def make_model(directory: Path, layers: int) -> None:
    import torch
    from tiny_llama import make_text, make_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    directory.mkdir(parents=True)
    vocabulary = make_tokenizer(directory)
    config = LlamaConfig(
        vocab_size=vocabulary,
        num_hidden_layers=layers,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        **SIZES,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory)
    (directory.parent / "text.txt").write_text(make_text(6000, seed=1))


def quantkit(*arguments: object) -> float:
    """Run a command; returns its seconds."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "quantkit", *map(str, arguments)], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(
            f"quantkit {arguments[0]} ended with {done.returncode}: {done.stderr[-2000:]}"
        )
    return time.monotonic() - began


def compare(model: Path, folder: Path, scheme: str) -> dict[str, Any]:
    checkpoint = folder / f"{model.name}-{scheme}"
    quantkit("export", model, "-o", checkpoint, "--scheme", scheme, "--overwrite", "-q")
    found: dict[str, Any] = {"scheme": scheme, "bound": BOUND.get(scheme, 2e-3)}
    for how in ("kernel", "reference"):
        result = folder / f"{scheme}-{how}.json"
        found[f"{how}_seconds"] = quantkit(
            "eval",
            model,
            checkpoint,
            "--data",
            folder / "text.txt",
            "--device",
            "cuda",
            "--exec",
            how,
            "--seq-len",
            512,
            "--max-tokens",
            8192,
            "-q",
            "-o",
            result,
        )
        judged = json.loads(result.read_text())["quants"][0]
        found[how] = {key: judged[key] for key in ("perplexity", "exec", "tokens_per_second")}
    found["apart"] = abs(found["kernel"]["perplexity"] / found["reference"]["perplexity"] - 1)
    found["ok"] = found["apart"] <= found["bound"] and found["kernel"]["exec"] == "kernel"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--schemes", default="int8-dynamic,fp8-dynamic,fp8-block")
    arguments = parser.parse_args()
    model = arguments.model or arguments.folder / "random-8b-shapes"
    if not arguments.model:
        make_model(model, arguments.layers)
    elif not (arguments.folder / "text.txt").exists():
        from quantkit.data.sources import BUNDLED_EVALUATION

        arguments.folder.mkdir(parents=True, exist_ok=True)
        (arguments.folder / "text.txt").write_text(BUNDLED_EVALUATION.read_text())
    compared = []
    for scheme in arguments.schemes.split(","):
        compared.append(compare(model, arguments.folder, scheme))
        print(
            f"{scheme}: perplexity {compared[-1]['kernel']['perplexity']:.6f},"
            f" {compared[-1]['apart']:.2g} from the reference's",
            flush=True,
        )
        arguments.result.write_text(
            json.dumps({"model": model.name, "schemes": compared}, indent=1) + "\n"
        )
    return int(not all(found["ok"] for found in compared))


if __name__ == "__main__":
    sys.exit(main())
