"""quantkit: Hugging Face checkpoints to FP8 or INT8, and what that cost in quality.

    import quantkit as qk

    quant = qk.quantize("MODEL", "OUT", "fp8-dynamic")
    result = qk.evaluate("MODEL", quant, "text.txt")
    result.quants[0].ppl_delta_pct.high

Importing it imports neither torch nor transformers: each function does when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantkit.api.calibrate import calibrate
    from quantkit.api.evaluate import evaluate
    from quantkit.api.export import export
    from quantkit.api.quantize import QuantizeResult as QuantizeResult
    from quantkit.api.quantize import quantize
    from quantkit.api.sensitivity import sensitivity
    from quantkit.api.verify import verify
    from quantkit.calibration.result import CalibrationResult as CalibrationResult
    from quantkit.errors import QuantkitError
    from quantkit.evaluation.result import Evaluation as Evaluation
    from quantkit.exporter.result import ExportResult as ExportResult
    from quantkit.exporter.verification import Verification as Verification
    from quantkit.layer_sensitivity.result import Sensitivity as Sensitivity
    from quantkit.schemes.recipe import Recipe

__version__ = "0.2.0"
__all__ = [
    "QuantkitError",
    "Recipe",
    "calibrate",
    "evaluate",
    "export",
    "quantize",
    "sensitivity",
    "verify",
]

# Public names, and the types of results for annotations → their modules.
_MODULES = {
    "QuantkitError": "quantkit.errors",
    "Recipe": "quantkit.schemes.recipe",
    "calibrate": "quantkit.api.calibrate",
    "evaluate": "quantkit.api.evaluate",
    "export": "quantkit.api.export",
    "quantize": "quantkit.api.quantize",
    "sensitivity": "quantkit.api.sensitivity",
    "verify": "quantkit.api.verify",
    "CalibrationResult": "quantkit.calibration.result",
    "Evaluation": "quantkit.evaluation.result",
    "ExportResult": "quantkit.exporter.result",
    "QuantizeResult": "quantkit.api.quantize",
    "Sensitivity": "quantkit.layer_sensitivity.result",
    "Verification": "quantkit.exporter.verification",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'quantkit' has no attribute '{name}'")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
