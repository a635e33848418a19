"""Rotation: its matrices, what it makes of outliers, what it refuses, and the files that it
leaves.
"""

import json
from dataclasses import replace

import pytest
import torch
from quantized_weights import kld, quantized, recipe_of, with_outliers
from safetensors.torch import load_file
from tiny_llama import make_llama, make_tokenizer
from tiny_models import make_model

from quantkit.algorithms.rotation import rotated_reader, rotated_writer, rotation_matrix
from quantkit.calibration.calibrate import calibrate
from quantkit.calibration.options import CalibrationOptions
from quantkit.calibration.reader import Calibration
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import CalibrationError, RecipeError
from quantkit.exporter.verify import verify
from quantkit.ops.reference import quantize
from quantkit.schemes.quant_spec import TOKEN, QuantSpec
from quantkit.schemes.scheme import QuantScheme

ROTATED = {"scheme": "int8-dynamic", "algorithms": [{"rotation": {"untie": True}}]}
INT8 = QuantScheme.parse("int8-dynamic")
EMBEDDING_BYTES = 335 * 128 * 2  # of the tiny Llama with its tokenizer


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def options(llama, text, tmp_path):
    return CalibrationOptions(
        llama,
        tmp_path / "calib",
        (str(text),),
        recipe_of(ROTATED),
        num_samples=4,
        seq_len=32,
        batch_size=2,
    )


# ---- The matrix.


@pytest.mark.parametrize("size", [1, 2, 7, 12, 18, 28, 36, 64, 100, 576, 896])
def test_rotations_are_orthogonal_and_of_their_seed(size):
    matrix = rotation_matrix(size, generator())
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size), atol=1e-5, rtol=0)
    assert torch.equal(matrix, rotation_matrix(size, generator()))
    assert size < 3 or not torch.equal(matrix, rotation_matrix(size, generator(1)))


@pytest.mark.parametrize("size", [2, 64, 12 * 16, 20, 28, 36 * 16, 7 * 512, 15 * 64])
def test_sizes_of_models_have_hadamard_matrices(size):
    """All entries alike: an outlier goes to all channels evenly."""
    matrix = rotation_matrix(size, generator())
    torch.testing.assert_close(
        matrix.abs(), torch.full((size, size), size**-0.5), atol=1e-6, rtol=0
    )


def test_readers_and_writers_undo_each_other():
    rotation, inputs, weight = (
        rotation_matrix(48, generator()),
        torch.randn(5, 48, generator=generator(1)),
        torch.randn(32, 48, generator=generator(2)),
    )
    norm = torch.rand(48, generator=generator(3)) + 0.5
    torch.testing.assert_close(
        inputs @ rotation @ rotated_reader(weight, rotation, norm).T,
        inputs * norm @ weight.T,
        atol=1e-4,
        rtol=1e-4,
    )
    writer, bias = (
        torch.randn(48, 16, generator=generator(4)),
        torch.randn(48, generator=generator(5)),
    )
    given = torch.randn(5, 16, generator=generator(6))
    torch.testing.assert_close(
        given @ rotated_writer(writer, rotation).T + rotated_writer(bias, rotation),
        (given @ writer.T + bias) @ rotation,
        atol=1e-4,
        rtol=1e-4,
    )
    head = rotation_matrix(16, generator())
    whole = torch.block_diag(head, head, head)
    torch.testing.assert_close(rotated_reader(weight, head), weight @ whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotated_writer(writer, head), whole.T @ writer, atol=1e-5, rtol=1e-5)


def test_rotation_beats_rounding_where_channels_are_outliers():
    rows, weight = (
        torch.randn(128, 64, generator=generator()),
        torch.randn(32, 64, generator=generator(1)),
    )
    rows[:, [3, 40]] *= 60
    rotation, spec = (
        rotation_matrix(64, generator(2)),
        QuantSpec(INT8.input.format, TOKEN, dynamic=True),
    )

    def error(inputs, matrix):
        return float(
            (
                quantize(inputs, spec).dequantize() @ quantize(matrix, INT8.weight).dequantize().T
                - rows @ weight.T
            )
            .square()
            .sum()
        )

    assert error(rows @ rotation, rotated_reader(weight, rotation)) < 0.2 * error(rows, weight)


# ---- Whole models.


@pytest.mark.slow
def test_rotation_restores_a_model_whose_channels_were_rescaled(
    llama, text, options, copy, export_to
):
    harmed = with_outliers(copy(llama), down=False)
    assert kld(llama, harmed, text) == 0.0
    unharmed_plain = kld(llama, export_to("int8-dynamic"), text)
    plain = kld(harmed, export_to("int8-dynamic", harmed, None, name="plain"), text)
    rotated = kld(harmed, quantized(replace(options, model=harmed)), text)
    assert plain > 20 * unharmed_plain
    assert rotated < 1.5 * unharmed_plain


@pytest.mark.slow
@pytest.mark.parametrize("algorithms", [[], ["smoothquant", "gptq"]], ids=["alone", "with others"])
def test_norms_that_add_one_and_tied_embeddings(tmp_path, text, options, algorithms):
    make_model(tmp_path / "gemma", "gemma", vocab_size=384)
    make_tokenizer(tmp_path / "gemma")
    recipe = recipe_of(ROTATED | {"algorithms": ROTATED["algorithms"] + algorithms})
    output = quantized(replace(options, model=tmp_path / "gemma", recipe=recipe))
    assert kld(tmp_path / "gemma", output, text) < 1e-4
    exported, tensors = Checkpoint.open(output), load_file(output / "model.safetensors")
    assert exported.config["tie_word_embeddings"] is False
    assert tensors["lm_head.weight"].shape == tensors["model.embed_tokens.weight"].shape
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    if not algorithms:
        assert (
            not tensors["model.norm.weight"].any()
            and not tensors["model.layers.1.input_layernorm.weight"].any()
        )
    found = verify(output, tmp_path / "gemma")
    assert found.ok and not any("tie_word_embeddings" in warning for warning in found.warnings)


def test_sizes_are_accounted_for(tmp_path, text, options, run, run_json):
    model = make_llama(tmp_path / "tied", tie=True)
    output = quantized(replace(options, model=model))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(ROTATED))
    plan = run_json(
        "export",
        model,
        "-o",
        tmp_path / "again",
        "--recipe",
        recipe,
        "--calibration",
        options.output,
        "--dry-run",
    )
    row = next(row for row in plan["parameters"] if row["name"] == "lm_head.weight")
    assert (
        row["bytes_before"] == 0
        and row["bytes_after"] == EMBEDDING_BYTES
        and "model.embed_tokens.weight" in row["reason"]
    )
    assert plan["bytes_after"] == Checkpoint.open(output).nbytes
    shown = run("inspect", options.output)
    assert shown.exit_code == 0 and "rotated" in shown.stdout and "model.layers.1" in shown.stdout


@pytest.mark.slow
def test_transformers_loads_it_and_computes_the_same(tmp_path, options):
    """An ordinary checkpoint: with every Linear left in bfloat16, and rotated, the model is the old
    one up to rounding.
    """
    from transformers import AutoModelForCausalLM

    model = make_llama(
        tmp_path / "tied",
        tie=True,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
    )
    recipe = recipe_of(
        {
            **ROTATED,
            "scheme": "int8-weight-only",
            "ignore": ["re:.*layers\\.[01]\\.(self_attn|mlp).(?!down)"],
        }
    )
    output = quantized(replace(options, model=model, recipe=recipe))
    tokens = torch.arange(40)[None]
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (model, output)
    ]
    with torch.inference_mode():
        before, after = (each(tokens).logits.log_softmax(-1) for each in models)
    assert float((before.exp() * (before - after)).sum(-1).mean()) < 1e-3
    assert not torch.equal(*(each.model.layers[0].self_attn.o_proj.weight for each in models))


def test_heads_alone_need_no_untying(tmp_path, text, options, export_to):
    model = make_llama(tmp_path / "tied", tie=True, num_attention_heads=4, num_key_value_heads=2)
    recipe = recipe_of(
        {"scheme": "int8-dynamic", "algorithms": [{"rotation": {"residual": False}}]}
    )
    output = quantized(replace(options, model=model, recipe=recipe))
    assert "lm_head.weight" not in Checkpoint.open(output).tensors
    entries = Calibration.open(options.output).description["chosen"]["rotations"]
    assert [entry["heads"] for entry in entries] == [["self_attn.v_proj"]] * 2 and not entries[0][
        "norms"
    ]
    assert kld(model, output, text) < 0.01


# ---- What is refused, before anything is run.


def test_tied_embeddings_are_not_untied_unasked(tmp_path, options):
    model = make_llama(tmp_path / "tied", tie=True)
    with pytest.raises(
        RecipeError, match=r"86 kB more; accept that with rotation: \{untie: true\}"
    ):
        calibrate(
            replace(
                options,
                model=model,
                recipe=recipe_of({"scheme": "int8-dynamic", "algorithms": ["rotation"]}),
            )
        )


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gemma2", "post_feedforward_layernorm stands between mlp.down_proj and it"),
        ("cohere2", "model.norm subtracts a mean"),
        ("gpt_neox", "final_layer_norm adds a bias"),
        ("opt", "embed_positions.weight reads or writes the residual stream too"),
        ("qwen3_moe", "no sum of what its Linears put out"),
    ],
)
def test_what_cannot_be_rotated_is_refused_with_the_reason(kind, reason, tmp_path, options):
    make_model(tmp_path / kind, kind, vocab_size=384)
    make_tokenizer(tmp_path / kind)
    with pytest.raises(CalibrationError, match=reason):
        calibrate(replace(options, model=tmp_path / kind))
    assert not options.output.exists() and not options.output.with_name("calib.partial").exists()


def test_a_later_block_that_is_another_is_found_before_the_first_is_worked_on(options, monkeypatch):
    """The second block's second norm works on something else: no block may have been measured when
    that is found.
    """
    import quantkit.calibration.rotate_block as rotating

    whole = rotating._readers_and_writers
    seen = []

    def lacking(probe):
        seen.append(probe)
        reading, writers = whole(probe)
        return (
            {norm: given for norm, given in reading.items() if norm != "post_attention_layernorm"}
            if len(seen) == 2
            else reading
        ), writers

    monkeypatch.setattr(rotating, "_readers_and_writers", lacking)
    with pytest.raises(CalibrationError, match=r"layers\.1: rotated, it returns something else"):
        calibrate(options)
    assert len(seen) == 2


def test_the_residual_stream_of_an_encoder_with_a_decoder_is_refused(tmp_path, options):
    make_model(tmp_path / "t5", "t5", vocab_size=make_tokenizer(tmp_path / "t5"))
    recipe = recipe_of({"scheme": "int8-dynamic", "algorithms": [{"rotation": {"untie": True}}]})
    with pytest.raises(RecipeError, match="has an encoder and a decoder"):
        calibrate(replace(options, model=tmp_path / "t5", recipe=recipe))


def test_tensors_that_nobody_runs_are_refused(options, copy, llama):
    from safetensors.torch import save_file

    model = copy(llama)
    tensors = load_file(model / "model.safetensors") | {
        "mtp.proj.weight": torch.ones(4, 128, dtype=torch.bfloat16)
    }
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CalibrationError, match="mtp.proj.weight: transformers doesn't run it"):
        calibrate(replace(options, model=model))


# ---- Stopped and resumed.


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 1], ids=["before the first block is done", "in the second"])
def test_killed_run_resumes_to_the_same_bytes(at, options, tmp_path):
    class Killed(BaseException):
        pass

    def die(what: str, done: float, total: float) -> None:
        if "quantizing" in what and done >= at:
            raise Killed

    algorithms = [*ROTATED["algorithms"], "smoothquant", "gptq"]
    killed = replace(
        options, output=tmp_path / "killed", recipe=recipe_of(ROTATED | {"algorithms": algorithms})
    )
    with pytest.raises(Killed):
        calibrate(killed, die)
    assert (tmp_path / "killed.partial" / "weights-outer.safetensors").is_file()
    calibrate(replace(killed, resume=True))
    calibrate(replace(killed, output=options.output))
    contents = [
        {file.name: file.read_bytes() for file in path.iterdir()}
        for path in (killed.output, options.output)
    ]
    assert contents[0] == contents[1] and "weights-outer.safetensors" in contents[0]


@pytest.mark.slow
def test_another_seed_is_another_rotation(options, tmp_path):
    calibrate(options)
    calibrate(replace(options, output=tmp_path / "other", seed=1))
    outer = [
        load_file(path / "weights-outer.safetensors")["lm_head.weight"]
        for path in (options.output, tmp_path / "other")
    ]
    assert not torch.equal(*outer)
