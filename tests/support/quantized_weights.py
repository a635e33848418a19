"""Checkpoints quantized with calibration data, their KL divergence, and a model with outliers, for
the tests of the algorithms.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from quantkit.calibration.calibrate import calibrate
from quantkit.calibration.options import CalibrationOptions
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.metrics import KLD
from quantkit.evaluation.preflight import EvaluationOptions
from quantkit.exporter.plan import ExportOptions, plan_export
from quantkit.exporter.write import export
from quantkit.schemes.recipe import Recipe


def recipe_of(content) -> Recipe:
    return Recipe.from_mapping(content, "recipe")


def quantized(options: CalibrationOptions, name: str = "out") -> Path:
    calibrate(options)
    output = options.output.with_name(name)
    export(plan_export(ExportOptions(options.model, output, options.recipe, options.output)))
    return output


def kld(base: Path, quant: Path, text: Path) -> float:
    result = evaluate(
        EvaluationOptions(base, (quant,), (str(text),), seq_len=64, max_tokens=640, cache=False)
    )
    return result.quants[0].metrics[KLD].mean


def with_outliers(model: Path, down: bool = True) -> Path:
    """Some channels of every norm 256-fold, and the Linears after it as much smaller: the same
    function, to the last bit. down: the same between up and down.
    """
    path = model / "model.safetensors"
    tensors = load_file(path)
    layers = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    for layer in layers:
        prefix = f"model.layers.{layer}"
        scale = torch.ones(tensors[f"{prefix}.input_layernorm.weight"].numel())
        scale[3::32] = 256.0
        for norm, readers in (
            ("input_layernorm", ("q_proj", "k_proj", "v_proj")),
            ("post_attention_layernorm", ("gate_proj", "up_proj")),
        ):
            tensors[f"{prefix}.{norm}.weight"] *= scale
            for name in readers:
                part = "self_attn" if norm == "input_layernorm" else "mlp"
                tensors[f"{prefix}.{part}.{name}.weight"] /= scale
        if down:
            scale = torch.ones(tensors[f"{prefix}.mlp.up_proj.weight"].shape[0])
            scale[5::64] = 256.0
            tensors[f"{prefix}.mlp.up_proj.weight"] *= scale[:, None]
            tensors[f"{prefix}.mlp.down_proj.weight"] /= scale
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        path,
        metadata={"format": "pt"},
    )
    return model
