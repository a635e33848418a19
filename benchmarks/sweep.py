"""Every causal language model that transformers knows through every command, as a tiny random
model: what quantkit takes, what it refuses, and why.

    python benchmarks/sweep.py                       # all, about 8 minutes of one core
    python benchmarks/sweep.py qwen3 llama4_text     # these, with what went wrong in full

Each architecture's default configuration is made small by what its sizes are called, filled with
random weights, saved, and taken through `export --dry-run`, `export`, `verify`, `eval` and
`calibrate`. Four things are looked at beyond "it ran": the base's perplexity is that of
transformers' own forward of the whole model, the quantized model's KL is small, its weights are the
model's but for their rounding, and each Linear of the decoder blocks and each stack of experts was
quantized or left with a reason.
"""

from __future__ import annotations

import gc
import inspect
import json
import math
import re
import signal
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from torch import Tensor, nn

from quantkit import __version__
from quantkit.calibration.calibrate import calibrate
from quantkit.calibration.options import CalibrationOptions
from quantkit.data.protocols import evaluation_windows
from quantkit.data.sources import BUNDLED_CALIBRATION
from quantkit.data.tokenizer import load_tokenizer
from quantkit.errors import QuantkitError
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.preflight import EvaluationOptions
from quantkit.evaluation.quantized_model import load_quantized_model
from quantkit.exporter.plan import ExportOptions, ExportPlan, plan_export
from quantkit.exporter.verify import verify
from quantkit.exporter.write import export
from quantkit.models.skeleton import decoder_blocks
from quantkit.models.task import SEQ2SEQ
from quantkit.ops.linear import QuantizedLinear
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import SCHEMES

RESULTS = Path(__file__).parent / "results"
VOCABULARY, HIDDEN, SEQ_LEN, TOKENS = 384, 64, 32, 96
MOST_PARAMETERS = 20_000_000
SECONDS = 60
MOST_ROUNDED = 0.005  # of a matrix's largest value: half a step of INT8 is 0.0039 of a row's
LEAST_MATRIX = 16  # rows and columns; what is smaller is a convolution's kernel or the like
SCHEME = "int8-dynamic"
# What sizes are called, and what they become where they are larger. The first that matches counts.
SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size.*|.*vocab_size", VOCABULARY),
    (r".*hidden_size_per_layer.*|.*lora_rank|.*(state_size|d_state|ssm_state)|q_rank|.*_rank", 16),
    (r"moe.*(intermediate|ffn).*|.*expert.*(intermediate|ffn).*", 32),
    (
        r".*intermediate.*size.*|.*ffn_dim|.*ffn_hidden.*|d_ff|n_inner|d_inner|inner_dim|ff_.*dim|feed_forward_size|.*mlp_.*size",
        96,
    ),
    (
        r"hidden_size|d_model|n_embd|dim|emb_dim|model_dim|embedding_size|embedding_dim|word_embed_proj_dim|.*hidden_size|lru_width|out_hidden_size|.*_proj_dim",
        HIDDEN,
    ),
    (r"num_hidden_layers|n_layers?|num_layers|.*coder_layers|depth|num_.*_layers", 2),
    (r".*(key_value|kv)_heads.*|num_key_heads", 2),
    (r".*num.*heads|.*n_heads?|.*attention_heads|num_heads", 4),
    (r"mamba_d_head|mamba_headdim|mamba_head_dim", 32),  # heads of it are twice the hidden size
    (r"num_kv_shared_layers|first_k_dense_replace", 0),
    (r"rotary_dim", 8),
    (r".*head_dim.*|.*d_head|attention_head_size|d_kv|kv_channels|head_size", 16),
    (r"(num|n)_.*experts|num_experts|moe_num_experts|.*ffn_num_experts", 4),
    (r".*per_tok.*|.*top_?k|moe_k", 2),
    (r"n_groups?|topk_group|.*n_groups", 1),
    (r".*chunk_size|block_size", 16),
    (r".*sliding_window|attention_window|window_size|.*attn_window.*", 8),
    (r".*position_embeddings|n_positions|n_ctx|max_seq.*|max_position.*|.*max_length", 64),
    (r"image_size", 32),
    (r"patch_size", 16),
)
SPECIAL_TOKENS = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "decoder_start_token_id": 1,
}
# What can't be told from names.
SHARED_BLOCKS = {
    "attention_hidden_size": 128,
    "attention_head_dim": 32,
    "num_hidden_layers": 5,
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "hybrid"],
}
GEMMA_LAYERS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
INDEXER = {
    "eos_token_id": 1,
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
NGRAMS = {
    "ple_layer_ids": [1],
    "ple_embed_dim": 64,
    "heads_per_ngram": 4,
    "ngram_vocab_size_base": 64,
    "split_ngram_parts": 2,
}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {
        "num_expert_group": 1,
        "topk_group": 1,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "cpmant": {"init_std": 0.02},  # 1.0 by default: logits so far apart that any rounding shows
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "blt": (
        {"encoder_hash_byte_group_vocab": 512, "vocab_size": VOCABULARY}
        | {
            f"{part}_config": {"vocab_size": VOCABULARY, "hidden_size_global": HIDDEN}
            for part in ("patcher", "encoder", "decoder")
        }
    ),
    "dots3_note": {
        "text_config": {"num_key_value_heads": 4},
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    },
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "glm_moe_dsa": {"indexer_types": ["full", "shared"]},
    "hy_v4": {"indexer_types": ["full", "shared"]},
    "gemma3n_text": (
        GEMMA_LAYERS
        | {
            "num_kv_shared_layers": 2,
            "intermediate_size": [96] * 4,
            "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        }
    ),
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 4},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "num_dense_layers": 1,
    },
    "longcat_flash": {"head_dim": 16, "qk_head_dim": 32, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "qwen4_exp": {"text_config": INDEXER | NGRAMS},
    "qwen4_exp_text": INDEXER | NGRAMS,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "vocab_size": VOCABULARY,
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [4, 8],
        "axial_pos_embds_dim": [16, 48],
        "num_buckets": 4,
    },
    "rembert": {"output_embedding_size": 96},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "zamba": SHARED_BLOCKS,
    "zamba2": (
        SHARED_BLOCKS
        | {
            "n_mamba_heads": 4,
            "num_key_value_heads": 4,
            "num_mem_blocks": 2,
            "use_shared_attention_adapter": True,
        }
    ),
}


# ---- Tiny models.


def shrunk(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a configuration that become smaller, and what they become."""
    changes: dict[str, Any] = {}
    layers = next(
        (
            settings[name]
            for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
            if isinstance(settings.get(name), int)
        ),
        None,
    )
    kinds: list[int] = []
    for name, value in settings.items():
        if isinstance(value, dict) and ("model_type" in value or name.endswith("_config")):
            changes[name] = shrunk(value) | {
                key: value[key] for key in ("model_type",) if key in value
            }
        elif (
            isinstance(value, list)
            and value
            and len(value) == layers
            and len({repr(item) for item in value}) > 1
            and not kinds
            and not _numbers(value)
        ):
            kinds = sorted(
                {repr(item): place for place, item in reversed(list(enumerate(value)))}.values()
            )
            kinds = kinds if len(kinds) > 1 else [0, 1]
        elif name in SPECIAL_TOKENS and value is not None:
            changes[name] = SPECIAL_TOKENS[name]
        elif (
            re.search(r"token_(id|index)$", name) and isinstance(value, int) and value >= VOCABULARY
        ):
            changes[name] = 5
        elif isinstance(value, int) and not isinstance(value, bool):
            size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), value)
            if value > size:
                changes[name] = size
    for name, value in settings.items():
        if isinstance(value, list) and layers and len(value) == layers:
            places = kinds or range(2)
            changes[name] = (
                list(range(len(places))) if _numbers(value) else [value[place] for place in places]
            )
        elif isinstance(value, dict) and "mrope_section" in value:
            changes[name] = value | {"mrope_section": [4, 2, 2]}
    for name in changes:
        if kinds and name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
            changes[name] = len(kinds)
    return changes


def merged(settings: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """The others over the settings, also inside of nested configurations."""
    inner = {
        name: merged(settings[name], value)
        for name, value in others.items()
        if isinstance(value, dict) and isinstance(settings.get(name), dict)
    }
    return {**settings, **others, **inner}


def _numbers(value: list[Any]) -> bool:
    """Whether a list as long as there are layers gives the numbers of all, not the kind of each."""
    return value == list(range(len(value)))


def make_model(kind: str, directory: Path, more: Mapping[str, Any]) -> nn.Module:
    """A random model of a kind that transformers knows, in float32 so that a difference is no
    rounding; saved in `directory`. more: settings.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = CONFIG_MAPPING[kind](
        **merged(merged(shrunk(CONFIG_MAPPING[kind]().to_dict()), EXCEPTIONS.get(kind, {})), more)
    )
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    config.architectures = [names if isinstance(names, str) else names[0]]
    with torch.device("meta"):
        count = sum(
            parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters()
        )
    if count > MOST_PARAMETERS:
        raise ValueError(
            f"its configuration has sizes that can't be told by name: {count / 1e6:.0f} million"
            " parameters"
        )
    torch.manual_seed(0)
    model = (
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    )
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape).to(parameter.dtype) * 0.02)
    model.save_pretrained(directory)
    return model


def make_tokenizer(directory: Path) -> None:
    """Byte-level BPE of VOCABULARY tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<a>", "<b>", "<c>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(BUNDLED_CALIBRATION)], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(directory)


# ---- One architecture.


class Failed(Exception):
    """group: "transformers", "refused" or "quantkit"."""

    def __init__(self, group: str, reason: str) -> None:
        super().__init__(reason)
        self.group, self.reason = group, reason


@contextmanager
def step(name: str, group: str) -> Iterator[None]:
    """A refusal of quantkit's is one, whatever the step; other exceptions belong to `group`."""
    try:
        yield
    except Failed:
        raise
    except QuantkitError as error:
        raise Failed("refused", f"{name}: {str(error)[:250]}") from error
    except Exception as error:
        raise Failed(
            group, f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error


def try_architecture(kind: str, place: Path, text: Path) -> dict[str, Any]:
    """One row of the table. Raises Failed."""
    model_path, output = place / "model", place / "out"
    make_tokenizer(model_path)
    with step("build", "transformers"):
        windows = [
            torch.tensor([window.tokens])
            for window in evaluation_windows(
                [str(text)], load_tokenizer(model_path), "gptq", SEQ_LEN, TOKENS
            ).windows
        ]
        try:
            model = make_model(kind, model_path, {})
            expected = perplexity(model, windows)
        except Exception:
            # Latent attention, and some that have no groups of queries.
            model = make_model(kind, model_path, {"num_key_value_heads": 4})
            expected = perplexity(model, windows)
    with step("blocks", "quantkit"):
        linears = linears_of(model)
    del model
    recipe = Recipe(SCHEMES[SCHEME])
    with step("export --dry-run", "quantkit"):
        plan = plan_export(ExportOptions(model_path, output, recipe))
    with step("export", "quantkit"):
        export(plan)
    with step("verify", "quantkit"):
        faults = verify(output, model_path).faults
        if faults:
            raise Failed("quantkit", f"verify: {faults[0]}")
    with step("weights", "quantkit"):
        require_all_arrived(model_path, output)
    with step("eval", "quantkit"):
        result = evaluate(
            EvaluationOptions(model_path, (output,), (str(text),), SEQ_LEN, TOKENS, cache=False)
        ).to_json()
    with step("calibrate", "quantkit"):  # last: what it refuses can be exported and evaluated
        summary = calibrate(
            CalibrationOptions(
                model_path, place / "calib", (str(text),), num_samples=2, seq_len=SEQ_LEN
            )
        )
    return judged(kind, plan, linears, result, expected, summary.unread)


def require_all_arrived(model_path: Path, output: Path) -> None:
    """Each parameter of the blocks is what it was, but for the rounding: what is lost, left random
    or in another order isn't. Raises Failed.
    """
    base, candidate = (
        load_quantized_model(model_path, "cpu").blocks,
        load_quantized_model(output, "cpu").blocks,
    )
    for number in range(base.block_count if base.task != SEQ2SEQ else 0):
        with base.block(number) as block, candidate.block(number) as other:
            linears = {
                f"{name}.weight": module.weight().dequantize()
                for name, module in other.named_modules()
                if isinstance(module, QuantizedLinear)
            }
            found = dict(other.named_parameters()) | linears
            for name, parameter in block.named_parameters():
                if (found[name] - parameter).abs().max() > MOST_ROUNDED * parameter.abs().max():
                    raise Failed(
                        "quantkit",
                        f"weights: {base.block_name(number)}.{name} is another than in the model",
                    )


def judged(
    kind: str,
    plan: ExportPlan,
    linears: Mapping[str, int],
    result: Mapping[str, Any],
    expected: float,
    unread: tuple[str, ...],
) -> dict[str, Any]:
    quant = result["quants"][0]
    found = result["base"]["perplexity"]
    if abs(found / expected - 1) > 1e-5:
        raise Failed(
            "quantkit", f"eval: the base's perplexity is {found:.6f}, transformers' {expected:.6f}"
        )
    if not 0 <= quant["kld"]["mean"] < 0.1:
        raise Failed("quantkit", f"eval: the mean KL is {quant['kld']['mean']:.3f}")
    left = left_matrices(plan)
    quantized = sum(row.bytes_before for row in plan.parameters if row.status == "quantized")
    lost = sum(linears.values()) - quantized - sum(size for size, _ in left.values())
    if lost > 0:
        raise Failed(
            "quantkit",
            f"export: {lost} bytes of the blocks' matrices are neither quantized nor left",
        )
    return {
        "architecture": kind,
        "quantized": len(plan.linears),
        "left": {name: reason for name, (_, reason) in left.items()},
        "weights_only": len(quant["weights_only_linears"]),
        "unread": len(unread),
        "kld": quant["kld"]["mean"],
    }


def left_matrices(plan: ExportPlan) -> dict[str, tuple[int, str]]:
    """Matrices inside the decoder blocks that stay: leaf name → bytes and reason."""
    left: dict[str, tuple[int, str]] = {}
    for row in plan.parameters:
        shape = plan.checkpoint.tensors[row.name].shape
        is_inside = (
            re.match(r".*\.\d+\.", row.name) and row.reason != "not part of the language model"
        )
        if (
            row.status == "quantized"
            or not is_inside
            or len(shape) < 2
            or min(shape[-2:]) < LEAST_MATRIX
        ):
            continue
        leaf = re.sub(r"\d+", "N", ".".join(row.name.removesuffix(".weight").split(".")[-2:]))
        size, _ = left.get(leaf, (0, ""))
        left[leaf] = (size + row.bytes_before, row.reason)
    return left


def linears_of(model: nn.Module) -> dict[str, int]:
    """Bytes of each matrix and stack of matrices in the decoder blocks of the module tree."""
    name, blocks = decoder_blocks(model)
    return {
        f"{name}.{path}": parameter.nbytes
        for path, parameter in blocks.named_parameters()
        if parameter.dim() >= 2 and min(parameter.shape[-2:]) >= LEAST_MATRIX
    }


def perplexity(model: nn.Module, windows: list[Tensor]) -> float:
    """transformers' own, of the whole model."""
    total, count = 0.0, 0
    without_cache = (
        {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    )
    for tokens in windows:
        with torch.inference_mode():
            logits = model(input_ids=tokens, **without_cache).logits[0].double()
        total += float(nn.functional.cross_entropy(logits[:-1], tokens[0, 1:], reduction="sum"))
        count += tokens.shape[1] - 1
    return math.exp(total / count)


# ---- All of them.


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def sweep(kinds: list[str], verbose: bool) -> list[dict[str, Any]]:
    rows = []
    for kind in kinds:
        with tempfile.TemporaryDirectory() as directory:
            place = Path(directory)
            text = place / "text.txt"
            text.write_text(
                "\n".join(
                    json.loads(line)["text"]
                    for line in BUNDLED_CALIBRATION.read_text().splitlines()[:2]
                )[:4000]
            )
            try:
                with time_limit(SECONDS):
                    row = try_architecture(kind, place, text) | {"group": "works"}
            except Failed as failure:
                row = {
                    "architecture": kind,
                    "group": failure.group,
                    "reason": failure.reason.replace(directory, ""),
                }
                if verbose:
                    traceback.print_exception(failure)
            except TimeoutError as failure:
                row = {"architecture": kind, "group": "quantkit", "reason": str(failure)}
        rows.append(row)
        click.echo(json.dumps(row), err=True)
        gc.collect()
    return rows


# How an architecture ended: the words of the summary, and the heading of its table.
OUTCOMES = {
    "works": ("go through every command", "Architectures that go through every command"),
    "refused": ("are refused by quantkit, in one sentence", "Architectures that are refused"),
    "quantkit": ("make quantkit fail", "Architectures that make quantkit fail"),
    "transformers": (
        (
            "weren't tried, because the script found no small configuration that transformers runs"
            " on a CPU"
        ),
        "Architectures that weren't tried",
    ),
}


def page(rows: list[dict[str, Any]]) -> str:
    counts = {group: sum(row["group"] == group for row in rows) for group in OUTCOMES}
    lines = [
        "# Every causal language model of transformers",
        "",
        (
            f"Made by `benchmarks/sweep.py` with transformers {transformers.__version__}, torch"
            f" {torch.__version__}, quantkit {__version__}; exported in {SCHEME}."
        ),
        (
            f"Of {len(rows)} architectures"
            f" {'; '.join(f'{count} {OUTCOMES[group][0]}' for group, count in counts.items())}."
        ),
        "",
        f"## {OUTCOMES['works'][1]}",
        "",
    ]
    works = [
        {
            "architecture": row["architecture"],
            "Linears quantized": row["quantized"],
            "of them with weights alone": row["weights_only"] or "",
            "that no token reached": row["unread"] or "",
            "mean KL": f"{row['kld']:.1e}",
            "weights skipped in the blocks": "; ".join(
                f"`{name}` ({reason})" for name, reason in row["left"].items()
            ),
        }
        for row in rows
        if row["group"] == "works"
    ]
    lines.append(table(works))
    for group, (_, heading) in OUTCOMES.items():
        others = [
            {"architecture": row["architecture"], "reason": row["reason"]}
            for row in rows
            if row["group"] == group != "works"
        ]
        if others:
            lines += [f"## {heading}", "", table(others)]
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    cells = [
        list(rows[0]),
        ["---"] * len(rows[0]),
        *([str(value).replace("|", "\\|") for value in row.values()] for row in rows),
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


@click.command()
@click.argument("kinds", nargs=-1)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Write the table here.  [default: benchmarks/results/sweep.md where all are swept]",
)
def main(kinds: tuple[str, ...], output: Path | None) -> None:
    """Take each architecture (all that transformers builds as causal language models) through every
    command.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    rows = sweep(list(kinds or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), bool(kinds))
    if output or not kinds:
        (output or RESULTS / "sweep.md").write_text(page(rows))


if __name__ == "__main__":
    main()
