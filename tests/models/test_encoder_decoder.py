"""An encoder and a decoder run block by block are the ordinary model, to the last bit, and are
judged by the loss of a target.
"""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import make_tokenizer
from tiny_models import TARGET, make_batches, make_model
from transformers import AutoModelForSeq2SeqLM

from quantkit.calibration.calibrate import calibrate
from quantkit.calibration.options import CalibrationOptions
from quantkit.calibration.reader import Calibration
from quantkit.checkpoint.reader import Checkpoint
from quantkit.data.protocols import evaluation_windows
from quantkit.data.tokenizer import load_tokenizer
from quantkit.data.windows import targets_of
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.preflight import EvaluationOptions
from quantkit.models import saved_states
from quantkit.models.blockwise import BlockStep, BlockwiseModel
from quantkit.models.encoder_decoder import halves
from quantkit.models.hidden_states import HiddenStates
from quantkit.models.skeleton import StoredWeights, build_skeleton
from quantkit.models.threads import one_thread


@pytest.mark.parametrize("kind", TARGET)
def test_blocks_in_turn_give_the_bits_of_the_ordinary_forward(kind, tmp_path):
    whole = make_model(tmp_path, kind)
    checkpoint = Checkpoint.open(tmp_path)
    model = BlockwiseModel(build_skeleton(checkpoint), StoredWeights(checkpoint), str(tmp_path))
    batches, states = make_batches((2, 24), (1, 17)), HiddenStates()

    def run(step: BlockStep) -> None:
        with one_thread(), torch.inference_mode():
            for batch in step.walk.batches:
                step.advance(batch)

    walk = model.walk(dict(enumerate(batches)), states, run)
    found = dict(walk.finish())
    for batch, tokens in enumerate(batches):
        source, target = halves(tokens)
        read = torch.cat([torch.ones_like(target[:, :1]), target[:, :-1]], 1)
        with one_thread(), torch.inference_mode():
            expected = whole.get_decoder()(
                input_ids=read,
                encoder_hidden_states=whole.get_encoder()(input_ids=source)[0],
                use_cache=False,
            )[0]
        assert torch.equal(found[batch], expected)


@pytest.mark.parametrize("kind", TARGET)
def test_the_loss_of_the_target_is_that_of_transformers(kind, tmp_path, text):
    make_model(tmp_path, kind, torch.float32, vocab_size=make_tokenizer(tmp_path))
    whole, losses = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval(), []
    for window in targets_of(
        evaluation_windows([str(text)], load_tokenizer(tmp_path), "gptq", 15, 45)
    ).windows:
        source, target = halves(torch.tensor([window.tokens]))
        with torch.inference_mode():
            logits = whole(
                input_ids=source,
                decoder_input_ids=torch.cat([torch.ones_like(target[:, :1]), target[:, :-1]], 1),
            ).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits, target[0], reduction="none"))
    result = evaluate(EvaluationOptions(tmp_path, (), (str(text),), 15, 45)).to_json()
    assert result["protocol"]["name"] == "target" and result["tokens_scored"] == 21
    assert result["base"]["perplexity"] == pytest.approx(
        math.exp(torch.cat(losses).mean()), rel=1e-5
    )


def test_both_stacks_are_measured(tmp_path, text):
    model = tmp_path / "model"
    make_model(model, "t5", vocab_size=make_tokenizer(model))
    options = CalibrationOptions(model, tmp_path / "calib", (str(text),), num_samples=3, seq_len=32)
    calibrate(options)
    inputs = Calibration.open(tmp_path / "calib").inputs
    for name in (
        "encoder.block.1.layer.0.SelfAttention.q",
        "decoder.block.0.layer.1.EncDecAttention.k",
        "decoder.block.1.layer.2.DenseReluDense.wo",
    ):
        assert inputs[name].amax > 0
    # The decoder's keys and values of the text come from the encoder, its queries don't.
    assert (
        inputs["decoder.block.0.layer.1.EncDecAttention.k"].name
        == inputs["decoder.block.0.layer.1.EncDecAttention.v"].name
    )
    assert (
        inputs["decoder.block.0.layer.1.EncDecAttention.k"].name
        != inputs["decoder.block.0.layer.1.EncDecAttention.q"].name
    )


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("kind", TARGET)
@pytest.mark.parametrize("memory", [None, 0])
def test_a_killed_calibration_goes_on_behind_its_last_block(
    kind, memory, tmp_path, text, monkeypatch
):
    """In the encoder, between the two and in the decoder: without running a block again, and to the
    same bytes.
    """
    monkeypatch.setattr(saved_states, "SECONDS_BETWEEN_SAVES", 0.0)
    model = tmp_path / "model"
    make_model(model, kind, vocab_size=make_tokenizer(model))
    options = CalibrationOptions(
        model,
        tmp_path / "whole",
        (str(text),),
        num_samples=3,
        seq_len=32,
        batch_size=1,
        memory=memory,
    )
    calibrate(options)
    expected = {file.name: file.read_bytes() for file in options.output.iterdir()}
    for number in (1, 2, 3):
        killed, told = replace(options, output=tmp_path / f"killed-{number}"), []

        def die(what: str, done: float, total: float, number: int = number) -> None:
            if done > number:
                raise Killed

        with pytest.raises(Killed):
            calibrate(killed, die)
        calibrate(
            replace(killed, resume=True),
            lambda what, done, total, told=told: told.append((done, what)),
        )
        assert {file.name: file.read_bytes() for file in killed.output.iterdir()} == expected
        assert min(done for done, _ in told if done) > number and not any(
            "again" in text for _, text in told
        )


def test_queries_on_the_target_have_a_scale_of_their_own(tmp_path, text, export_to):
    """In cross-attention keys and values read what the encoder made, and share its scale, as
    runtimes merge them.
    """
    model = tmp_path / "model"
    make_model(model, "bart", vocab_size=make_tokenizer(model))
    calibrate(
        CalibrationOptions(model, tmp_path / "calib", (str(text),), num_samples=3, seq_len=32)
    )
    tensors = load_file(export_to("fp8-tensor", model, tmp_path / "calib") / "model.safetensors")
    for module, shared in (("encoder_attn", ("k", "v")), ("self_attn", ("q", "k", "v"))):
        for suffix in ("input_scale", "weight_scale"):
            scales = {
                which: tensors[f"model.decoder.layers.0.{module}.{which}_proj.{suffix}"].item()
                for which in "qkv"
            }
            assert len({scales[which] for which in shared}) == 1 and len(
                set(scales.values())
            ) == 4 - len(shared)


@pytest.mark.parametrize("kind", TARGET)
def test_a_branch_reads_what_its_own_encoder_made(kind, tmp_path):
    """A batch that branches off in the encoder with other hidden states ends elsewhere; one that
    keeps them ends with the same bits, also where it branches off in the decoder.
    """
    make_model(tmp_path, kind)
    checkpoint = Checkpoint.open(tmp_path)
    model = BlockwiseModel(build_skeleton(checkpoint), StoredWeights(checkpoint), str(tmp_path))

    def run(step: BlockStep) -> None:
        with one_thread(), torch.inference_mode():
            outputs = {batch: step.run(batch) for batch in step.walk.batches}
            if step.number == 0:
                step.walk.branch(0, into=1)
                step.walk.branch(0, into=2)
                outputs |= {1: outputs[0] * 2, 2: outputs[0]}
            if step.number == model.block_count - 1:
                step.walk.branch(2, into=3)
                outputs[3] = outputs[2]
            for batch, output in outputs.items():
                step.put(batch, output)

    states = HiddenStates()
    branches = dict.fromkeys((1, 2, 3), 0)
    walk = model.walk({0: make_batches((1, 24))[0]}, states, run, branches=branches)
    found = dict(walk.finish())
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2]) and torch.equal(found[0], found[3])
