"""What a model was trained to predict, by its configuration: that decides how it is run, and how it is judged.

A decoder predicts the next token. Others can't be judged by what `eval` measures, so they are refused before hours are spent on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantkit.errors import CheckpointError

# The ends of class names that say what a model's head is for. A multimodal model that writes text is called ForConditionalGeneration.
_DECODERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForImageTextToText")


def require_decoder(config: Mapping[str, Any], where: object) -> None:
    """Refuse a model that doesn't predict the next token of a text; a configuration that doesn't name its class is taken at its word."""
    architecture = str((config.get("architectures") or [""])[0])
    if config.get("is_encoder_decoder"):
        raise CheckpointError(
            f"{where} is a {architecture or 'model'} of encoder and decoder; quantkit calibrates, exports and judges decoder-only language models"
        )
    is_masked = not config.get("is_decoder") and architecture == "BertLMHeadModel"
    is_remote_decoder = "AutoModelForCausalLM" in (config.get("auto_map") or {})
    if architecture and not is_remote_decoder and (is_masked or not architecture.endswith(_DECODERS)):
        raise CheckpointError(
            f"{where} is a {architecture}, which doesn't predict the next token; quantkit calibrates, exports and judges decoder-only language models"
        )
