"""What eval says of single layers: true on weights made for it, and a damaged layer comes first."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.layer_error import worst_first
from quantkit.evaluation.preflight import EvaluationOptions
from quantkit.evaluation.result import ChannelSqnr, LayerError


@pytest.fixture
def layers(llama, text):
    def errors(quant, base=llama):
        """The layers of eval's JSON, by name, worst first."""
        result = evaluate(EvaluationOptions(base, (quant,), (str(text),), 64, 640)).to_json()
        return {row["name"]: row for row in result["quants"][0]["layers"]}

    return errors


def damage(checkpoint, **factors: float):
    """Multiply tensors, given by the end of their name with _ for dots."""
    tensors = load_file(checkpoint / "model.safetensors")
    for name in tensors:
        for end, factor in factors.items():
            if name.replace(".", "_").endswith(end):
                tensors[name] = tensors[name] * factor
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    return checkpoint


@pytest.mark.parametrize(
    "scheme, weight_db, output_db",
    [
        ("int8-dynamic", 35, 30),
        ("fp8-dynamic", 30, 25),
        ("int8-weight-only", 35, 35),
        ("fp8-block", 30, 25),
    ],
)
def test_sound_layers_have_the_formats_noise(scheme, weight_db, output_db, export_to, layers):
    rows = layers(export_to(scheme))
    assert len(rows) == 14
    for row in rows.values():
        assert (
            row["weight_sqnr_db"] > weight_db
            and row["weight_channel_sqnr_db"]["min"] > weight_db - 4
        )
        assert (
            row["output_sqnr_db"] > output_db
            and row["output_channel_sqnr_db"]["min"] <= row["output_channel_sqnr_db"]["median"]
        )
        assert row["weight_clipped"] == 0 and row["weight_underflowed"] < 0.02
        assert ("input_sqnr_db" in row) == ("weight-only" not in scheme)


@pytest.mark.parametrize("scheme", ["int8-dynamic", "fp8-static"])
@pytest.mark.parametrize(
    "tensor", ["layers_1_mlp_up_proj_weight_scale", "layers_0_self_attn_o_proj_weight_scale"]
)
def test_a_wrong_weight_scale_is_ranked_first(scheme, tensor, export_to, layers):
    rows = layers(damage(export_to(scheme), **{tensor: 1.1}))
    first = next(iter(rows.values()))
    assert first["name"].replace(".", "_") in f"model_{tensor}" and first[
        "weight_sqnr_db"
    ] == pytest.approx(20, abs=0.6)


def test_a_wrong_input_scale_is_ranked_first_and_clips(export_to, layers):
    name = "model.layers.1.mlp.down_proj"
    rows = layers(damage(export_to("int8-static"), layers_1_mlp_down_proj_input_scale=0.1))
    first = next(iter(rows.values()))
    assert (
        first["name"] == name
        and first["input_clipped"] > 0.01
        and first["weight_sqnr_db"] > 35
        and first["output_sqnr_db"] < 20
    )


def test_one_damaged_channel_shows_in_the_worst_channel_alone(export_to, layers):
    out, name = export_to("int8-dynamic"), "model.layers.0.mlp.gate_proj"
    tensors = load_file(out / "model.safetensors")
    tensors[f"{name}.weight_scale"][7] *= 2
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    row = layers(out)[name]
    assert (
        row["weight_channel_sqnr_db"]["min"] == pytest.approx(0, abs=0.1)
        and row["weight_channel_sqnr_db"]["median"] > 35
    )


def test_clipped_and_underflowing_shares_are_counted(export_to, layers):
    name = "model.layers.0.mlp.gate_proj"
    too_small = layers(damage(export_to("int8-dynamic"), layers_0_mlp_gate_proj_weight_scale=0.5))[
        name
    ]
    # Codes of a scale that doesn't fit were never made: half of the true scale means that the
    # larger half of each row's range lies beyond 127.5 steps.
    assert 0 < too_small["weight_clipped"] < 0.5


def test_weights_of_a_fp8_block_base_are_compared_dequantized(export_to, layers, llama):
    base = export_to("fp8-block", name="deepseek", file_format="fp8")
    rows = layers(export_to("int8-dynamic", base), base)
    assert len(rows) == 14 and all(row["weight_sqnr_db"] > 35 for row in rows.values())


def error(name: str, weight: float, output: float | None = None) -> LayerError:
    channels = ChannelSqnr(weight, weight)
    return LayerError(
        name=name,
        weight_sqnr_db=weight,
        weight_channel_sqnr_db=channels,
        weight_clipped=0.0,
        weight_underflowed=0.0,
        output_sqnr_db=output,
    )


def test_ranking_measures_weight_and_output_each_by_its_own_spread():
    rows = [error(str(number), 40.0 + 0.1 * number, 20.0 + 2 * number) for number in range(10)]
    assert worst_first(rows)[0].name == "0"
    # 16 dB above the worst output, and still what is wrong here
    rows[6] = replace(rows[6], weight_sqnr_db=34.0)
    assert worst_first(rows)[0].name == "6"
    rows[8] = replace(rows[8], output_sqnr_db=-40.0, weight_sqnr_db=math.inf)
    assert [row.name for row in worst_first(rows)[:2]] == ["8", "6"]
    assert worst_first([]) == [] and worst_first([error("a", math.inf)])[0].name == "a"


def test_a_model_that_is_not_quantized_has_no_layers(llama, layers):
    assert layers(llama) == {}


def test_output_figures_are_those_of_the_layer_alone(export_to, llama, text):
    """The first layer's input is the same in base and candidate, so its output can be made here
    from the files.
    """
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.data.protocols import evaluation_windows
    from quantkit.data.tokenizer import load_tokenizer
    from quantkit.evaluation.final_hidden_states import make_final_hidden_states
    from quantkit.evaluation.layer_error import LayerProbe
    from quantkit.evaluation.quantized_model import load_quantized_model

    out, name = export_to("int8-weight-only"), "model.layers.0.self_attn.q_proj"
    windows = dict(
        enumerate(evaluation_windows([str(text)], load_tokenizer(llama), "gptq", 64, 256).windows)
    )
    quantized = load_quantized_model(out, "cpu", exec="reference")
    probe = LayerProbe(quantized, Checkpoint.open(llama), list(windows))
    with torch.inference_mode():
        make_final_hidden_states(quantized, windows, 64, watch=probe.watch).close()
        row = next(row for row in probe.finish() if row.name == name)
        base, codes = load_file(llama / "model.safetensors"), load_file(out / "model.safetensors")
        places = torch.linspace(0, 63, 32).long()
        tokens = torch.tensor(
            [[window.tokens[place] for place in places] for window in windows.values()]
        ).flatten()
        hidden = base["model.embed_tokens.weight"][tokens].float()
        norm = (
            hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
        ).bfloat16() * base["model.layers.0.input_layernorm.weight"]
        packed = codes.get(f"{name}.weight_packed")
        assert packed is not None
        expected = norm.float() @ base[f"{name}.weight"].float().T
        from quantkit.ops.packing import unpack_codes
        from quantkit.schemes.number_formats import INT8

        values = (
            unpack_codes(packed, INT8)[: expected.shape[1], : norm.shape[1]].float()
            * codes[f"{name}.weight_scale"].float()
        )
        noise = expected - (norm.float() @ values.T).bfloat16().float()
    assert row.output_sqnr_db == pytest.approx(
        float(10 * torch.log10(expected.square().sum() / noise.square().sum())), abs=0.05
    )
