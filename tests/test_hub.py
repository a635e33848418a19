import pytest

from quantkit.errors import CheckpointError
from quantkit.hub import resolve_model


def test_a_path_is_never_taken_for_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert str(resolve_model("models/typo")) == "models/typo"
    assert str(resolve_model("./typo")) == "typo"


def test_unreachable_hub_id_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="hub id"):
        resolve_model("no-such-org-here/no-such-model")
