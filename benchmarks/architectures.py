"""Does vLLM serve what `export` writes? Its probabilities for tiny models of many architectures,
compared with quantkit's own for the same files.

    python benchmarks/architectures.py --vllm-python PYTHON      # about an hour
    python benchmarks/architectures.py --vllm-python PYTHON --only llama --only mixtral

The models are those of tests/support/architecture_kinds.py, four times as wide. vLLM's CPU build
gives the log probabilities of the whole vocabulary at each position of a few prompts; all distances
are mean KL divergences from them. "agreement" is the distance of quantkit's quantized model of the
same file. Three others say what it means: the distance of the unquantized model (vLLM may run an
architecture otherwise than transformers does), what quantization changes in vLLM itself, and the
least distance when every second scale of one Linear is doubled, for each Linear in turn. A file
that is read wrongly anywhere would be as far off as the last.

In float32 nothing but the file decides, so that is tried first, with vLLM's oneDNN kernel for INT8;
kernels for AMX, and those of experts, take bfloat16 only. `torch._scaled_mm` is answered in float32
(served.py says why). Where vLLM leaves inputs as they are ("W8A16"), so does quantkit with
`--hardware cpu`; the table has the nearer of the two. Rows are written when they are done,
and --only replaces those that it makes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from export import RESULTS, machine
from safetensors.torch import load_file, save_file
from served import VLLM_START
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

from architecture_kinds import KINDS, MORE_SCHEMES, OPTIONS, SCHEMES, TRANSFORMERS  # noqa: E402
from tiny_llama import make_text, make_tokenizer  # noqa: E402
from tiny_models import MASKED, TARGET, make_model, whole_model  # noqa: E402

from quantkit.calibration.calibrate import calibrate  # noqa: E402
from quantkit.calibration.options import CalibrationOptions  # noqa: E402
from quantkit.checkpoint.files import write_json  # noqa: E402
from quantkit.errors import QuantkitError  # noqa: E402
from quantkit.evaluation.quantized_model import load_quantized_model  # noqa: E402
from quantkit.evaluation.report import markdown_table  # noqa: E402
from quantkit.exporter.plan import ExportOptions, plan_export  # noqa: E402
from quantkit.exporter.write import export  # noqa: E402
from quantkit.schemes.recipe import Recipe  # noqa: E402
from quantkit.schemes.scheme import QuantScheme  # noqa: E402

TIMES = 4
PROMPTS = torch.randint(2, 300, (3, 24), generator=torch.Generator().manual_seed(2))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What vLLM needs of a tiny model, or takes for granted: settings that real models of the kind have.
# Where all experts take part, no rounding chooses between two.
_ALL_EXPERTS = {"num_experts_per_tok": 4}
_LATENT = {**_ALL_EXPERTS, "kv_lora_rank": 512, "q_lora_rank": 128, "qk_rope_head_dim": 64}
SETTINGS = {
    "qwen2": {"use_sliding_window": False},
    "gpt_neox": {"num_key_value_heads": 4},
    "mamba2": {"intermediate_size": 512},
    # vLLM's windows of this kind see a token more than transformers' do.
    "cohere2": {"sliding_window": 32, "logit_scale": 1.0},
    "llama4_text": {"attention_chunk_size": 128},
    **dict.fromkeys(("mixtral", "granitemoe", "minimax"), _ALL_EXPERTS),
    "deepseek_v2": _LATENT,
    "deepseek_v3": {**_LATENT, "topk_method": "noaux_tc"},
}
SECONDS = 300  # for one checkpoint
# Each checkpoint in a process that is forked after the imports: an engine that dies, or doesn't
# answer, ends no other. argv: a JSON list of {"checkpoint", "dtype"}, prompts,
# seconds. The first is the unquantized model: where that isn't served, nothing else is tried.
# Prints a line for each: {"checkpoint", "answered", "version"} or {"checkpoint", "reason"}.
SERVER = (
    VLLM_START
    + """
import signal, tempfile, time

def serve(checkpoint, dtype, prompts):
    if dtype == "float32":
        from vllm.model_executor.kernels.linear.scaled_mm import cpu
        cpu.check_cpu_sgl_kernel = lambda *shape: False
    model = vllm.LLM(
        checkpoint,
        enforce_eager=True,
        max_model_len=len(prompts[0]) + 8,
        max_num_seqs=1,
        dtype=dtype,
        max_logprobs=-1,
        limit_mm_per_prompt={"image": 0},
    )
    params = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1)
    rows = []
    for prompt in prompts:
        output, = model.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        rows.append([
            [position[token].logprob for token in range(len(position))]
            for position in output.prompt_logprobs[1:]
        ])
    torch.save(torch.tensor(rows), checkpoint + "/vllm.pt")

def attempt(job, prompts):
    try:
        serve(job["checkpoint"], job["dtype"], prompts)
    except BaseException as error:
        import traceback
        traceback.print_exc()
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{os.path.basename(frame.filename)}:{frame.lineno}"
        return {"reason": f"{type(error).__name__}: {error}\\nat {place}"}
    return {"answered": answered, "version": vllm.__version__}

def forked(job, prompts, seconds):
    log, end = tempfile.TemporaryFile("w+"), time.monotonic() + seconds
    child = os.fork()
    if child == 0:
        os.dup2(log.fileno(), 2)
        os.dup2(log.fileno(), 1)
        with open(job["checkpoint"] + "/vllm.json", "w") as file:
            json.dump(attempt(job, prompts), file)
        os._exit(0)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return {"reason": f"no answer in {seconds} s"}
        time.sleep(0.2)
    log.seek(0)
    printed = log.read()
    sys.stderr.write(printed)
    try:
        return json.load(open(job["checkpoint"] + "/vllm.json"))
    except (OSError, ValueError):
        lines = [line.strip() for line in printed.splitlines()]
        said = [line for line in lines if "what():" in line or "Segfault" in line]
        return {"reason": f"vLLM dies: {(said or lines[-1:] or ['nothing'])[0]}"}

jobs, prompts = json.loads(sys.argv[1]), json.loads(sys.argv[2])
for job in jobs:
    said = forked(job, prompts, int(sys.argv[3]))
    print(json.dumps({"checkpoint": job["checkpoint"]} | said), flush=True)
    if job is jobs[0] and "reason" in said:
        break
os._exit(0)
"""
)


@dataclass(frozen=True)
class Tiny:
    """One architecture's model in one dtype, and its exports."""

    kind: str
    dtype: str
    place: Path

    @property
    def base(self) -> Path:
        return self.place / "base"

    def make(self) -> Tiny:
        shutil.rmtree(self.place, ignore_errors=True)
        vocabulary = make_tokenizer(self.base)
        make_model(
            self.base,
            self.kind,
            DTYPES[self.dtype],
            TIMES,
            vocab_size=vocabulary,
            **SETTINGS.get(self.kind, {}),
        )
        return self

    def exported(self, scheme: str) -> Path:
        recipe, output = Recipe(QuantScheme.parse(scheme)), self.place / scheme
        calibration = self.place / "calibration" if recipe.needs_calibration else None
        if calibration and not calibration.exists():
            (self.place / "text.txt").write_text(make_text(500, seed=3))
            calibrate(
                CalibrationOptions(
                    self.base,
                    calibration,
                    (str(self.place / "text.txt"),),
                    num_samples=4,
                    seq_len=32,
                )
            )
        export(
            plan_export(
                ExportOptions(self.base, output, recipe, calibration, **OPTIONS.get(self.kind, {}))
            )
        )
        return output


def ask(python: str, jobs: list[dict[str, str]], log: Path) -> dict[str, dict[str, Any]]:
    """What vLLM says of each checkpoint. The processes that it starts end with it."""
    command = [python, "-c", SERVER, json.dumps(jobs), json.dumps(PROMPTS.tolist()), str(SECONDS)]
    with log.open("a") as errors:
        server = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
        try:
            printed, _ = server.communicate(timeout=(len(jobs) + 1) * SECONDS)
        finally:
            # A group of its own, and nobody else's.
            os.killpg(server.pid, signal.SIGKILL) if _alive(server.pid) else None
    found = [json.loads(line) for line in printed.splitlines() if line.startswith('{"checkpoint"')]
    return {entry["checkpoint"]: entry for entry in found}


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def log_probabilities(checkpoint: Path, hardware: str | None = None) -> Tensor:
    """quantkit's, of the whole vocabulary after each position but the last: [prompts, positions −
    1, vocabulary] float32.
    """
    model = whole_model(load_quantized_model(checkpoint, "cpu", hardware))
    with torch.inference_mode():
        logits = torch.cat(
            [model(input_ids=prompt[None], use_cache=False).logits for prompt in PROMPTS]
        )
    return torch.log_softmax(logits[:, :-1].float(), dim=-1)


def divergence(theirs: Tensor, ours: Tensor) -> float:
    """Mean KL(theirs‖ours), in nats."""
    theirs = theirs[..., : ours.shape[-1]].double()
    return max(float((theirs.exp() * (theirs - ours)).sum(-1).mean()), 0.0)


def least_spoilt(
    checkpoint: Path, theirs: Tensor, hardware: str | None, work: Path
) -> tuple[float, str]:
    """The least divergence from `theirs` of all copies in which every second scale of one Linear is
    doubled, and that Linear.
    """
    tensors = load_file(checkpoint / "model.safetensors")
    spoilt = Path(
        shutil.copytree(
            checkpoint, work / "spoilt", ignore=shutil.ignore_patterns("*.pt", "*.safetensors")
        )
    )
    found = []
    for name in [name for name in tensors if name.endswith(("weight_scale", "weight_scale_inv"))]:
        scale = tensors[name].clone()
        scale.view(-1)[::2] = (
            scale.view(-1)[::2] + 1 if scale.dtype == torch.uint8 else scale.view(-1)[::2] * 2
        )
        save_file(tensors | {name: scale}, spoilt / "model.safetensors", {"format": "pt"})
        found.append(
            (divergence(theirs, log_probabilities(spoilt, hardware)), name.rpartition(".")[0])
        )
    shutil.rmtree(spoilt)
    return min(found)


def judge(
    tiny: Tiny, scheme: str, base: tuple[Tensor, Tensor], said: dict[str, Any]
) -> dict[str, Any]:
    """The row of a checkpoint that vLLM served. base: vLLM's and quantkit's of the unquantized
    model.
    """
    theirs = torch.load(tiny.place / scheme / "vllm.pt")
    nearest = None
    for hardware in (None, "cpu"):
        try:
            distance = divergence(theirs, log_probabilities(tiny.place / scheme, hardware))
        except QuantkitError:  # this hardware doesn't compute it
            continue
        if nearest is None or distance < nearest[0]:
            nearest = distance, hardware
    agreement, hardware = nearest
    least, linear = least_spoilt(tiny.place / scheme, theirs, hardware, tiny.place)
    weights_only = hardware is not None or QuantScheme.parse(scheme).input is None
    figures = {
        "base": divergence(*base),
        "agreement": agreement,
        "quantization": divergence(base[0], theirs),
        "least_spoilt": least,
    }
    computes = "W8A16" if weights_only else "W8A8"
    return {
        "served": True,
        "dtype": tiny.dtype,
        "computes": computes,
        "answered": said["answered"],
        **figures,
        "least_spoilt_linear": linear,
    }


def schemes_of(kind: str) -> tuple[str, ...]:
    """Those of the tests, and where there are experts the one FP8 scheme that vLLM's CPU build has
    a kernel of experts for.
    """
    experts = ("fp8-block",) if "experts" in TRANSFORMERS.get(kind, "") else ()
    return tuple(dict.fromkeys((*SCHEMES, *MORE_SCHEMES.get(kind, ()), *experts)))


def measure(kind: str, python: str, work: Path) -> tuple[list[dict[str, Any]], str]:
    """The rows of one architecture, and vLLM's version. In float32 what is served so, in bfloat16
    the rest.
    """
    rows: dict[str, dict[str, Any]] = {}
    version = ""
    for dtype in [
        dtype
        for dtype in DTYPES
        if dtype == "bfloat16" or kind in OPTIONS or "experts" not in TRANSFORMERS.get(kind, "")
    ]:
        missing = [scheme for scheme in schemes_of(kind) if not rows.get(scheme, {}).get("served")]
        if not missing:
            break
        tiny = Tiny(kind, dtype, work / f"{kind}-{dtype}").make()
        paths = {"": tiny.base, **{scheme: tiny.exported(scheme) for scheme in missing}}
        found = ask(
            python,
            [{"checkpoint": str(path), "dtype": dtype} for path in paths.values()],
            work / f"{kind}.log",
        )
        said = {
            scheme: found.get(str(path), {"reason": "the server ended"})
            for scheme, path in paths.items()
        }
        version = next((entry["version"] for entry in said.values() if "version" in entry), version)
        if "reason" not in said[""]:
            base = torch.load(tiny.base / "vllm.pt"), log_probabilities(tiny.base)
        for scheme in missing:
            reason = said[""].get("reason") or said[scheme].get("reason")
            row = (
                {"served": False, "unquantized": "reason" not in said[""], "reason": reason}
                if reason
                else judge(tiny, scheme, base, said[scheme])
            )
            if reason and scheme in rows and rows[scheme]["reason"] != reason:
                row["reason"] = f"{rows[scheme]['reason']}\n{reason}"
            rows[scheme] = {"architecture": kind, "scheme": scheme} | row
            click.echo(f"  {kind:18} {scheme:16} {dtype:9} {_words(row)}", err=True)
        shutil.rmtree(tiny.place)
    return list(rows.values()), version


def _words(row: dict[str, Any]) -> str:
    if not row["served"]:
        return row["reason"].splitlines()[0][:300]
    figures = "  ".join(
        f"{key} {row[key]:.1e}" for key in ("base", "agreement", "quantization", "least_spoilt")
    )
    return f"{figures}  {row['computes']} {row['least_spoilt_linear']}"


# What vLLM's own words come to, for a table.
REASONS = {
    "failed to be inspected": "needs torchvision, which has no build for this torch",
    "does not dispatch through the Transformers": "vLLM has no such model any more",
    "selective_scan_fwd": "no kernel for the selective scan",
    "Unsupported FP8 MoE backend": "no kernel for such FP8 experts",
    "No Int8 MoE backend": "no kernel for INT8 experts with this routing",
    "CPUExpertsInt8 does not support apply_router_weight_on_input": (
        "no kernel for INT8 experts with this routing"
    ),
    "is invalid for input of size 2\nat llama4.py": (
        "vLLM reorders the rows of its q and k, and can't reorder scales of blocks"
    ),
    "Unsupported FusedMoe scheme": "vLLM doesn't take static INT8 experts",
    "compressed_tensors_moe_w8a8_fp8": "vLLM doesn't take static experts with channel scales",
    "WNA16": "no kernel for packed 8-bit weights",
    "MXFP8": "no kernel for MXFP8",
    "CHECK_EQ(mat1.size(1), K)": (
        "its kernel for FP8 blocks takes no Linear as small as in_proj_ba here"
    ),
    "static_scaled_fp8_quant": "no static FP8 inputs",
    "expected scalar type Float but found BFloat16": (
        "its kernel for FP8 blocks takes no bfloat16 bias"
    ),
}


def short_reason(reason: str) -> str:
    """A reason for a table: what is known of it, or the first line as vLLM says it."""
    known = next((words for mark, words in REASONS.items() if mark in reason), None)
    return known or reason.splitlines()[0][:160]


def verdict(row: dict[str, Any]) -> str:
    """Of a row that was served: "agrees" where vLLM's probabilities are nearer to quantkit's of the
    file than to the unquantized model's, and less than a quarter as far off as with doubled scales
    of any one Linear; "no nearer than unquantized" where vLLM's unquantized model is as far from
    transformers' already; "differs" otherwise.
    """
    if row["agreement"] < min(row["quantization"], row["least_spoilt"] / 4):
        return "agrees"
    return "no nearer than unquantized" if row["agreement"] < 2 * row["base"] else "differs"


def judged(row: dict[str, Any]) -> dict[str, Any]:
    """A row with what the README says of it."""
    if row["served"]:
        return row | {"verdict": verdict(row)}
    return row | {
        "verdict": "not served" if row["unquantized"] else "not served, unquantized neither",
        "why": short_reason(row["reason"]),
    }


def table(report: dict[str, Any]) -> str:
    rows = []
    for row in report["rows"]:
        what = (row["architecture"], row["scheme"])
        if row["served"]:
            figures = (
                f"{row[key]:.1e}" for key in ("base", "agreement", "quantization", "least_spoilt")
            )
            rows.append(
                (
                    *what,
                    f"{row['dtype']}, {row['computes']}",
                    *figures,
                    row["verdict"] + (" ¹" if row["answered"] else ""),
                )
            )
        else:
            rows.append((*what, "", "", "", "", "", f"{row['verdict']}: {row['why']}"))
    return markdown_table(
        (
            "architecture",
            "scheme",
            "computed in",
            "unquantized",
            "as exported",
            "quantization",
            "least spoilt",
            "verdict",
        ),
        rows,
    )


def markdown(report: dict[str, Any]) -> str:
    prompts, tokens = PROMPTS.shape
    return f"""# Served by vLLM

Tiny random models of the architectures that the tests know, {TIMES} times as wide, {prompts}
prompts of {tokens} tokens; vLLM {report["vllm"]}, CPU build.
Machine: {report["machine"]}.

Mean KL divergences from vLLM's probabilities of the whole vocabulary, in nats: *unquantized*, of
transformers' of the same model; *as exported*, of quantkit's quantized model of the same file;
*quantization*, of vLLM's unquantized from its quantized model; *least spoilt*, the least that is
left when every second scale of one Linear is doubled in quantkit's reading, of all Linears in turn.
The export *agrees* where "as exported" is less than "quantization" and less than a quarter of
"least spoilt". In bfloat16 it is larger than in float32: there, roundings before an input is
quantized move a good part of its INT8 codes by a step.

{table(report)}
¹ With `torch._scaled_mm` answered in float32 (`benchmarks/served.py`).
"""


def _place(row: dict[str, Any]) -> tuple[str, int]:
    return row["architecture"], schemes_of(row["architecture"]).index(row["scheme"])


@click.command()
@click.option("--vllm-python", required=True, help="A Python that has vLLM.")
@click.option(
    "--only", multiple=True, type=click.Choice(KINDS), help="Measure these and keep the other rows."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=RESULTS / "architectures.json",
    show_default=True,
)
@click.option("--work", type=click.Path(path_type=Path), help="Keep vLLM's messages here.")
def main(vllm_python: str, only: tuple[str, ...], output: Path, work: Path | None) -> None:
    """Compare vLLM's probabilities of tiny models with quantkit's own."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    report = json.loads(output.read_text()) if only and output.is_file() else {"rows": []}
    for kind in only or [kind for kind in KINDS if kind not in MASKED and kind not in TARGET]:
        with tempfile.TemporaryDirectory() as temporary:
            rows, version = measure(kind, vllm_python, work or Path(temporary))
        kept = [row for row in report["rows"] if row["architecture"] != kind]
        report = {
            "machine": machine(),
            "vllm": version or report.get("vllm", ""),
            "rows": [judged(row) for row in sorted([*kept, *rows], key=_place)],
        }
        write_json(output, report)
        output.with_suffix(".md").write_text(markdown(report))


if __name__ == "__main__":
    main()
