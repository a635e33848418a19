"""The mapping from a checkpoint's tensors to a model's parameters, by transformers' own rules:
prefixes, renamings, merged experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ParameterSource:
    """The stored tensors that make one parameter: one tensor, or lists of equal length that
    transformers merges (experts).

    lists: for each kind of tensor (gate_proj, up_proj), its tensors in the order in which they are
        stacked.
    """

    lists: tuple[tuple[str, ...], ...]


class WeightMap:
    """transformers' mapping from a checkpoint's names to a model's, computed before anything is
    loaded.

    model: a PreTrainedModel on the meta device.
    names: the checkpoint's tensors.
    conversions: transformers' rules for this model.
    target_of: tensor → parameter; the first one, if the tensor becomes several.
    unexpected: tensors without a parameter.
    mapped: parameters that a tensor makes.
    shared: parameter → the parameter as which it is stored.
    sources: parameter → the tensors that make it.
    """

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

        self.conversions: list[Any] = get_model_conversion_mapping(model)
        expected = model.state_dict()
        renamings = [entry for entry in self.conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self.conversions if isinstance(entry, WeightConverter)]
        by_pattern = {
            pattern: converter for converter in converters for pattern in converter.source_patterns
        }
        self.target_of: dict[str, str] = {}
        self.unexpected: list[str] = []
        patterns: dict[str, dict[str, list[str]]] = {}
        self.mapped: set[str] = set()
        self._plain: set[str] = set()
        # modules in which a tensor is split into several parameters
        self._split_under: set[str] = set()
        for name in names:
            target, pattern = rename_source_key(
                name, renamings, converters, model.base_model_prefix, expected
            )
            if target not in expected and name in expected:
                target, pattern = rename_source_key(name, [], [], model.base_model_prefix, expected)
            if target not in expected:
                self.unexpected.append(name)
                continue
            self.target_of[name] = target
            self.mapped.add(target)
            patterns.setdefault(target, {}).setdefault(pattern or name, []).append(name)
            if pattern is None:
                self._plain.add(target)
            elif len(by_pattern[pattern].target_patterns) > 1:
                self._split_under.add(".".join(target.split(".")[:-2]))
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        # Parameters that are stored under another one's name: output heads, and blocks that run
        # several times (Zamba's). The other one is loaded without conversion, at most renamed.
        self.shared = {
            target: source
            for target, source in tied.items()
            if target not in self.mapped and source in self._plain
        }
        self.sources = {
            target: ParameterSource(tuple(tuple(_in_order(tensors)) for tensors in by.values()))
            for target, by in patterns.items()
        }

    def is_split(self, parameter: str) -> bool:
        """Whether the parameter's tensor makes other parameters too."""
        return any(parameter.startswith(f"{module}.") for module in self._split_under)

    def is_plain(self, parameter: str) -> bool:
        """Whether the parameter's tensor is loaded without conversion, at most renamed."""
        return parameter in self._plain

    def is_made(self, parameter: str) -> bool:
        """Whether the checkpoint has the parameter."""
        return parameter in self.mapped or self.is_split(parameter)


def _in_order(names: Sequence[str]) -> list[str]:
    from transformers.core_model_loading import dot_natural_key

    return sorted(names, key=dot_natural_key)


def names_on_disk(source: ParameterSource | None, name: str) -> list[str]:
    """The checkpoint's Linears from which a Linear of the module tree is made.

    source: of its weight; None for a Linear that has the same name in the checkpoint.
    """
    if source is None:
        return [name]
    return [tensor.removesuffix(".weight") for tensors in source.lists for tensor in tensors]
