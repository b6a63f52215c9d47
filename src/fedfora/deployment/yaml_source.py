"""From a handwritten YAML file to values whose mistakes are reported with file, line and key."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from fedfora.config import read_yaml
from fedfora.registry import unknown

Keys = tuple[str, ...]


class YamlSource:
    """What a YAML file holds, and on which line each key stands.

    Args:
        path: The file; its outermost level must be a mapping.

    Raises:
        ValueError: If it cannot be read, is not valid YAML, or names a key twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = read_yaml(path)
        self.root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        if not isinstance(content, dict):
            raise ValueError(f"{path}: expected keys and values, as in `federation: clinics`")
        self.content: dict[str, Any] = content
        self._refuse_doubles(self.root, ())

    def error(self, keys: Keys, text: str) -> ValueError:
        """Return the error to raise about the value at `keys`."""
        where = f"{self.path}, line {self._line(keys)}"
        return ValueError(f"{where}: {'.'.join(keys)}: {text}" if keys else f"{where}: {text}")

    def mapping(self, keys: Keys, *, empty: bool = False) -> dict[str, Any]:
        """Return the mapping at `keys`; where it may be empty, it may also be absent.

        Raises:
            ValueError: If it is something else.
        """
        value = self._at(keys)
        if value in (None, {}) and empty:
            return {}
        if not isinstance(value, dict) or not value:
            raise self.error(keys, f"expected keys and values, got {value!r}")
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise self.error(keys, f"the key {wrong[0]!r} is not text; put it in quotes")
        return value

    def check_keys(self, keys: Keys, *, needed: Iterable[str], allowed: Iterable[str] = ()) -> None:
        """Raise where a key of the mapping at `keys` is missing or unknown."""
        value = self.mapping(keys) if keys else self.content
        known = [*needed, *allowed]
        for key in value:
            if key not in known:
                raise self.error((*keys, str(key)), unknown("key", str(key), known))
        if missing := [key for key in needed if value.get(key) is None]:
            raise self.error(keys, f"{missing[0]} is missing")

    def text(self, keys: Keys) -> str:
        """Return the text at `keys`; raise if it is empty or not a text."""
        value = self._at(keys)
        if not isinstance(value, str) or not value.strip():
            raise self.error(keys, f"expected text, got {value!r}")
        return value

    def integer(self, keys: Keys, low: int, high: int, default: int | None = None) -> int:
        """Return the whole number at `keys`; raise if it is not one, or not in [low, high]."""
        value = self._at(keys)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(keys, f"expected a whole number from {low} to {high}, got {value!r}")
        return value

    def _at(self, keys: Keys) -> Any:
        value: Any = self.content
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def _line(self, keys: Keys) -> int:
        """Return the line of the innermost of `keys` that is there."""
        node, line = self.root, 1
        for key in keys:
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            matches = [pair for pair in pairs if pair[0].value == key]
            if not matches:
                break
            line, node = matches[0][0].start_mark.line + 1, matches[0][1]
        return line

    def _refuse_doubles(self, node: Any, keys: Keys) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            if name in seen:
                line = key.start_mark.line + 1
                raise ValueError(f"{self.path}, line {line}: {'.'.join((*keys, name))}: twice")
            seen.add(name)
            self._refuse_doubles(value, (*keys, name))
