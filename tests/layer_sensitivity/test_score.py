"""Which layer groups cost most, and the recipe for a budget."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import make_llama, make_tokenizer
from tiny_models import HANDING_ON, SHARING_BLOCKS, make_model

from quantkit.checkpoint.reader import Checkpoint
from quantkit.data.windows import Window
from quantkit.errors import CheckpointError, EvaluationError
from quantkit.exporter.plan import ExportOptions, ExportPlan, plan_export
from quantkit.exporter.write import export
from quantkit.layer_sensitivity.advice import (
    checkpoint_bytes,
    predicted_kld,
    read_earlier_result,
    solve_again,
)
from quantkit.layer_sensitivity.base_model import BaseModel, open_base_model
from quantkit.layer_sensitivity.choices import RECIPE, Choices
from quantkit.layer_sensitivity.layer_groups import LayerGroup, layer_groups
from quantkit.layer_sensitivity.layer_swap import LayerSwapper
from quantkit.layer_sensitivity.options import KEEP, SensitivityOptions
from quantkit.layer_sensitivity.passes import open_layer_groups
from quantkit.layer_sensitivity.score import score_sensitivity
from quantkit.layer_sensitivity.streams import Streams, count_block_runs
from quantkit.layer_sensitivity.variants import VariantStates, run_variants
from quantkit.models.tensor_roles import fused_layers
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import QuantScheme

INT8 = Recipe(QuantScheme.parse("int8-dynamic"))
BLOCKS, GROUPS = 3, 12
BAD = "model.layers.1.mlp.down_proj"


def make_planted(directory, dtype=torch.bfloat16):
    """A tiny Llama that is sure of its guesses; a channel of block 1's up projection is scaled up,
    and down's weights for it down: the same function, with outliers.
    """
    make_llama(directory, num_hidden_layers=BLOCKS, dtype=dtype)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] *= 8
    tensors["model.layers.1.mlp.up_proj.weight"][7] *= 2.0**10
    tensors[f"{BAD}.weight"][:, 7] /= 2.0**10
    save_file(tensors, path, {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return make_planted(tmp_path_factory.mktemp("sensitivity") / "planted")


@pytest.fixture(scope="module")
def options(planted, _text_master):
    return SensitivityOptions(
        planted,
        INT8,
        ("keep", "fp8-dynamic"),
        data=(str(_text_master),),
        max_tokens=256,
        seq_len=64,
        max_size="+10%",
    )


@pytest.fixture(scope="module")
def result(options):
    return score_sensitivity(options)


# ---- Scoring.


def test_a_planted_bad_layer_is_ranked_first_and_its_restoring_helps_most(result):
    groups, worst = result.scores.groups, result.ranking[0]
    assert worst.name == BAD and worst.kind == "down"
    gains = {group.name: group.restored.gain for group in groups if group.restored is not None}
    assert len(gains) == 10 and max(gains, key=gains.get) == BAD
    # FP8 minds outliers less
    assert worst.choices["fp8-dynamic"].own_kld < worst.choices[RECIPE].own_kld / 4
    outputs = {layer.name: layer.output_sqnr_db for group in groups for layer in group.layers}
    assert min(outputs, key=outputs.get) == BAD and len(outputs) == 7 * BLOCKS


def test_layer_groups_are_what_runtimes_merge_and_each_linear_is_in_one(result, planted):
    groups = result.scores.groups
    assert len(groups) == GROUPS
    assert [group.kind for group in groups[:4]] == ["q+k+v", "o", "gate+up", "down"]
    names = [name for group in groups for name in group.linears]
    assert len(names) == len(set(names)) == 7 * BLOCKS
    assert groups[0].name == "model.layers.0.self_attn.{q,k,v}_proj"
    experts = [
        f"model.layers.0.mlp.experts.{number}.{leaf}"
        for number in range(3)
        for leaf in ("gate_proj", "up_proj", "down_proj")
    ]
    shared = [f"model.layers.0.mlp.shared_expert.{leaf}" for leaf in ("gate_proj", "up_proj")]
    found = layer_groups([[*experts, *shared]])
    assert [(each.kind, len(each.linears)) for each in found] == [("gate+up", 2), ("experts", 9)]
    assert found[1].name == "model.layers.0.mlp.experts"


def test_a_scheme_that_changes_nothing_costs_nothing(tmp_path, text):
    model = make_llama(tmp_path / "exact", dtype=torch.float32)
    path = model / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if "_proj" in name]:
        # Whole numbers times a power of two, the largest in each row: INT8 codes hold them exactly.
        tensors[name] = (tensors[name] * 100).round().clamp(-126, 126)
        tensors[name][:, 0] = 127
        tensors[name] /= 2.0**12
    save_file(tensors, path, {"format": "pt"})
    found = score_sensitivity(
        SensitivityOptions(
            model,
            Recipe(QuantScheme.parse("int8-weight-only")),
            data=(str(text),),
            max_tokens=128,
            seq_len=64,
        )
    )
    scores = found.scores
    assert all(group.choices[RECIPE].metrics.kld == 0 for group in scores.groups)
    assert scores.whole[RECIPE].kld == 0 and scores.additivity[RECIPE].sum == 0


@pytest.mark.parametrize("kind", ["qwen3_moe", "llama4_text"])
def test_a_layers_experts_are_scored_as_one_group(kind, tmp_path, text):
    """Whether they are stored one by one or stacked."""
    model = tmp_path / "model"
    make_model(model, kind, vocab_size=make_tokenizer(model))
    found = score_sensitivity(
        SensitivityOptions(model, INT8, data=(str(text),), max_tokens=64, seq_len=32)
    )
    groups = found.scores.groups
    experts = [group for group in groups if group.kind == "experts"]
    assert [len(group.linears) for group in experts] == [4 * 3] * 2
    assert all(group.choices[RECIPE].metrics.kld > 0 for group in experts)
    assert sum(group.choices[RECIPE].bytes for group in groups) < 0.6 * sum(
        group.choices[KEEP].bytes for group in groups
    )


def test_sums_and_sizes_are_those_of_their_parts(result):
    nothing, everything, scores = [KEEP] * GROUPS, [RECIPE] * GROUPS, result.scores
    assert predicted_kld(scores, nothing) == 0
    assert checkpoint_bytes(scores, nothing) == scores.bytes.all_kept == result.model.bytes
    assert checkpoint_bytes(scores, everything) == scores.bytes.all_quantized
    found = scores.additivity[RECIPE]
    assert found.sum == pytest.approx(
        sum(group.choices[RECIPE].own_kld for group in scores.groups), rel=1e-12
    )
    assert predicted_kld(scores, everything) == pytest.approx(
        found.whole + scores.noise_floor.values[0]
    )
    for line in result.pareto:
        kld = [point.kld_predicted for point in line.points]
        assert len(kld) == GROUPS + 1 and (kld == sorted(kld, reverse=True) or line.to != KEEP)
        assert line.points[0].measured.kld == pytest.approx(scores.whole[RECIPE].kld, rel=1e-9)
    everything_kept = next(line for line in result.pareto if line.to == KEEP).points[-1]
    assert everything_kept.bytes == scores.bytes.all_kept


@pytest.mark.slow
def test_the_same_run_gives_the_same_result(options, result):
    again, first = score_sensitivity(options).to_json(), result.to_json()
    for key in ("sets", "whole", "floor", "pareto", "solution"):
        assert json.dumps(again[key]) == json.dumps(first[key]), key


# ---- Variants that share what they can.


def run_groups(
    plan: ExportPlan, groups: Sequence[LayerGroup], batches, variants
) -> tuple[VariantStates, BaseModel]:
    """Variants of a model that is opened for them."""
    base = open_base_model(plan, False, "cpu")
    swapper = LayerSwapper(base, Choices(plan), groups)
    block_of = [group.block for group in groups]
    numbered = dict(enumerate(batches))
    return run_variants(base.blocks, numbered, variants, block_of, swapper.swaps), base


@pytest.mark.parametrize("memory", [None, 0])
def test_variants_that_share_a_prefix_equal_separate_runs(planted, memory, monkeypatch):
    if memory == 0:
        monkeypatch.setattr("quantkit.models.hidden_states.available_memory", lambda: 0)
    plan = plan_export(ExportOptions(planted, planted.with_name("none"), INT8))
    groups = open_layer_groups(Choices(plan), False, "cpu").groups
    generator = np.random.default_rng(0)
    variants = [
        tuple([0] * GROUPS),
        *(
            tuple(
                int(bit)
                for bit in generator.integers(0, 2, GROUPS) * (generator.random(GROUPS) < 0.4)
            )
            for _ in range(6)
        ),
    ]
    batches = [torch.randint(0, 300, (1, 24)), torch.randint(0, 300, (1, 17))]
    with torch.inference_mode():
        states, _ = run_groups(plan, groups, batches, variants)
        shared = [
            [states.get(number, window).clone() for window in range(2)]
            for number in range(len(variants))
        ]
        block_of = [group.block for group in groups]
        runs = Streams(variants, block_of, BLOCKS).total_runs
        assert runs == count_block_runs(variants, block_of, BLOCKS) < BLOCKS * len(variants)
        states.close()
        for variant, found in zip(variants, shared):
            alone, _ = run_groups(plan, groups, batches, [variant])
            assert all(torch.equal(ours, alone.get(0, window)) for window, ours in enumerate(found))
            alone.close()


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        ("llama", "int8-dynamic"),
        ("qwen3_moe", "fp8-dynamic"),
        ("llama", "fp8-tensor"),
        ("granitemoe", "int8-dynamic"),
        ("qwen3_5_moe_text", "fp8-dynamic"),
        ("llama4_text", "fp8-tensor"),
    ],
)
def test_a_variant_computes_what_the_exported_checkpoint_serves(kind, scheme, tmp_path, text):
    from quantkit.calibration.calibrate import calibrate
    from quantkit.calibration.options import CalibrationOptions
    from quantkit.evaluation.final_hidden_states import make_final_hidden_states
    from quantkit.evaluation.quantized_model import load_quantized_model

    model = tmp_path / "model"
    make_model(model, kind, vocab_size=384)
    make_tokenizer(model)
    recipe, calib = Recipe(QuantScheme.parse(scheme)), None
    if recipe.needs_calibration:
        calib = tmp_path / "calib"
        calibrate(CalibrationOptions(model, calib, (str(text),), num_samples=4, seq_len=32))
    plan = plan_export(ExportOptions(model, tmp_path / "out", recipe, calib))
    export(plan)
    groups = open_layer_groups(Choices(plan), False, "cpu").groups
    assert ("experts" in {group.kind for group in groups}) == (kind != "llama")
    assert {name for group in groups for name in group.linears} == set(plan.linears)
    window = Window(tuple(range(2, 40)))
    with torch.inference_mode():
        states, _ = run_groups(
            plan, groups, [torch.tensor([window.tokens])], [tuple([1] * len(groups))]
        )
        expected = make_final_hidden_states(
            load_quantized_model(tmp_path / "out", "cpu"), {0: window}, len(window.tokens)
        )
        assert torch.equal(states.get(0, 0)[0], expected.states.get(0)[0])
    states.close(), expected.close()


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("glm_moe_dsa", HANDING_ON["glm_moe_dsa"], "side outputs that later blocks read"),
        ("zamba2", SHARING_BLOCKS, "runs the weights of .* again in"),
        ("rwkv", {}, None),
    ],
)
def test_blocks_that_depend_on_each_other_are_refused(kind, settings, message, tmp_path, text):
    """Not RWKV's, whose side output is the state that they were given: none."""
    make_model(tmp_path / "model", kind, vocab_size=make_tokenizer(tmp_path / "model"), **settings)
    options = SensitivityOptions(
        tmp_path / "model", INT8, ("keep",), data=(str(text),), max_tokens=64, seq_len=32
    )
    with pytest.raises(CheckpointError, match=message) if message else nullcontext():
        assert score_sensitivity(options).scores.groups


# ---- Weights that algorithms chose.


@pytest.mark.slow
def test_a_calibration_with_chosen_weights_is_scored_as_chosen(planted, text, tmp_path):
    from quantkit.calibration.calibrate import calibrate
    from quantkit.calibration.options import CalibrationOptions

    recipe = Recipe.from_mapping(
        {"scheme": "int8-dynamic", "algorithms": ["smoothquant", "gptq"]}, "test"
    )
    calibrate(
        CalibrationOptions(planted, tmp_path / "c", (str(text),), recipe, num_samples=4, seq_len=64)
    )
    arguments = {"data": (str(text),), "max_tokens": 256, "seq_len": 64}
    chosen = score_sensitivity(
        SensitivityOptions(planted, recipe, calibration=tmp_path / "c", **arguments)
    )
    rounded = score_sensitivity(SensitivityOptions(planted, recipe, **arguments))
    assert "rounded to nearest" in rounded.remarks[0] and not any(
        "rounded to nearest" in remark for remark in chosen.remarks
    )
    assert chosen.scores.whole[RECIPE].kld < rounded.scores.whole[RECIPE].kld / 4


def rotated_recipe(rotation, *others) -> Recipe:
    return Recipe.from_mapping(
        {"scheme": "int8-dynamic", "algorithms": [{"rotation": rotation}, *others]}, "test"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        (rotated_recipe({"untie": True}), {"tie": True, "attention_bias": True}),
        (
            rotated_recipe({"untie": True}, "smoothquant", "gptq"),
            {"num_attention_heads": 4, "num_key_value_heads": 2},
        ),
        (
            rotated_recipe({"residual": False}, "gptq"),
            {"tie": True, "num_attention_heads": 4, "num_key_value_heads": 2},
        ),
    ],
    ids=["untied", "with others", "heads alone"],
)
def test_a_rotated_calibration_is_scored_as_its_export_is_served(recipe, changes, tmp_path, text):
    """All groups quantized are the exported checkpoint, to the last bit; none quantized is the
    original model, up to what rotated weights lose in bfloat16.
    """
    from quantkit.calibration.calibrate import calibrate
    from quantkit.calibration.options import CalibrationOptions
    from quantkit.evaluation.final_hidden_states import make_final_hidden_states
    from quantkit.evaluation.quantized_model import load_quantized_model

    model, calib = make_llama(tmp_path / "model", **changes), tmp_path / "calib"
    calibrate(
        CalibrationOptions(model, calib, (str(text),), recipe, num_samples=4, seq_len=32, seed=3)
    )
    plan = plan_export(ExportOptions(model, tmp_path / "out", recipe, calib))
    export(plan)
    base = open_base_model(plan, False, "cpu")
    groups = layer_groups([base.linears_of(block) for block in range(base.blocks.block_count)])
    window = Window(tuple(range(2, 40)))
    tokens = torch.tensor([window.tokens])
    variants = [tuple([0] * len(groups)), tuple([1] * len(groups))]
    with torch.inference_mode():
        states, base = run_groups(plan, groups, [tokens], variants)
        expected = make_final_hidden_states(
            load_quantized_model(tmp_path / "out", "cpu"), {0: window}, len(window.tokens)
        )
        assert torch.equal(states.get(1, 0)[0], expected.states.get(0)[0])
        original = make_final_hidden_states(
            load_quantized_model(model, "cpu"), {0: window}, len(window.tokens)
        )
        original_head = load_quantized_model(model, "cpu").blocks
        original_head.load_outer(with_head=True)
        before, after = (
            head.lm_head.weight.float() @ hidden.float().T
            for head, hidden in (
                (original_head.model, original.states.get(0)[0]),
                (base.blocks.model, states.get(0, 0)[0]),
            )
        )
        quantized = base.blocks.model.lm_head.weight.float() @ states.get(1, 0)[0].float().T
        assert float((after - before).norm()) < min(
            0.02 * float(before.norm()), 0.8 * float((quantized - before).norm())
        )
    states.close(), expected.close(), original.close()


@pytest.mark.slow
def test_a_budget_of_a_rotated_model_counts_what_was_untied(tmp_path, text, run, run_json):
    from quantkit.calibration.calibrate import calibrate
    from quantkit.calibration.options import CalibrationOptions

    model, recipe, mixed = (
        make_llama(tmp_path / "model", tie=True),
        tmp_path / "r.yaml",
        tmp_path / "mixed.yaml",
    )
    recipe.write_text(json.dumps(rotated_recipe({"untie": True}).to_mapping()))
    calibrate(
        CalibrationOptions(
            model, tmp_path / "calib", (str(text),), Recipe.load(recipe), num_samples=4, seq_len=32
        )
    )
    scoring = (
        "--data",
        text,
        "--max-tokens",
        128,
        "--seq-len",
        64,
        "--max-size",
        "+10%",
        "--recipe-out",
        mixed,
    )
    result = run_json(
        "sensitivity", model, "--recipe", recipe, "--calibration", tmp_path / "calib", *scoring
    )
    assert (
        result["solution"]["moved"] > 0
        and result["bytes"]["untied"]
        == Checkpoint.open(model).tensors["model.embed_tokens.weight"].nbytes
    )
    calibrate(
        CalibrationOptions(
            model, tmp_path / "again", (str(text),), Recipe.load(mixed), num_samples=4, seq_len=32
        )
    )
    planned = run_json(
        "export",
        model,
        "-o",
        tmp_path / "out",
        "--recipe",
        mixed,
        "--calibration",
        tmp_path / "again",
        "--dry-run",
    )
    assert planned["bytes_after"] == result["solution"]["bytes"]


# ---- Budgets and recipes.


@pytest.mark.slow
def test_the_recipe_is_taken_by_export_has_the_size_promised_and_splits_no_fused_layers(
    run, run_json, planted, text, tmp_path
):
    recipe, stored = tmp_path / "mixed.yaml", tmp_path / "r.json"
    scoring = (
        "--data",
        text,
        "--max-tokens",
        256,
        "--seq-len",
        64,
        "--alternative",
        "keep",
        "--alternative",
        "fp8-dynamic",
    )
    done = run(
        "sensitivity",
        planted,
        "--scheme",
        "int8-dynamic",
        *scoring,
        "--max-size",
        "+10%",
        "--recipe-out",
        recipe,
        "-o",
        stored,
    )
    assert done.exit_code == 0, done.output
    assert (
        BAD in done.stdout and "KL predicted" in done.stdout and f"--recipe {recipe}" in done.stderr
    )
    solution = json.loads(stored.read_text())["solution"]
    assert (
        solution["bytes"] <= solution["max_size_bytes"]
        and "measured" in solution
        and solution["moved"] > 0
    )
    printed = run_json("export", planted, "-o", tmp_path / "out", "--recipe", recipe, "--dry-run")
    assert printed["bytes_after"] == solution["bytes"]
    schemes = {
        row["name"].removesuffix(".weight"): row["scheme"]
        for row in printed["parameters"]
        if "_proj" in row["name"]
    }
    assert all(
        len({schemes[member] for member in members}) == 1 for members in fused_layers(schemes)
    )
    assert schemes[BAD] != "int8-dynamic"

    exported = run(
        "export", planted, "-o", tmp_path / "out", "--recipe", recipe, "--runtime", "vllm"
    )
    assert exported.exit_code == 0, exported.output


def test_another_budget_is_solved_without_running_anything(
    run, result, planted, tmp_path, monkeypatch
):
    stored, recipe = tmp_path / "r.json", tmp_path / "m.yaml"
    stored.write_text(json.dumps(result.to_json()))
    max_kld = result.scores.whole[RECIPE].kld / 3
    monkeypatch.setattr(
        "quantkit.layer_sensitivity.variants.run_variants",
        lambda *_: pytest.fail("a model was run"),
    )
    done = run(
        "sensitivity",
        planted,
        "--from",
        stored,
        "--max-kld",
        max_kld,
        "--recipe-out",
        recipe,
        "--json",
    )
    assert done.exit_code == 0, done.output
    solution = json.loads(done.stdout)["solution"]
    assert solution["kld_predicted"] <= max_kld and "measured" not in solution
    assert Recipe.load(recipe).scheme == INT8.scheme
    table = run(
        "sensitivity", planted, "--from", stored, "--max-size", "+0%", "--alternative", "keep"
    )
    assert table.exit_code == 0 and "budget: 0" in table.stdout
    for arguments, words in [
        (("--max-size", "500kB"), "the smallest is"),
        (("--max-size", "+5%", "--alternative", "mxfp8"), "mxfp8 was not scored"),
        (("--max-size", "lots"), "not understood"),
    ]:
        refused = run("sensitivity", planted, "--from", stored, *arguments)
        assert refused.exit_code == 1 and words in refused.stderr, refused.output
    other = make_llama(tmp_path / "other", seed=3)
    assert run("sensitivity", other, "--from", stored).exit_code == 5
    (tmp_path / "no.json").write_text("{}")
    assert run("sensitivity", planted, "--from", tmp_path / "no.json").exit_code == 1


def test_a_looser_budget_never_predicts_more(result):
    sizes = ["+0%", "+2%", "+5%", "+20%", "+60%", "100%"]
    predicted = [solve_again(result, size, None, ["keep"]).solution.kld_predicted for size in sizes]
    assert predicted == sorted(predicted, reverse=True) and predicted[-1] == 0


def test_exceptions_of_the_recipe_stay_and_patterns_match_nothing_else(result, planted):
    mapping = {
        "scheme": "int8-dynamic",
        "ignore": ["re:.*layers\\.2\\..*"],
        "layers": {"re:.*o_proj": "fp8-dynamic"},
    }
    recipe = Recipe.from_mapping(mapping, "test")
    plan = plan_export(ExportOptions(planted, planted.with_name("none"), recipe))
    sizes = {row.name.removesuffix(".weight"): row for row in plan.parameters}
    kept = sizes["model.layers.0.self_attn.o_proj"]
    # FP8 takes what INT8 takes
    solution = replace(
        result.solution,
        choices=("fp8-dynamic", KEEP, *[RECIPE] * 6),
        bytes=plan.bytes_after + kept.bytes_before - kept.bytes_after,
    )
    groups = tuple(group for group in result.scores.groups if group.block < 2)
    scores = replace(result.scores, groups=groups)
    made = replace(result, base_recipe=recipe, scores=scores, solution=solution).recipe()
    assert [pattern.text for pattern in made.ignore] == [
        "re:.*layers\\.2\\..*",
        r"re:model\.layers\.0\.self_attn\.o_proj$",
    ]
    assert [(pattern.text, scheme.name) for pattern, scheme in made.layers] == [
        (r"re:model\.layers\.0\.self_attn\.(q_proj|k_proj|v_proj)$", "fp8-dynamic"),
        ("re:.*o_proj", "fp8-dynamic"),
    ]


# ---- What is said and refused.


def test_the_page_has_a_heat_map_and_needs_no_network(result):
    from quantkit.layer_sensitivity.html import sensitivity_html

    page = sensitivity_html(result)
    assert (
        'data-plot="layer groups"' in page
        and 'data-plot="lines"' in page
        and ">gate+up<" in page
        and BAD in page
    )
    assert "<script" not in page and "src=" not in page and page == sensitivity_html(result)


def test_what_makes_no_sense_is_refused_before_anything_runs(
    run, planted, llama, export_to, text, tmp_path
):
    base = ("sensitivity", planted, "--data", text)
    assert (
        run(*base).exit_code == 2
        and run(*base, "--scheme", "int8-dynamic", "--recipe-out", tmp_path / "r.yaml").exit_code
        == 2
    )
    assert (
        run(
            *base, "--scheme", "int8-dynamic", "-o", tmp_path / "a", "--html", tmp_path / "a"
        ).exit_code
        == 2
    )
    for arguments, words in [
        (("--scheme", "int8-static"), "quantkit calibrate"),
        (("--scheme", "int8-dynamic", "--alternative", "int9"), "unknown scheme"),
        (
            ("--scheme", "int8-dynamic", "--alternative", "W8A8", "--alternative", "int8-dynamic"),
            "named twice",
        ),
        (("--scheme", "int8-dynamic", "--max-kld", "0"), "--max-kld"),
        (("--scheme", "int8-dynamic", "-o", tmp_path / "gone" / "r.json"), "no directory"),
    ]:
        refused = run(*base, *arguments)
        assert refused.exit_code == 1 and words in refused.stderr, refused.output
    refused = run("sensitivity", export_to("fp8-dynamic"), "--scheme", "int8-dynamic")
    assert refused.exit_code == 1 and "quantized already" in refused.stderr
    (tmp_path / "damaged.json").write_text(
        '{"schema_version": 9, "sets": [], "model": {"fingerprint": "x"}}'
    )
    with pytest.raises(EvaluationError, match="format 9"):
        read_earlier_result(tmp_path / "damaged.json", Checkpoint.open(llama))
