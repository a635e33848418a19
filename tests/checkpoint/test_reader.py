import json
import time

import pytest
import torch
from safetensors.torch import save_file

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import CheckpointError

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor([1.5, -2.0]).bfloat16(),
    "codes": torch.tensor([[1.0, -448.0]]).to(torch.float8_e4m3fn),
    "i8": torch.tensor([-128, 0, 127], dtype=torch.int8),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(7, dtype=torch.int64),
}


@pytest.fixture
def model(tmp_path):
    """A directory that the reader takes for a checkpoint."""
    (tmp_path / "config.json").write_text("{}")
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


def test_reader_agrees_with_safetensors(model):
    checkpoint = Checkpoint.open(model)
    assert set(checkpoint.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(
            checkpoint.read(name).view(torch.uint8) if tensor.dim() else checkpoint.read(name),
            tensor.view(torch.uint8) if tensor.dim() else tensor,
        )


@pytest.mark.parametrize(
    "shard",
    ["../evil.safetensors", "/etc/passwd", "sub/x.safetensors", "gone.safetensors", "model.bin"],
)
def test_index_that_leaves_the_directory_or_names_nothing_is_refused(model, shard):
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError):
        Checkpoint.open(model)


def test_tensor_in_two_shards_is_refused(model):
    (model / "model.safetensors").rename(model / "m1.safetensors")
    save_file({"a": torch.zeros(1)}, model / "m2.safetensors")
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "m1.safetensors", "z": "m2.safetensors"}})
    )
    with pytest.raises(CheckpointError, match="both"):
        Checkpoint.open(model)


def test_tensor_of_the_index_that_no_shard_holds_is_refused(model):
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model.safetensors", "lost": "model.safetensors"}})
    )
    with pytest.raises(CheckpointError, match="lost"):
        Checkpoint.open(model)


def test_fingerprint_tells_models_apart(model):
    before = Checkpoint.open(model).fingerprint()
    assert Checkpoint.open(model).fingerprint() == before
    changed = dict(TENSORS, b=torch.tensor([1.5, -2.5]).bfloat16())
    save_file(changed, model / "model.safetensors", {"format": "pt"})
    assert Checkpoint.open(model).fingerprint() != before


def test_fingerprint_looks_at_every_tensor(tmp_path):
    """Two hundred small tensors between large ones: whichever changes, the fingerprint does."""
    (tmp_path / "config.json").write_text("{}")
    tensors = {
        "large.0": torch.zeros(1 << 20),
        **{f"layer.{number}": torch.zeros(100 + number) for number in range(200)},
        "large.1": torch.zeros(1 << 20),
    }

    def fingerprint(**changed: torch.Tensor) -> str:
        save_file(tensors | changed, tmp_path / "model.safetensors", {"format": "pt"})
        return Checkpoint.open(tmp_path).fingerprint()

    before = fingerprint()
    assert fingerprint() == before
    for name in ("layer.0", "layer.77", "layer.199", "large.0", "large.1"):
        assert fingerprint(**{name: torch.ones_like(tensors[name])}) != before, name


def test_fingerprint_costs_no_more_than_a_tenth_of_a_millisecond_a_tensor(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file(
        {f"tensor.{number}": torch.zeros(2048) for number in range(5000)},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    checkpoint = Checkpoint.open(tmp_path)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        checkpoint.fingerprint()
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 5000 * 1e-4
