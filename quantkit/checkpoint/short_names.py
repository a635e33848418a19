"""Short names of models, for tables and plots: the last component of each path.

Two models of one name get as many components of their paths as tell them apart. Of a snapshot in
the hub's cache, the name is that of the repository, because the last component is a hash.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_SNAPSHOT = re.compile(r"(?:.*/)?models--(?:(.+?)--)?([^/]+)/snapshots/[^/]+")


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Path → short name. Different paths have different names."""
    components = {path: _components(path) for path in paths}
    names = {path: parts[-1] for path, parts in components.items()}
    longest = max((len(parts) for parts in components.values()), default=0)
    for count in range(2, longest + 1):
        seen = list(names.values())
        names = {
            path: "/".join(components[path][-count:]) if seen.count(name) > 1 else name
            for path, name in names.items()
        }
    seen = list(names.values())
    return {path: path if seen.count(name) > 1 else name for path, name in names.items()}


def _components(path: str) -> list[str]:
    snapshot = _SNAPSHOT.fullmatch(path.rstrip("/"))
    if snapshot is not None:
        return [part for part in snapshot.groups() if part]
    return [part for part in path.split("/") if part] or [path]
