"""What predicts no token of a text is refused in a sentence, by every command that would begin with
it.
"""

import json

import pytest

from quantkit.errors import CheckpointError
from quantkit.models.task import CAUSAL, MASKED, SEQ2SEQ, task_of


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["LlamaForCausalLM"]},
        {"architectures": ["GPT2LMHeadModel"]},
        {"architectures": ["Gemma3ForConditionalGeneration"]},
        {"architectures": ["BertLMHeadModel"], "is_decoder": True},
        {"architectures": ["ChatGLMModel"], "auto_map": {"AutoModelForCausalLM": "modeling.Model"}},
        {"architectures": None},
        {},
    ],
)
def test_decoders_are_taken(config):
    assert task_of(config, "model") == CAUSAL


def test_masked_language_models_are_taken():
    assert task_of({"architectures": ["XLMRobertaForMaskedLM"]}, "model") == MASKED


def test_encoders_with_decoders_are_taken():
    assert (
        task_of(
            {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "model"
        )
        == SEQ2SEQ
    )


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["T5Model"], "is_encoder_decoder": True},
        {
            "architectures": ["WhisperForConditionalGeneration"],
            "is_encoder_decoder": True,
            "num_mel_bins": 80,
        },
        {"architectures": ["BertForSequenceClassification"]},
        {"architectures": ["BertLMHeadModel"]},
        {"architectures": ["Qwen3Model"]},
    ],
)
def test_others_are_named_and_refused(config):
    with pytest.raises(CheckpointError, match=f"model is a {config['architectures'][0]}"):
        task_of(config, "model")


def test_every_command_refuses_them_before_it_starts(copy, llama, text, tmp_path, run):
    model = copy(llama)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]})
    )
    commands = (
        (
            "calibrate",
            model,
            "-o",
            tmp_path / "calib",
            "--data",
            text,
            "--num-samples",
            2,
            "--seq-len",
            16,
        ),
        ("export", model, "-o", tmp_path / "out", "--scheme", "fp8-dynamic"),
        ("eval", model, "--data", text, "--seq-len", 16, "--max-tokens", 64),
    )
    for arguments in commands:
        result = run(*arguments)
        assert result.exit_code == 1 and "is a LlamaForSequenceClassification" in result.stderr
