"""Hidden states between runs: found again only whole, never larger than the limit, and never the
reason why a result fails.
"""

import os

import pytest
import torch

from quantkit.checkpoint.cache import cache_directory
from quantkit.evaluation.hidden_state_cache import HiddenStateCache

STATES = {0: torch.arange(12.0).reshape(1, 3, 4).bfloat16(), 5: torch.ones(1, 2, 4)}
MADE_FROM = {"model": "a", "tokens": [1, 2]}


def keep(cache: HiddenStateCache, made_from=MADE_FROM, states=STATES):
    return cache.keep(made_from, list(states), states.__getitem__, {"seconds": 1.5})


@pytest.fixture
def cache(tmp_path):
    return HiddenStateCache(tmp_path / "c", 10_000)


def test_what_was_kept_is_found_again(cache):
    assert cache.find(MADE_FROM) is None
    assert keep(cache) is None
    found = cache.find(dict(reversed(MADE_FROM.items())))
    assert found.description["seconds"] == 1.5
    for number, states in STATES.items():
        assert torch.equal(found.get(number), states) and found.get(number).dtype == states.dtype
    assert cache.find({"model": "b"}) is None


@pytest.mark.parametrize(
    "damage", ["cut", "flip", "no description", "empty description", "foreign description"]
)
def test_damage_is_noticed(cache, damage):
    keep(cache)
    (states,), (description,) = (
        cache.directory.glob("*.safetensors"),
        cache.directory.glob("*.json"),
    )
    content = bytearray(states.read_bytes())
    if damage == "cut":
        states.write_bytes(content[:-1])
    elif damage == "flip":
        content[-3] ^= 1
        states.write_bytes(content)
    elif damage == "no description":
        description.unlink()
    else:
        description.write_text("" if damage == "empty description" else "[1]")
    assert cache.find(MADE_FROM) is None
    assert keep(cache) is None and cache.find(MADE_FROM) is not None


def test_what_was_not_used_for_longest_makes_room(tmp_path):
    cache = HiddenStateCache(tmp_path, 1700)
    states = {0: torch.zeros(1, 50, 2)}  # 400 bytes and a header
    for number in range(3):
        assert keep(cache, {"n": number}, states) is None
        for file in tmp_path.iterdir():
            os.utime(file, (file.stat().st_atime, file.stat().st_mtime - 100))
    assert cache.find({"n": 0}) is not None  # used now
    assert keep(cache, {"n": 3}, states) is None
    assert cache.find({"n": 1}) is None
    assert cache.find({"n": 0}) is not None and cache.find({"n": 3}) is not None
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) <= 1700


def test_what_is_too_large_or_has_no_place_is_only_said(tmp_path):
    assert "larger" in keep(HiddenStateCache(tmp_path / "small", 10))
    (tmp_path / "file").write_text("")
    assert "can't be written" in keep(HiddenStateCache(tmp_path / "file" / "c"))


def test_the_place_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("QUANTKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "quantkit"
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "here"))
    assert HiddenStateCache().directory == tmp_path / "here" / "hidden-states"
