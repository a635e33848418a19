"""The directory of cached files."""

from quantkit.checkpoint.cache import cache_directory
from quantkit.evaluation.hidden_state_cache import HiddenStateCache


def test_the_place_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("QUANTKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "quantkit"
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "here"))
    assert HiddenStateCache().directory == tmp_path / "here" / "hidden-states"
