"""A model's task, from its configuration: it decides how the model is built, run and evaluated.

A decoder predicts the next token, a masked language model hidden tokens, an encoder-decoder model a
target text. `eval` can't measure other models, so they are refused before hours are spent on them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from quantkit.errors import CheckpointError

CAUSAL, MASKED, SEQ2SEQ = "causal", "masked", "target"
# Endings of the class names of models that generate text. Multimodal ones end in
# ForConditionalGeneration.
_DECODERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForImageTextToText")
# Keys in the configurations of encoders for images or audio.
_OTHER_INPUT = re.compile(r"mel_bins|feat_per_channel|feat_extract|image|audio|vision|patch_size")


def task_of(config: Mapping[str, Any], where: object) -> str:
    """The task of a model: CAUSAL, MASKED or SEQ2SEQ. A configuration without a class name counts
    as a decoder's.

    config: content of config.json.
    where: names the model in messages.

    Raises CheckpointError for classifiers and other models without a supported task.
    """
    architecture = str((config.get("architectures") or [""])[0])
    supported = (
        "quantkit calibrates, exports and evaluates decoders, masked language models, and"
        " encoder-decoder models that write text"
    )
    if config.get("is_encoder_decoder") and architecture.endswith("ForConditionalGeneration"):
        other = next((key for key in config if _OTHER_INPUT.search(key)), None)
        if other is None:
            return SEQ2SEQ
        raise CheckpointError(
            f"{where} is a {architecture}, whose encoder reads no text (its configuration has"
            f" {other}); {supported}"
        )
    if architecture.endswith("ForMaskedLM"):
        return MASKED
    if architecture == "BertLMHeadModel" and not config.get("is_decoder"):
        raise CheckpointError(
            f"{where} is a {architecture} without is_decoder in its configuration: it sees the"
            f" tokens that it would predict; {supported}"
        )
    is_remote_decoder = "AutoModelForCausalLM" in (config.get("auto_map") or {})
    if architecture and not is_remote_decoder and not architecture.endswith(_DECODERS):
        raise CheckpointError(
            f"{where} is a {architecture}, which isn't known to predict the tokens of a text;"
            f" {supported}"
        )
    return CAUSAL
