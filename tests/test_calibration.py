import json
from dataclasses import replace

import pytest
import torch
from conftest import make_llama, make_text
from transformers import AutoModelForCausalLM

from quantkit.calibration import Calibration, CalibrationOptions, calibrate
from quantkit.checkpoint import Checkpoint
from quantkit.data import calibration_windows, load_tokenizer
from quantkit.errors import CalibrationError, OutputError
from quantkit.observers import histogram_edges


@pytest.fixture
def options(llama, text, tmp_path):
    return CalibrationOptions(llama, tmp_path / "calib", (str(text),), num_samples=5, seq_len=32, batch_size=2)


def test_statistics_are_those_of_an_ordinary_forward(llama, text, options):
    calibrate(options)
    observers = Calibration.open(options.output).observers()
    windows = calibration_windows([str(text)], load_tokenizer(llama), 5, 32, 0)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype="auto").eval()
    seen = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    # In the same batches: a CPU's matrix product may round otherwise for another batch.
    with torch.inference_mode():
        for start in (0, 2, 4):
            model(torch.tensor([window.tokens for window in windows.windows[start : start + 2]]))
    inputs = torch.cat([batch.reshape(-1, 32, batch.shape[-1]) for batch in seen]).float()
    observer = observers["model.layers.1.mlp.down_proj"]
    assert observer.counts.tolist() == [5 * 31, 5]
    assert torch.equal(observer.channel_amax, inputs[:, 1:].abs().amax((0, 1)))
    assert observer.first_amax == inputs[:, 0].abs().max()
    torch.testing.assert_close(observer.channel_sum_of_squares, inputs[:, 1:].double().square().sum((0, 1)), rtol=1e-6, atol=0)
    assert observer.histogram.sum() == inputs[:, 1:].numel()
    top = int(observer.histogram.nonzero().max())
    assert histogram_edges()[top] <= observer.amax < histogram_edges()[top + 1]


def test_linears_that_share_an_input_are_observed_once(calib):
    entries = json.loads((calib / "calibration.json").read_text())["inputs"]
    assert [len(entry["linears"]) for entry in entries] == [3, 1, 2, 1] * 2
    assert entries[0]["linears"] == [f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]


def test_keys_are_measured_after_rotary_embedding(llama, text, options):
    calibrate(replace(options, num_samples=1, batch_size=1))
    entry = Calibration.open(options.output).kv_amax["model.layers.0.self_attn"]
    window = calibration_windows([str(text)], load_tokenizer(llama), 1, 32, 0).windows[0]
    model = AutoModelForCausalLM.from_pretrained(llama, dtype="auto").eval()
    with torch.inference_mode():
        cache = model(torch.tensor([window.tokens]), use_cache=True).past_key_values
    assert entry == (cache.layers[0].keys.abs().max().item(), cache.layers[0].values.abs().max().item())


def test_same_seed_gives_the_same_bytes_and_another_gives_others(options):
    calibrate(options)
    first = (options.output / "statistics.safetensors").read_bytes()
    calibrate(replace(options, overwrite=True))
    assert (options.output / "statistics.safetensors").read_bytes() == first
    calibrate(replace(options, overwrite=True, seed=1))
    assert (options.output / "statistics.safetensors").read_bytes() != first


def test_killed_calibration_resumes_to_the_same_bytes(options, tmp_path, monkeypatch):
    calibrate(options)
    undisturbed = {path.name: path.read_bytes() for path in options.output.iterdir()}
    monkeypatch.setattr("quantkit.calibration.SECONDS_BETWEEN_SAVES", 0.0)

    class Killed(BaseException):
        pass

    def die(done: int, total: int) -> None:
        if done >= 4:
            raise Killed

    killed = replace(options, output=tmp_path / "killed")
    with pytest.raises(Killed):
        calibrate(killed, die)
    assert not killed.output.exists()
    with pytest.raises(OutputError, match="--resume"):
        calibrate(killed)
    with pytest.raises(OutputError, match="different data"):
        calibrate(replace(killed, resume=True, seed=3))
    seen = []
    calibrate(replace(killed, resume=True), lambda done, total: seen.append(done))
    assert seen[0] > 2  # the first batch was not run again
    assert {path.name: path.read_bytes() for path in killed.output.iterdir()} == undisturbed


def test_fewer_windows_than_asked_for_are_used_and_told(options, run, tmp_path):
    summary = calibrate(replace(options, num_samples=10_000))
    assert summary.windows < summary.requested == 10_000
    result = run("calibrate", options.model, "-o", tmp_path / "more", "--data", options.data[0], "--seq-len", 64, "--num-samples", 9999)
    assert result.exit_code == 0 and "fewer than the 9999" in result.stderr


def test_bundled_text_serves_without_data(llama, tmp_path):
    summary = calibrate(CalibrationOptions(llama, tmp_path / "c", num_samples=2, seq_len=64))
    assert summary.windows == 2


def test_activation_that_overflows_stops_the_run_and_is_named(tmp_path, text):
    model = make_llama(tmp_path / "m")
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].fill_(3e38)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CalibrationError, match="model.layers.0.mlp.down_proj"):
        calibrate(CalibrationOptions(model, tmp_path / "c", (str(text),), num_samples=1, seq_len=16))
    assert not (tmp_path / "c").exists()


def test_calibration_of_another_model_is_refused(calib, tmp_path):
    other = Checkpoint.open(make_llama(tmp_path / "other", seed=1))
    with pytest.raises(CalibrationError, match="another model"):
        Calibration.open(calib).require_same_model(other, other.fingerprint())


def test_damaged_calibration_is_refused(calib, copy):
    damaged = copy(calib)
    (damaged / "calibration.json").write_text('{"schema_version": 1}')
    with pytest.raises(CalibrationError, match="damaged"):
        Calibration.open(damaged)


def test_windows_are_mixed_evenly_from_several_files(llama, text, tmp_path):
    second = tmp_path / "second.txt"
    second.write_text(make_text(3000, seed=5))
    calibrate(CalibrationOptions(llama, tmp_path / "c", (str(text), str(second)), num_samples=4, seq_len=32))
    described = json.loads((tmp_path / "c" / "calibration.json").read_text())
    assert described["windows"] == 4 and described["data"]["sources"] == [str(text), str(second)]
