"""The pseudo-perplexity of a masked language model is what its definition gives, one hidden token
after the other.
"""

import math

import pytest
import torch
from tiny_llama import make_llama, make_tokenizer
from tiny_models import make_model
from transformers import AutoModelForMaskedLM

from quantkit.calibration.calibrate import calibrate
from quantkit.calibration.options import CalibrationOptions
from quantkit.data.protocols import evaluation_windows
from quantkit.data.tokenizer import load_tokenizer
from quantkit.errors import EvaluationError
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.preflight import EvaluationOptions


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_pseudo_perplexity_is_that_of_transformers(kind, tmp_path, text):
    model = tmp_path / kind
    make_model(model, kind, torch.float32, vocab_size=make_tokenizer(model, mask=True))
    tokenizer = load_tokenizer(model)
    whole, losses = AutoModelForMaskedLM.from_pretrained(model).eval(), []
    for window in evaluation_windows([str(text)], tokenizer, "gptq", 12, 36).windows:
        for place, token in enumerate(window.tokens):
            inputs = [tokenizer.cls_token_id, *window.tokens, tokenizer.sep_token_id]
            inputs[place + 1] = tokenizer.mask_token_id
            with torch.inference_mode():
                logits = whole(torch.tensor([inputs])).logits[0, place + 1]
            losses.append(-float(logits.log_softmax(-1)[token]))
    result = evaluate(EvaluationOptions(model, (), (str(text),), 12, 36)).to_json()
    assert result["tokens_scored"] == len(losses) == 36 and result["protocol"]["name"] == "masked"
    assert result["base"]["perplexity"] == pytest.approx(
        math.exp(sum(losses) / len(losses)), rel=1e-5
    )


def test_other_protocols_are_refused(tmp_path, text):
    model = tmp_path / "bert"
    make_model(model, "bert", vocab_size=make_tokenizer(model, mask=True))
    with pytest.raises(EvaluationError, match="`protocol='llamacpp'`"):
        evaluate(EvaluationOptions(model, (), (str(text),), 12, 36, "llamacpp"))


def test_a_tokenizer_without_a_mask_is_refused(tmp_path, text):
    model = tmp_path / "bert"
    make_model(model, "bert", vocab_size=make_tokenizer(model))
    calibrate(
        CalibrationOptions(model, tmp_path / "calib", (str(text),), num_samples=2, seq_len=16)
    )
    with pytest.raises(EvaluationError, match="mask token"):
        evaluate(EvaluationOptions(model, (), (str(text),), 12, 36))


def test_a_decoder_is_judged_as_ever(tmp_path, text):
    result = evaluate(
        EvaluationOptions(make_llama(tmp_path / "llama"), (), (str(text),), 12, 36)
    ).to_json()
    assert result["protocol"]["name"] == "gptq" and result["tokens_scored"] == 33
