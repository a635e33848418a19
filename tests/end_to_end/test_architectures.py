"""Every architecture through every command: calibrated once, exported in several schemes, verified,
judged, and read back as the file says.

What a file says is found here without quantkit's loaders: its codes are dequantized by the formats'
own definition into an ordinary checkpoint, which transformers loads and runs as a whole.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from architecture_kinds import (
    KINDS,
    MORE_SCHEMES,
    NOT_ASKED,
    OPTIONS,
    PACKED_MODULES,
    SCHEMES,
    SERVED,
    TRANSFORMERS,
    of_kinds,
    parameters,
)
from safetensors.torch import load_file, save_file
from tiny_llama import make_text, make_tokenizer
from tiny_models import MASKED, MULTIMODAL, TARGET, make_model, whole_model
from transformers import AutoConfig

from quantkit.calibration.calibrate import calibrate
from quantkit.calibration.options import CalibrationOptions
from quantkit.calibration.reader import Calibration
from quantkit.checkpoint.formats import read_quantization_config
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import RuntimeLimitError
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.preflight import EvaluationOptions
from quantkit.evaluation.quantized_model import load_quantized_model
from quantkit.exporter.plan import ExportOptions, plan_export
from quantkit.exporter.runtimes import not_found_by_transformers, runtime_problems
from quantkit.exporter.verify import verify
from quantkit.exporter.write import export
from quantkit.models.skeleton import auto_class
from quantkit.models.tensor_roles import fused_layers
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import QuantScheme

TOKENS = torch.randint(2, 300, (1, 24), generator=torch.Generator().manual_seed(2))


def test_what_vllm_serves_it_serves_as_the_file_says():
    """Its probabilities are nearer to quantkit's of the file than to the unquantized model's, and
    than a fourth of what wrong scales of one Linear would change.
    """
    rows = json.loads(SERVED.read_text())["rows"]
    assert {row["architecture"] for row in rows} == set(KINDS) - set(NOT_ASKED)
    for row in [row for row in rows if row["served"]]:
        is_near = row["agreement"] < min(row["quantization"], row["least_spoilt"] / 4)
        assert is_near == (row["verdict"] == "agrees") and row["verdict"] != "differs", (
            row["architecture"],
            row["scheme"],
        )


@dataclass(frozen=True)
class Tiny:
    """A tiny model of one architecture, its calibration, and its text."""

    kind: str
    model: Path
    calibration: Path
    text: Path

    def schemes(self) -> tuple[str, ...]:
        return (*SCHEMES, *MORE_SCHEMES.get(self.kind, ()))

    def plan(self, scheme: str, **options):
        recipe = Recipe(QuantScheme.parse(scheme))
        calibration = self.calibration if recipe.needs_calibration else None
        return plan_export(
            ExportOptions(
                self.model,
                self.model.parent / scheme,
                recipe,
                calibration,
                **OPTIONS.get(self.kind, {}),
                **options,
            )
        )

    def exported(self, scheme: str) -> Path:
        plan = self.plan(scheme)
        if not plan.options.output.exists():
            export(plan)
        return plan.options.output


@pytest.fixture(scope="module", params=parameters(KINDS))
def tiny(request, tmp_path_factory):
    place = tmp_path_factory.mktemp(request.param)
    vocabulary = make_tokenizer(place / "model", mask=request.param in MASKED)
    make_model(place / "model", request.param, torch.float32, vocab_size=vocabulary)
    (place / "text.txt").write_text(make_text(500, seed=3))
    calibrate(
        CalibrationOptions(
            place / "model", place / "calib", (str(place / "text.txt"),), num_samples=4, seq_len=32
        )
    )
    return Tiny(request.param, place / "model", place / "calib", place / "text.txt")


def test_every_byte_is_accounted_for(tiny):
    """Each parameter is in one row, and the rows' bytes are those of the files before and after."""
    tensors = load_file(tiny.model / "model.safetensors")
    for scheme in tiny.schemes():
        plan = tiny.plan(scheme)
        assert sum(row.bytes_before for row in plan.parameters) == sum(
            tensor.nbytes for tensor in tensors.values()
        )
        assert sum(row.bytes_after for row in plan.parameters) == sum(
            tensor.nbytes
            for tensor in load_file(tiny.exported(scheme) / "model.safetensors").values()
        )
        assert len({row.name for row in plan.parameters}) == len(plan.parameters)
        for row in plan.parameters:
            assert row.status in ("quantized", "left", "unreached") and row.reason
            assert (row.status == "quantized") == (row.scheme is not None)
        assert any(row.status == "unreached" for row in plan.parameters) == (tiny.kind in OPTIONS)


def test_all_matrices_of_the_blocks_are_quantized(tiny):
    """No layer is lost: of the decoder blocks' parameters, those that stay are small, except where
    a reason was agreed on above.
    """
    plan = tiny.plan("fp8-dynamic")
    inside = [
        row
        for row in plan.parameters
        if row.reason not in ("outside the decoder blocks", "not part of the language model")
    ]
    stays = sum(
        row.bytes_before
        for row in inside
        if row.status == "left" and "skipped by rule" not in row.reason
    )
    assert stays < 0.15 * sum(row.bytes_before for row in inside if row.status == "quantized")


def test_what_is_quantized_is_called_as_a_linear(tiny):
    """And of what is left as used directly, Mamba's step size is not: a forward pass agrees with
    the names that `export` goes by.
    """
    measured = Calibration.open(tiny.calibration).inputs
    called = {name for name, entry in measured.items() if entry.tokens or entry.is_estimated}
    plan = tiny.plan("fp8-dynamic")
    assert set(plan.linears) <= called
    step_sizes = {
        row.name.removesuffix(".weight")
        for row in plan.parameters
        if row.name.endswith(".dt_proj.weight")
    }
    assert not step_sizes & called and bool(step_sizes) == (tiny.kind == "mamba")


def test_exports_are_sound_and_judged(tiny):
    outputs = [tiny.exported(scheme) for scheme in tiny.schemes()]
    for output in outputs:
        assert verify(output, tiny.model).faults == ()
    result = evaluate(
        EvaluationOptions(tiny.model, tuple(outputs), (str(tiny.text),), 24, 240, cache=False)
    ).to_json()
    for quant, scheme in zip(result["quants"], tiny.schemes()):
        assert 0 < quant["kld"]["mean"] < 0.05
        assert quant["activations_quantized"] == (scheme != "int8-weight-only")
        assert len(quant["layers"]) == quant["linears_quantized"]


def inputs_of(tiny: Tiny) -> dict[str, torch.Tensor]:
    return (
        {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, 3:]}
        if tiny.kind in TARGET
        else {"input_ids": TOKENS}
    )


def dense_checkpoint(out: Path, model: Path, target: Path) -> Path:
    """The base's files with each weight replaced by what its codes stand for, under the names and
    in the shapes that the base has.
    """
    found, tensors = load_file(out / "model.safetensors"), {}
    for name, original in load_file(model / "model.safetensors").items():
        if name in found and found[name].dtype == original.dtype:
            tensors[name] = found[name]
        elif name.removesuffix(".weight") + ".weight_scale" in found:
            scale, codes = (
                found[name.removesuffix(".weight") + ".weight_scale"],
                found[name].float(),
            )
            # GPT-2's codes lie as its weights do, their scales are those of output channels.
            upright = codes.shape[0] == scale.shape[0] and (
                codes.shape[0] != codes.shape[1] or "c_" not in name
            )
            tensors[name] = codes * scale if upright else codes * scale.T
        else:
            tensors[name] = stacked(name, original, found)
    target.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        target / "model.safetensors",
        {"format": "pt"},
    )
    (target / "config.json").write_text((model / "config.json").read_text())
    return target


def stacked(name: str, original: torch.Tensor, found: dict[str, torch.Tensor]) -> torch.Tensor:
    """Experts that lie one by one, as the base had them: gate above up, or all turned."""
    parent, _, leaf = name.removesuffix(".weight").rpartition(".")
    module = parent if parent.endswith("experts") else f"{parent}.experts"
    leaves = (
        ("gate_proj", "up_proj") if leaf in ("gate_up_proj", "input_linear") else ("down_proj",)
    )
    parts = [[f"{module}.{expert}.{leaf}" for leaf in leaves] for expert in range(len(original))]
    upright = torch.stack(
        [
            torch.cat(
                [found[f"{part}.weight"].float() * found[f"{part}.weight_scale"] for part in each]
            )
            for each in parts
        ]
    )
    return upright if upright.shape == original.shape else upright.mT


def test_what_runs_is_what_the_file_says(tiny, tmp_path):
    """Weights alone, so that both sides compute in float32: names, transposes, stacks and biases
    all arrive where they belong.
    """
    out = tiny.exported("fp8-dynamic")
    dense = dense_checkpoint(out, tiny.model, tmp_path / "dense")
    reference = (
        auto_class(AutoConfig.from_pretrained(dense))
        .from_pretrained(dense, dtype=torch.float32, experts_implementation="eager")
        .eval()
    )
    ours = whole_model(load_quantized_model(out, "cpu", hardware="ampere", exec="reference"))
    with torch.inference_mode():
        expected, found = reference(**inputs_of(tiny)).logits, ours(**inputs_of(tiny)).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_the_table_says_what_transformers_cannot_load(tiny):
    plan = tiny.plan("fp8-dynamic")
    has_experts = any(".experts." in name for name in plan.linears) or tiny.kind in OPTIONS
    assert has_experts == ("experts" in TRANSFORMERS.get(tiny.kind, ""))
    assert bool(runtime_problems("transformers", plan.linears.values(), plan.skipped)) == (
        "refused" in TRANSFORMERS.get(tiny.kind, "")
    )
    loses = "random" in TRANSFORMERS.get(tiny.kind, "")
    assert (
        bool(not_found_by_transformers(Checkpoint.open(tiny.exported("fp8-dynamic")), plan.linears))
        == loses
    )
    if loses:
        with pytest.raises(RuntimeLimitError, match="random weights"):
            tiny.plan("fp8-dynamic", runtime="transformers")
        faults = [
            fault
            for _, fault in verify(tiny.exported("fp8-dynamic"), runtime="transformers").faults
        ]
        assert len(faults) == 1 and "random weights" in faults[0]


@of_kinds(*(kind for kind in KINDS if kind not in TRANSFORMERS))
def test_transformers_loads_the_rest(tiny):
    out = tiny.exported("fp8-dynamic")
    theirs = (
        auto_class(AutoConfig.from_pretrained(out)).from_pretrained(out, dtype=torch.float32).eval()
    )
    ours = whole_model(load_quantized_model(out, "cpu", exec="reference"))
    with torch.inference_mode():
        first, second = theirs(**inputs_of(tiny)).logits, ours(**inputs_of(tiny)).logits
    distances = (first - second).norm(dim=-1) / second.norm(dim=-1)
    # A value that lies on the edge of two codes may tip, and what attends to it differs from there
    # on.
    assert distances.median() < 1e-3 and distances.max() < 0.1


@of_kinds(*(kind for kind in KINDS if kind in PACKED_MODULES))
def test_fused_sets_are_those_that_vllm_merges(tiny):
    """What vLLM merges in this architecture shares a scale here, and nothing else does but the two
    inputs of an expert.
    """
    declared = PACKED_MODULES[tiny.kind]
    names = tiny.plan("fp8-dynamic").linears
    merged = {
        tuple(f"{parent}.{member}" for member in members)
        for members in declared.values()
        for parent in {name.rpartition(".")[0] for name in names}
        if all(f"{parent}.{member}" in names for member in members)
    }
    ours = set(fused_layers(names))
    assert merged <= ours
    assert {tuple(name.rpartition(".")[2] for name in members) for members in ours - merged} <= {
        ("gate_proj", "up_proj"),
        ("w1", "w3"),
    }


@of_kinds("gpt_oss", "granitemoe")
def test_experts_that_stay_are_ignored_by_the_configuration(tiny):
    """Runtimes would look for the scales of a layer's experts, which are a module of theirs under
    any name on disk.
    """
    recipe = Recipe(QuantScheme.parse("fp8-dynamic")).with_options(
        ("*.input_linear", "*.output_linear") if tiny.kind == "granitemoe" else (), None, None
    )
    plan = plan_export(
        ExportOptions(tiny.model, tiny.model.parent / "left", recipe, **OPTIONS.get(tiny.kind, {}))
    )
    assert [row.bytes_before for row in plan.parameters] and not any(
        "experts." in name for name in plan.linears
    )
    module = "mlp" if tiny.kind == "gpt_oss" else "block_sparse_moe"
    assert rf"re:model\.layers\.1\.{module}\.experts\..*" in plan.skipped


@of_kinds(*MULTIMODAL)
def test_multimodal_models_say_that_their_other_towers_stay(tiny):
    rows = {row.name: row for row in tiny.plan("fp8-dynamic").parameters}
    towers = [row for name, row in rows.items() if "vision" in name]
    assert towers and all(
        row.status == "left" and row.reason == "not part of the language model" for row in towers
    )
    ignored = json.loads((tiny.exported("fp8-dynamic") / "config.json").read_text())[
        "quantization_config"
    ]["ignore"]
    assert any("vision" in name for name in ignored)


@of_kinds("gemma3n_text", "llama")
def test_linears_beside_the_blocks_are_ignored_wherever_a_runtime_has_them(tiny):
    """vLLM has Gemma 3n's projections in a module of its own; as quantized ones they would give
    NaN.
    """
    config = json.loads((tiny.exported("fp8-dynamic") / "config.json").read_text())
    quantization = read_quantization_config(config)
    assert [
        entry for entry in config["quantization_config"]["ignore"] if entry.startswith("re:")
    ] == tiny.plan("fp8-dynamic").skipped_elsewhere
    if tiny.kind == "gemma3n_text":
        for name in (
            "altup_projections.0",
            "altup_unembed_projections.2",
            "per_layer_model_projection",
        ):
            assert (
                quantization.scheme_of(f"model.{name}")
                is quantization.scheme_of(f"model.self_decoder.{name}")
                is None
            )
    assert quantization.scheme_of("model.layers.0.mlp.up_proj") is not None
