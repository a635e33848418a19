"""Recipes: a scheme with exceptions, the algorithms that quantize weights, and the observer that
sets static scales.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantkit.errors import RecipeError
from quantkit.schemes.algorithms import ALGORITHMS, AlgorithmRow
from quantkit.schemes.pattern import Pattern
from quantkit.schemes.quant_spec import quoted
from quantkit.schemes.scheme import QuantScheme


@dataclass(frozen=True)
class Algorithm:
    """One entry of a recipe's `algorithms`. Raises RecipeError for unknown names and settings.

    name: of the algorithm, as in ALGORITHMS.
    settings: (key, value) of settings that differ from the defaults.
    """

    name: str
    settings: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.name not in ALGORITHMS:
            raise RecipeError(
                f"unknown algorithm '{self.name}'; this version has {', '.join(ALGORITHMS)}"
            )
        known = self.row.settings
        for key, value in self.settings:
            if key not in known:
                allowed = f"allowed are {quoted(known)}" if known else "it has none"
                raise RecipeError(f"the algorithm '{self.name}' has no setting '{key}'; {allowed}")
            known[key].require_allowed(value, f"the setting '{key}' of the algorithm '{self.name}'")

    @classmethod
    def parse(cls, entry: Any, where: str) -> Algorithm:
        """From `gptq` or `{gptq: {damping: 0.1}}`."""
        if not isinstance(entry, Mapping):
            return cls(str(entry))
        if len(entry) != 1:
            raise RecipeError(
                f"{where}: algorithms: write each as a name, or as a name with its settings, not"
                f" {dict(entry)!r}"
            )
        name, settings = next(iter(entry.items()))
        if settings is not None and not isinstance(settings, Mapping):
            raise RecipeError(
                f"{where}: algorithms: the settings of '{name}' must be a mapping, not {settings!r}"
            )
        return cls(
            str(name), tuple(sorted((str(key), value) for key, value in (settings or {}).items()))
        )

    def to_description(self) -> Any:
        return {self.name: dict(self.settings)} if self.settings else self.name

    def __getitem__(self, key: str) -> Any:
        """A setting's value, given or default."""
        return dict(self.settings).get(key, self.row.settings[key].default)

    @property
    def row(self) -> AlgorithmRow:
        """The algorithm's row in ALGORITHMS."""
        return ALGORITHMS[self.name]


def _strict_loader() -> type:
    """YAML's safe loader, but it refuses duplicate keys: YAML drops the first without a word."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
            if twice is not None:
                raise yaml.YAMLError(f"the key '{twice}' appears twice")
            return super().construct_mapping(node, deep)

    return Loader


OBSERVERS = ("absmax", "percentile", "mse")
DEFAULT_PERCENTILE = 99.99


@dataclass(frozen=True)
class ObserverChoice:
    """How a static input scale is computed from statistics.

    kind: `absmax`, `percentile` (or `percentile:99.9` in a recipe), or `mse` (least squared error).
    percentile: of |x|, 50 to 100.
    """

    kind: str = "absmax"
    percentile: float = DEFAULT_PERCENTILE

    @classmethod
    def parse(cls, text: Any) -> ObserverChoice:
        kind, given, number = str(text).strip().lower().partition(":")
        if kind not in OBSERVERS or (given and kind != "percentile"):
            raise RecipeError(
                f"unknown observer '{text}'; choose one of {', '.join(OBSERVERS)}, or for example"
                " percentile:99.9"
            )
        try:
            percentile = float(number) if given else DEFAULT_PERCENTILE
        except ValueError:
            percentile = -1.0
        if not 50 <= percentile <= 100:
            raise RecipeError(
                f"the observer '{text}' needs a percentile from 50 to 100, for example"
                " percentile:99.9"
            )
        return cls(kind, percentile)

    def __str__(self) -> str:
        return f"percentile:{self.percentile:g}" if self.kind == "percentile" else self.kind


# A scheme, its name, or a mapping as in a recipe file.
SchemeEntry = QuantScheme | str | Mapping[str, Any]


@dataclass(frozen=True, init=False)
class Recipe:
    """A scheme, with algorithms and exceptions.

    scheme: of every Linear without an exception: its name, or a mapping as in a recipe file.
    algorithms: how weights are quantized, each a name or {name: {setting: value}}; without any,
        weights are rounded to nearest.
    ignore: patterns of Linears that are skipped: names, globs, or `re:` and a regular expression.
    layers: pattern → scheme of exceptions; the first match wins. An entry also applies to Linears
        that are skipped by default (`lm_head`, routers).
    kv_cache: "fp8", or None for an unquantized cache.
    observer: how static input scales are computed from the calibration: "absmax",
        "percentile:P" or "mse".

    The fields hold the parsed values. Raises RecipeError for anything unknown.

        Recipe("int8-dynamic", algorithms=["gptq"], layers={"re:.*down_proj": "fp8-dynamic"})
    """

    scheme: QuantScheme
    algorithms: tuple[Algorithm, ...]
    ignore: tuple[Pattern, ...]
    layers: tuple[tuple[Pattern, QuantScheme], ...]
    kv_cache: str | None
    observer: ObserverChoice

    def __init__(
        self,
        scheme: SchemeEntry,
        algorithms: Iterable[Algorithm | str | Mapping[str, Any]] = (),
        ignore: Iterable[Pattern | str] = (),
        layers: Mapping[str, SchemeEntry] | Iterable[tuple[Pattern | str, SchemeEntry]] = (),
        kv_cache: str | None = None,
        observer: ObserverChoice | str = "absmax",
    ) -> None:
        for name, entries in (("algorithms", algorithms), ("ignore", ignore), ("layers", layers)):
            if isinstance(entries, str):
                raise RecipeError(f"{name} of a recipe must be a list, not the text {entries!r}")
        pairs = layers.items() if isinstance(layers, Mapping) else layers
        values = {
            "scheme": QuantScheme.parse(scheme),
            "algorithms": tuple(
                entry if isinstance(entry, Algorithm) else Algorithm.parse(entry, "recipe")
                for entry in algorithms
            ),
            "ignore": tuple(
                entry if isinstance(entry, Pattern) else Pattern(entry) for entry in ignore
            ),
            "layers": tuple(
                (
                    pattern if isinstance(pattern, Pattern) else Pattern(pattern),
                    QuantScheme.parse(entry, f"layers: {pattern}"),
                )
                for pattern, entry in pairs
            ),
            "kv_cache": kv_cache,
            "observer": (
                observer if isinstance(observer, ObserverChoice) else ObserverChoice.parse(observer)
            ),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        names = [algorithm.name for algorithm in self.algorithms]
        twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
        if twice is not None:
            raise RecipeError(f"the algorithm '{twice}' appears twice; leave one out")
        if self.kv_cache not in (None, "fp8"):
            raise RecipeError(f"unknown kv_cache '{self.kv_cache}'; choose fp8 or leave it out")

    def __repr__(self) -> str:
        """As Python that makes it again; fields with their default are left out."""
        layers = {pattern.text: scheme.to_description() for pattern, scheme in self.layers}
        given = {
            "algorithms": [algorithm.to_description() for algorithm in self.algorithms],
            "ignore": [pattern.text for pattern in self.ignore],
            "layers": layers,
            "kv_cache": self.kv_cache,
            "observer": str(self.observer) if self.observer != ObserverChoice() else None,
        }
        others = "".join(f", {name}={value!r}" for name, value in given.items() if value)
        return f"Recipe({self.scheme.to_description()!r}{others})"

    @classmethod
    def from_mapping(cls, content: Any, where: str) -> Recipe:
        """A recipe from the content of a YAML file. Raises RecipeError.

        where: names the content in errors.
        """
        if not isinstance(content, Mapping):
            raise RecipeError(
                f"{where} is not a recipe: it must be a mapping with at least 'scheme'"
            )
        unknown = set(content) - {
            "scheme",
            "algorithms",
            "ignore",
            "layers",
            "kv_cache",
            "observer",
        }
        if unknown:
            raise RecipeError(
                f"{where} has the unknown key {quoted(unknown)}; allowed are scheme, algorithms,"
                " ignore, layers, kv_cache, observer"
            )
        if content.get("scheme") is None:
            raise RecipeError(f"{where} names no scheme; add for example 'scheme: fp8-dynamic'")
        ignore, layers, algorithms = (
            content.get("ignore") or [],
            content.get("layers") or {},
            content.get("algorithms") or [],
        )
        if isinstance(ignore, str) or not isinstance(ignore, list):
            raise RecipeError(f"{where}: ignore must be a list of patterns, not {ignore!r}")
        if not isinstance(layers, Mapping):
            raise RecipeError(
                f"{where}: layers must be a mapping from a pattern to a scheme, not {layers!r}"
            )
        if not isinstance(algorithms, list):
            raise RecipeError(f"{where}: algorithms must be a list, not {algorithms!r}")
        return cls(
            scheme=QuantScheme.parse(content["scheme"], f"{where}: scheme"),
            algorithms=tuple(Algorithm.parse(entry, where) for entry in algorithms),
            ignore=tuple(Pattern(text) for text in ignore),
            layers=tuple(
                (Pattern(text), QuantScheme.parse(entry, f"{where}: layers: {text}"))
                for text, entry in layers.items()
            ),
            kv_cache=content.get("kv_cache"),
            observer=ObserverChoice.parse(content.get("observer") or "absmax"),
        )

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from a YAML file. Raises RecipeError if there is none, or it is wrong."""
        import yaml

        path = Path(path)
        if not path.is_file():
            raise RecipeError(
                f"there is no recipe file {path}; recipes are YAML files such as those in configs/"
            )
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), _strict_loader())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RecipeError(
                f"{path} is not readable as YAML: {' '.join(str(error).split())}"
            ) from None
        return cls.from_mapping(content, str(path))

    def to_mapping(self) -> dict[str, Any]:
        """The content of a YAML file that `load` reads as this recipe."""
        return {
            "scheme": self.scheme.to_description(),
            "algorithms": [algorithm.to_description() for algorithm in self.algorithms],
            "ignore": [pattern.text for pattern in self.ignore],
            "layers": {pattern.text: scheme.to_description() for pattern, scheme in self.layers},
            "kv_cache": self.kv_cache,
            "observer": str(self.observer),
        }

    def to_json(self) -> dict[str, Any]:
        return self.to_mapping()

    @classmethod
    def from_json(cls, content: Any) -> Recipe:
        """Raises RecipeError as `from_mapping`."""
        return cls.from_mapping(content, "the result's recipe")

    def canonical(self) -> str:
        """Text for fingerprints: equal for recipes that mean the same."""
        # The order of the exceptions is kept: the first match wins.
        layers = [[pattern.text, scheme.to_description()] for pattern, scheme in self.layers]
        return json.dumps(self.to_mapping() | {"layers": layers}, sort_keys=True)

    def with_options(
        self, ignore: Iterable[str] = (), kv_cache: str | None = None, observer: str | None = None
    ) -> Recipe:
        """This recipe with further patterns to ignore, and another KV cache or observer."""
        if isinstance(ignore, str):
            raise RecipeError(f"`ignore` must be a list of patterns, not the text {ignore!r}")
        added = tuple(Pattern(text) for text in ignore)
        choice = self.observer if observer is None else ObserverChoice.parse(observer)
        return replace(
            self, ignore=self.ignore + added, kv_cache=kv_cache or self.kv_cache, observer=choice
        )

    @property
    def schemes(self) -> tuple[QuantScheme, ...]:
        return (self.scheme, *(scheme for _, scheme in self.layers))

    def algorithm(self, name: str) -> Algorithm | None:
        """The algorithm with its settings, or None if the recipe doesn't run it."""
        return next((algorithm for algorithm in self.algorithms if algorithm.name == name), None)

    @property
    def algorithms_in_order(self) -> list[Algorithm]:
        """The algorithms in the order in which they run, whatever their order in the recipe."""
        names = list(ALGORITHMS)
        return sorted(self.algorithms, key=lambda algorithm: names.index(algorithm.name))

    @property
    def quantizes_weights(self) -> bool:
        """Whether weights are quantized during calibration: by all algorithms but rounding to
        nearest.
        """
        return any(algorithm.name != "rtn" for algorithm in self.algorithms)

    @property
    def needs_calibration(self) -> bool:
        return (
            self.kv_cache is not None
            or self.quantizes_weights
            or any(scheme.needs_calibration for scheme in self.schemes)
        )
