"""What a model was trained to predict, by its configuration: that decides how it is built, run and
judged.

A decoder predicts the next token, a masked language model hidden ones, an encoder with a decoder a
target. Others can't be judged by what `eval` measures, so they are refused before hours are spent
on them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from quantkit.errors import CheckpointError

CAUSAL, MASKED, SEQ2SEQ = "causal", "masked", "target"
# The ends of class names that say what a model's head is for. A multimodal model that writes text
# is called ForConditionalGeneration.
_DECODERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForImageTextToText")
# What configurations of encoders that see or hear speak of.
_OTHER_INPUT = re.compile(r"mel_bins|feat_per_channel|feat_extract|image|audio|vision|patch_size")


def task_of(config: Mapping[str, Any], where: object) -> str:
    """CAUSAL, MASKED or SEQ2SEQ; a configuration that doesn't name its class is taken for a
    decoder's.

    Raises CheckpointError for classifiers and the like.
    """
    architecture = str((config.get("architectures") or [""])[0])
    what = (
        "quantkit calibrates, exports and judges decoders, masked language models, and encoders"
        " with decoders that write text"
    )
    if config.get("is_encoder_decoder") and architecture.endswith("ForConditionalGeneration"):
        other = next((key for key in config if _OTHER_INPUT.search(key)), None)
        if other is None:
            return SEQ2SEQ
        raise CheckpointError(
            f"{where} is a {architecture}, whose encoder reads no text (its configuration has"
            f" {other}); {what}"
        )
    if architecture.endswith("ForMaskedLM"):
        return MASKED
    if architecture == "BertLMHeadModel" and not config.get("is_decoder"):
        raise CheckpointError(
            f"{where} is a {architecture} without is_decoder in its configuration: it sees the"
            f" tokens that it would predict; {what}"
        )
    is_remote_decoder = "AutoModelForCausalLM" in (config.get("auto_map") or {})
    if architecture and not is_remote_decoder and not architecture.endswith(_DECODERS):
        raise CheckpointError(
            f"{where} is a {architecture}, which isn't known to predict the tokens of a text;"
            f" {what}"
        )
    return CAUSAL
