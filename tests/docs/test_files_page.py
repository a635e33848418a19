"""docs/files.md names every key of the JSON files, and every tensor of a calibration."""

import json

import pytest
from documents import DOCS

import quantkit as qk
from quantkit.checkpoint.header import read_header

PAGE = (DOCS / "files.md").read_text(encoding="utf-8")


def require_named(keys) -> None:
    missing = [key for key in keys if f"`{key}`" not in PAGE]
    assert not missing, missing


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::quantkit.errors.QuantkitWarning")
def test_keys_of_an_export_and_an_evaluation_are_named(tmp_path, llama, calib, text):
    exported = qk.export(llama, tmp_path / "out", "fp8-static", calibration=calib)
    require_named(json.loads((exported.path / "quantkit.json").read_text()))
    result = qk.evaluate(llama, exported, text, seq_len=64, max_tokens=512, gates=["top1>=0.9"])
    content = result.to_json()
    (quant,) = content["quants"]
    require_named([*content, *content["base"], *quant, *content["gates"][0]])
    require_named([*quant["ppl_delta_pct"], *quant["kld"], *quant["flips"]])


@pytest.mark.slow
def test_keys_of_a_calibration_are_named(calib):
    content = json.loads((calib / "calibration.json").read_text())
    require_named([*content, *content["inputs"][0], *content["kv"][0]])
    require_named(
        {name.rpartition(".")[2] for name in read_header(calib / "block-00000.safetensors")}
    )
