"""The texts that come with quantkit (`texts/README.md` says where they are from)."""

from __future__ import annotations

from pathlib import Path

_TEXTS = Path(__file__).parent / "texts"
BUNDLED_CALIBRATION = _TEXTS / "calibration.jsonl"
BUNDLED_EVALUATION = _TEXTS / "evaluation.txt"
