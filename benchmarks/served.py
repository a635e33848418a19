"""Is `eval` faithful? Its perplexities, compared with those of vLLM (its own log probabilities of
the prompt) and of transformers' logits, on the same windows.

    python benchmarks/served.py --data wiki.test.raw --vllm-python PYTHON      # about 10 minutes

SmolLM2-135M, protocol gptq, 10 windows of 1024 tokens, in bfloat16, int8-dynamic and fp8-dynamic.
vLLM's CPU build gives FP8 inputs to `torch._scaled_mm`, which runs oneDNN's reference loop where
the processor has no FP8 instructions (days for this text): there the call is answered by the same
product in float32, and the table says so. Builds that keep inputs in bfloat16 (`--hardware cpu`)
are asked through what they compute: a checkpoint that holds the codes' values, rounded to bfloat16.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from export import RESULTS, machine

from quantkit.checkpoint.files import write_json
from quantkit.checkpoint.formats import read_quantization_config, stored_linears
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.writer import write_tensors
from quantkit.cli.demo import smollm2
from quantkit.data.protocols import evaluation_windows
from quantkit.data.tokenizer import load_tokenizer
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.preflight import EvaluationOptions
from quantkit.evaluation.report import markdown_table
from quantkit.exporter.plan import ExportOptions, plan_export
from quantkit.exporter.write import export
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import QuantScheme

# How a script begins that asks vLLM's CPU build; it runs with vLLM's Python. answered: calls of
# torch._scaled_mm.
VLLM_START = """
import json, os, sys
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="ERROR",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
)
import torch
answered = 0

def scaled_mm(
    a, b, scale_a, scale_b, bias=None, scale_result=None, out_dtype=None, use_fast_accum=False
):
    global answered
    answered += 1
    output = (a.float() @ b.float()) * scale_a.float() * scale_b.float()
    return (output if bias is None else output + bias.float()).to(out_dtype or torch.bfloat16)

torch._scaled_mm = scaled_mm
import vllm
"""
# Prints {"nll": sum, "tokens": count, "answered", "version"}.
VLLM = (
    VLLM_START
    + """
windows = json.load(open(sys.argv[2]))
model = vllm.LLM(
    sys.argv[1],
    enforce_eager=True,
    max_model_len=len(windows[0]) + 8,
    max_num_seqs=1,
    dtype="bfloat16",
)
params = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
nll, count = 0.0, 0
for window in windows:
    output, = model.generate([{"prompt_token_ids": window}], params, use_tqdm=False)
    for token, logprobs in list(zip(window, output.prompt_logprobs))[1:]:
        nll -= logprobs[token].logprob
        count += 1
report = {"nll": nll, "tokens": count, "answered": answered, "version": vllm.__version__}
print(json.dumps(report), flush=True)
os._exit(0)
"""
)


def vllm_perplexity(python: str, checkpoint: Path, windows: Path) -> dict[str, Any]:
    done = subprocess.run(
        [python, "-c", VLLM, str(checkpoint), str(windows)], capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"nll"')]
    if not lines:
        raise click.ClickException(
            f"vLLM doesn't serve {checkpoint}:"
            f" {(done.stderr or done.stdout).strip().splitlines()[-1]}"
        )
    found = json.loads(lines[-1])
    return found | {"perplexity": math.exp(found["nll"] / found["tokens"])}


def transformers_perplexities(
    checkpoint: Path, windows: list[list[int]], threads: int
) -> tuple[float, float]:
    """From transformers' whole forward: with its logits as they come (bfloat16), and with `lm_head`
    applied in float32 to its final hidden states.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _transformers_perplexities(checkpoint, windows)
    finally:
        torch.set_num_threads(before)


def _transformers_perplexities(checkpoint: Path, windows: list[list[int]]) -> tuple[float, float]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").eval()
    sums, count = [0.0, 0.0], 0
    weight = model.get_output_embeddings().weight.float()
    with torch.inference_mode():
        for window in windows:
            tokens = torch.tensor([window])
            output = model(tokens, use_cache=False, output_hidden_states=True)
            each = (
                output.logits[0, :-1].float(),
                output.hidden_states[-1][0, :-1].float() @ weight.T,
            )
            for number, logits in enumerate(each):
                sums[number] += float(
                    torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
                    .double()
                    .sum()
                )
            count += len(window) - 1
    return math.exp(sums[0] / count), math.exp(sums[1] / count)


def dequantized(checkpoint: Path, base: Path, output: Path) -> Path:
    """A bfloat16 checkpoint of the values that a quantized one's codes stand for."""
    quantized, original = Checkpoint.open(checkpoint), Checkpoint.open(base)
    quantization = read_quantization_config(quantized.config)
    tensors = {name: original.read(name) for name in original.tensors}
    for module, suffixes in stored_linears(quantized.tensors).items():
        weight, _ = quantization.file_format.decode(
            {suffix: quantized.read(f"{module}.{suffix}") for suffix in suffixes},
            quantization.scheme_of(module),
            module,
        )
        tensors[f"{module}.weight"] = weight.dequantize().bfloat16()
    output.mkdir()
    write_tensors(output / "model.safetensors", tensors)
    for file in ("config.json", *(path.name for path in original.other_files())):
        (output / file).write_bytes((base / file).read_bytes())
    return output


def compare(
    work: Path, data: str, windows: int, seq_len: int, vllm_python: str | None
) -> list[dict[str, Any]]:
    base = smollm2(lambda text: click.echo(text, err=True))
    outputs = {}
    for scheme in ("int8-dynamic", "fp8-dynamic"):
        outputs[scheme] = work / scheme
        export(plan_export(ExportOptions(base, outputs[scheme], Recipe(QuantScheme.parse(scheme)))))
    outputs["fp8-dynamic, --hardware cpu"] = outputs["fp8-dynamic"]
    cut = evaluation_windows(
        [data], load_tokenizer(base), "gptq", seq_len, windows * seq_len
    ).windows
    tokens = [list(window.tokens) for window in cut]
    (work / "windows.json").write_text(json.dumps(tokens))

    def judged(quants: tuple[Path, ...], **options: Any) -> dict[str, Any]:
        return evaluate(
            EvaluationOptions(base, quants, (data,), seq_len, windows * seq_len, **options)
        ).to_json()

    kernels, reference = (
        judged((outputs["int8-dynamic"], outputs["fp8-dynamic"]), exec=name)
        for name in ("auto", "reference")
    )
    weights_only = {
        name: judged((outputs["fp8-dynamic"],), hardware="cpu", exec=name)["quants"][0]
        for name in ("auto", "reference")
    }
    rows = []

    def row(
        what: str,
        against: str,
        theirs: float,
        ours: float,
        by_reference: float | None = None,
        remark: str = "",
    ) -> None:
        rows.append(
            {
                "checkpoint": what,
                "against": against,
                "theirs": theirs,
                "eval": ours,
                "eval_reference": by_reference,
                "remark": remark,
            }
        )
        click.echo(
            f"  {what:28} {against:34} {theirs:.4f} {ours:.4f} ({100 * (ours / theirs - 1):+.3f} %)"
            f" {remark}",
            err=True,
        )

    for threads in dict.fromkeys((1, torch.get_num_threads())):
        bfloat16, float32 = transformers_perplexities(base, tokens, threads)
        where = f"{threads} thread{'s' if threads > 1 else ''}"
        row(
            "bfloat16",
            f"transformers, {where}",
            float32,
            kernels["base"]["perplexity"],
            remark="its hidden states, lm_head in float32",
        )
        row(
            "bfloat16",
            f"transformers, {where}",
            bfloat16,
            kernels["base"]["perplexity"],
            remark="its logits, which are bfloat16",
        )
    if vllm_python:
        served = {
            name: vllm_perplexity(vllm_python, path, work / "windows.json")
            for name, path in {"bfloat16": base, **outputs}.items()
            if "cpu" not in name
        }
        against = f"vLLM {served['bfloat16']['version']}"
        row("bfloat16", against, served["bfloat16"]["perplexity"], kernels["base"]["perplexity"])
        for number, name in enumerate(("int8-dynamic", "fp8-dynamic")):
            remark = "torch._scaled_mm answered in float32" if served[name]["answered"] else ""
            ours, by_reference = (
                kernels["quants"][number]["perplexity"],
                reference["quants"][number]["perplexity"],
            )
            row(name, against, served[name]["perplexity"], ours, by_reference, remark)
        values = vllm_perplexity(
            vllm_python,
            dequantized(outputs["fp8-dynamic"], base, work / "values"),
            work / "windows.json",
        )
        ours, by_reference = (weights_only[name]["perplexity"] for name in ("auto", "reference"))
        row(
            "fp8-dynamic, --hardware cpu",
            against,
            values["perplexity"],
            ours,
            by_reference,
            "codes' values in bfloat16",
        )
    return rows


def _percent(share: float) -> str:
    text = f"{100 * share:+.3f} %"
    return text[1:] if float(text[:-2]) == 0 else text


def table(rows: list[dict[str, Any]]) -> str:
    columns = (
        "checkpoint",
        "against",
        "its perplexity",
        "quantkit eval",
        "difference",
        "--exec reference",
        "difference",
        "remark",
    )
    shown = []
    for entry in rows:
        ours = [entry["eval"], entry["eval_reference"]]
        figures = [
            cell
            for value in ours
            for cell in (
                ("", "")
                if value is None
                else (f"{value:.3f}", _percent(value / entry["theirs"] - 1))
            )
        ]
        shown.append(
            (
                entry["checkpoint"],
                entry["against"],
                f"{entry['theirs']:.3f}",
                *figures,
                entry["remark"],
            )
        )
    return markdown_table(columns, shown)


@click.command()
@click.option("--data", required=True, help="A text file, such as WikiText-2's test split.")
@click.option("--windows", default=10, show_default=True)
@click.option("--seq-len", default=1024, show_default=True)
@click.option(
    "--vllm-python", help="A Python that has vLLM; without it only transformers is compared with."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=RESULTS / "parity.md",
    show_default=True,
)
def main(data: str, windows: int, seq_len: int, vllm_python: str | None, output: Path) -> None:
    """Compare eval's perplexities with a server's and with transformers'."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    with tempfile.TemporaryDirectory() as temporary:
        rows = compare(Path(temporary), data, windows, seq_len, vllm_python)
    title = (
        f"SmolLM2-135M-Instruct, {Path(data).name}, the first {windows} windows of {seq_len}"
        " tokens, protocol gptq"
    )
    text = f"# Eval, vLLM and transformers\n\n{title}.\nMachine: {machine()}.\n\n{table(rows)}"
    output.parent.mkdir(exist_ok=True)
    output.write_text(text)
    write_json(
        output.with_suffix(".json"),
        {"machine": machine(), "windows": windows, "seq_len": seq_len, "rows": rows},
    )
    click.echo(text)


if __name__ == "__main__":
    main()
