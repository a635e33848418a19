"""`import quantkit`: its names, their documentation, what importing it costs, and what each
function returns on a tiny model.
"""

import gc
import inspect
import json
import logging
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError

import pytest

import quantkit as qk
from quantkit.errors import QuantkitWarning

FUNCTIONS = ("calibrate", "evaluate", "export", "quantize", "sensitivity", "verify")
RESULTS = (
    "CalibrationResult",
    "Evaluation",
    "ExportResult",
    "QuantizeResult",
    "Sensitivity",
    "Verification",
)


def test_the_public_names_are_these():
    assert sorted(qk.__all__) == sorted([*FUNCTIONS, "QuantkitError", "Recipe"])
    assert set(qk.__all__) | set(RESULTS) <= set(dir(qk))
    for name in (*qk.__all__, *RESULTS):
        assert getattr(qk, name).__module__.startswith("quantkit."), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        qk.nothing  # noqa: B018


@pytest.mark.slow
def test_names_stay_functions_when_rooms_are_imported():
    code = (
        "import quantkit.api.sensitivity, quantkit.cli.main, quantkit.layer_sensitivity.score;"
        "import quantkit as qk;"
        f"assert all(callable(getattr(qk, name)) for name in {FUNCTIONS})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_it_is_light():
    code = (
        "import sys, time; begun = time.process_time(); import quantkit;"
        "spent = time.process_time() - begun;"
        "heavy = {'torch', 'transformers', 'numpy', 'click', 'yaml'} & set(sys.modules);"
        "assert not heavy, heavy; assert spent < 0.1, spent"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_documents_each_parameter_units_and_errors(name):
    function = getattr(qk, name)
    text = inspect.getdoc(function)
    documented = set()
    for names in re.findall(r"^([a-z_]+(?:, [a-z_]+)*):", text, re.MULTILINE):
        documented |= set(names.split(", "))
    for parameter in re.findall(r"The other parameters are those of (.*)\.", text):
        for other in re.findall(r"`(\w+)`", parameter):
            documented |= set(re.findall(r"^([a-z_]+):", inspect.getdoc(getattr(qk, other)), re.M))
    missing = set(inspect.signature(function).parameters) - documented
    assert not missing, f"{name} doesn't document {missing}"
    assert "Raises" in text and "Returns" in text
    assert re.search(r"tokens|bytes|per cent|nats|dB", text), "units"
    hints = inspect.get_annotations(function)
    assert set(hints) == {*inspect.signature(function).parameters, "return"}


@pytest.mark.parametrize("name", ["Recipe", "QuantkitError", *RESULTS])
def test_a_type_documents_its_fields(name):
    kind = getattr(qk, name)
    text = inspect.getdoc(kind)
    for field in getattr(kind, "__dataclass_fields__", {}):
        assert re.search(rf"^(?:[a-z_]+, )*{field}(?:, [a-z_]+)*:", text, re.MULTILINE), field
    for member in vars(kind):
        if not member.startswith("_") and callable(getattr(kind, member)) and member != "to_json":
            assert inspect.getdoc(getattr(kind, member)), member


# ---- What they return.


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantkitWarning)
        yield


def test_quantize_calibrates_exports_verifies_and_checks(llama, text, tmp_path, quiet):
    told = []
    result = qk.quantize(
        llama,
        tmp_path / "out",
        "fp8-static",
        data=text,
        num_samples=4,
        seq_len=64,
        check_tokens=256,
        progress=lambda what, done, total: told.append((what, done, total)),
    )
    assert result.path == tmp_path / "out" and result.verification.ok
    assert result.calibration.path == tmp_path / "out-calibration"
    assert result.calibration.windows == 4 and result.checkpoint.quantized == 14
    assert result.check.is_sane in (True, False) and result.check.was_run
    assert told and all(0 <= done <= total for _, done, total in told)
    assert set(result.to_json()) >= {"path", "scheme", "verify", "judgement", "bytes_after"}
    for shown in (repr(result), result._repr_html_()):
        assert "fp8-static" in shown and "14 quantized" in shown or "14 Linears" in shown


def test_calibrate_export_and_evaluate_hand_results_on(llama, text, tmp_path, quiet):
    recipe = qk.Recipe("int8-static", ignore=["re:.*o_proj"])
    calibration = qk.calibrate(llama, tmp_path / "calib", data=[text], num_samples=4, seq_len=64)
    plan = qk.export(llama, tmp_path / "out", recipe, calibration=calibration, dry_run=True)
    assert plan.is_dry_run and not (tmp_path / "out").exists()
    exported = qk.export(llama, tmp_path / "out", recipe, calibration=calibration)
    assert exported.parameters == plan.parameters and exported.quantized == 12
    evaluation = qk.evaluate(llama, exported, text, seq_len=64, max_tokens=512)
    quant = evaluation.quants[0]
    assert quant.ppl_delta_pct.low < quant.ppl_delta_pct.value < quant.ppl_delta_pct.high
    assert quant.kld.mean > 0 and 0 <= quant.top1_agreement <= 1
    assert quant.perplexity == pytest.approx(
        evaluation.base.perplexity * (1 + quant.ppl_delta_pct.value / 100)
    )
    assert "int8-static" in repr(evaluation) and "±" not in repr(evaluation)
    assert "int8-static" in evaluation.to_markdown()


def test_results_have_the_json_of_the_command_line(llama, text, tmp_path, run_json, quiet):
    out = tmp_path / "out"
    exported = qk.export(llama, out, "fp8-dynamic").to_json()
    by_command = run_json("export", llama, "-o", out, "--scheme", "fp8-dynamic", "--overwrite")
    assert exported | {"seconds": 0} == by_command | {"seconds": 0}
    verified = json.loads(json.dumps(qk.verify(out, base=llama).to_json()))
    assert verified == run_json("verify", out, "--base", llama)
    evaluation = qk.evaluate(llama, [out], text, seq_len=64, max_tokens=256, cache=False)
    by_command = run_json(
        "eval", llama, out, "--data", text, "--seq-len", 64, "--max-tokens", 256, "--no-cache"
    )
    ours = json.loads(json.dumps(evaluation.to_json()))
    assert list(ours) == list(by_command)
    assert ours["quants"][0]["kld"] == by_command["quants"][0]["kld"]
    assert ours["protocol"] == by_command["protocol"] and ours["data"] == by_command["data"]


def test_text_in_memory_gives_what_the_same_file_gives(llama, text, quiet):
    options = {"seq_len": 64, "max_tokens": 256, "cache": False}
    of_file = qk.evaluate(llama, (), text, **options)
    of_memory = qk.evaluate(llama, (), [text.read_text()], **options)
    assert of_memory.base.perplexity == of_file.base.perplexity
    assert of_memory.data.tokens_sha256 == of_file.data.tokens_sha256
    assert "in memory" in of_memory.data.sources[0]


def test_results_are_frozen(llama, tmp_path, quiet):
    exported = qk.export(llama, tmp_path / "out", "fp8-dynamic")
    for value in (exported, qk.verify(exported), qk.Recipe("fp8-dynamic")):
        field = next(iter(value.__dataclass_fields__))
        with pytest.raises(FrozenInstanceError):
            setattr(value, field, None)


def test_a_failed_gate_raises_only_when_asked(llama, export_to, text, quiet):
    evaluation = qk.evaluate(
        llama, export_to("fp8-dynamic"), text, seq_len=64, max_tokens=256, gates=["kld_mean<=1e-9"]
    )
    assert evaluation.gates[0].result == "fail"
    with pytest.raises(qk.QuantkitError, match="the gate kld_mean<=1e-9 failed"):
        evaluation.require_gates()


def test_faults_of_quantize_keep_the_result(llama, tmp_path, monkeypatch, quiet):
    monkeypatch.setattr("quantkit.evaluation.sanity_check.MOST_KLD", -1.0)
    with pytest.raises(qk.QuantkitError, match="fails the sanity check") as raised:
        qk.quantize(llama, tmp_path / "out", check_tokens=256)
    assert raised.value.result.path == tmp_path / "out" and (tmp_path / "out").is_dir()
    assert raised.value.result.check.is_sane is False


def test_lists_are_no_texts_and_numbers_no_texts(llama, text, quiet):
    with pytest.raises(qk.QuantkitError, match="`gates` must be a list"):
        qk.evaluate(llama, (), text, gates="kld_mean<=1")
    with pytest.raises(qk.QuantkitError, match="`alternatives` must be a list"):
        qk.sensitivity(llama, "fp8-dynamic", text, alternatives="keep")
    with pytest.raises(qk.QuantkitError, match="`max_kld` is '0.1'"):
        qk.sensitivity(llama, "fp8-dynamic", text, max_kld="0.1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"runtime": "vlm"}, "`runtime` is 'vlm'; choose one of vllm"),
        ({"format": "onnx"}, "`format` is 'onnx'"),
        ({"hardware": "h100"}, "`hardware` is 'h100'"),
        ({"num_samples": 0}, "`num_samples` is 0"),
        ({"seq_len": 1.5}, "`seq_len` is 1.5"),
        ({"max_shard_size": 0}, "`max_shard_size` is 0; give a size above 0"),
        ({"max_shard_size": "much"}, "`max_shard_size` is 'much'"),
        ({"max_shard_size": None}, "`max_shard_size` is None"),
        ({"seed": 1.5}, "`seed` is 1.5"),
        ({"recipe": 8}, "`recipe` is 8"),
        ({"ignore": "lm_head"}, "`ignore` must be a list"),
        ({"ignore": None}, "`ignore` must be a list"),
        ({"overwrite": "no"}, "`overwrite` is 'no'; give True or False"),
        ({"progress": True}, "`progress` is True; give a function"),
        ({"num_samples": None}, "`num_samples` is None"),
        ({"calibration": 3}, "`calibration` is 3; give a path"),
        ({"data": {"a", "b"}}, "`data` is set"),
        ({"data": b"text"}, "`data` is bytes"),
    ],
)
def test_a_wrong_argument_is_refused_by_its_name(llama, tmp_path, arguments, message):
    with pytest.raises(qk.QuantkitError, match=re.escape(message)):
        qk.quantize(llama, tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_steps_are_logged_and_warnings_warned(llama, text, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "quantkit"), pytest.warns(QuantkitWarning) as warned:
        qk.calibrate(llama, tmp_path / "calib", data=["too short a text. " * 60], seq_len=64)
    assert "statistics of" in caplog.text
    assert any("give more text as `data`" in str(each.message) for each in warned)
    assert {each.filename for each in warned} == {__file__}
    with pytest.warns(QuantkitWarning, match="sglang can't load") as warned:
        qk.quantize(llama, tmp_path / "out", "int8-static", num_samples=4, seq_len=64, check=False)
    assert {each.filename for each in warned} == {__file__}


def test_the_library_prints_nothing(llama, text, tmp_path, capfd, quiet):
    exported = qk.export(llama, tmp_path / "out", "fp8-dynamic")
    qk.verify(exported)
    qk.evaluate(llama, exported, text, seq_len=64, max_tokens=256)
    assert capfd.readouterr() == ("", "")


def test_should_stop_ends_a_run_that_resume_continues(llama, text, tmp_path, quiet):
    options = {"data": text, "num_samples": 4, "seq_len": 64}
    with pytest.raises(qk.QuantkitError, match="stopped after block 1 of") as raised:
        qk.calibrate(llama, tmp_path / "calib", **options, should_stop=lambda: True)
    assert raised.value.exit_code == 75 and "`resume=True`" in raised.value.hint
    qk.calibrate(llama, tmp_path / "calib", **options, resume=True)
    qk.calibrate(llama, tmp_path / "whole", **options)
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    assert names
    for name in names:
        ours, theirs = ((tmp_path / where / name).read_bytes() for where in ("calib", "whole"))
        assert ours == theirs


def test_all_files_are_closed(llama, text, tmp_path):
    """Python warns of a file that was left open when it collects it."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        exported = qk.export(llama, tmp_path / "out", "fp8-dynamic")
        qk.verify(exported, base=llama)
        qk.calibrate(llama, tmp_path / "calib", data=text, num_samples=4, seq_len=64)
        qk.evaluate(llama, exported, text, seq_len=64, max_tokens=128)
        qk.sensitivity(llama, "fp8-dynamic", text, seq_len=64, max_tokens=64)
        gc.collect()
    assert [each for each in warned if each.category is ResourceWarning] == []


def test_paths_may_begin_with_the_home_directory(llama, tmp_path, monkeypatch, quiet):
    monkeypatch.setenv("HOME", str(tmp_path))
    exported = qk.export(llama, "~/out", "fp8-dynamic")
    assert exported.path == tmp_path / "out" and exported.path.is_dir()
    for name in ("", ".", "/"):
        with pytest.raises(qk.QuantkitError, match="`output` is"):
            qk.export(llama, name, "fp8-dynamic")


@pytest.mark.parametrize("model", [None, 3, object(), ""])
def test_a_model_is_a_name(model, tmp_path):
    with pytest.raises(qk.QuantkitError, match="a model is given as"):
        qk.export(model, tmp_path / "out", "fp8-dynamic")


def test_calls_in_threads_and_other_default_dtypes_change_nothing(llama, text, tmp_path, quiet):
    import torch

    def calibrated(name: str) -> dict[str, bytes]:
        path = qk.calibrate(llama, tmp_path / name, data=text, num_samples=4, seq_len=64).path
        return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}

    expected = calibrated("alone")
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(calibrated, "abc")) == [expected] * 3
    assert torch.get_default_dtype() == torch.float32
    torch.set_default_dtype(torch.float16)
    try:
        assert calibrated("half") == expected
        assert torch.get_default_dtype() == torch.float16
    finally:
        torch.set_default_dtype(torch.float32)
