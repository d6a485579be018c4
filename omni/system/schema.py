"""Untrusted trees of settings laid over typed dataclasses, and the hashes of settings.

Unknown keys and wrong types are errors that name the nearest valid key.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import reprlib
import types
import typing
from typing import Any, Literal

import yaml

from omni.errors import OmniError

__all__ = ["Shorthand", "apply_settings", "digest", "parse_yaml", "shorten", "to_dict"]


class Shorthand:
    """Base of a group of settings whose first field alone may be given, as a bare value."""


def apply_settings(settings: Any, changes: Any, where: str) -> Any:
    """A copy of a dataclass with a nested mapping laid over it.

    Args:
        settings: nested dataclasses.
        changes: nested mapping of some of their fields, untrusted.
        where: name of the source of the changes, for messages.

    Raises:
        OmniError: a key that does not exist (naming the nearest) or a value of another type.
    """
    return _apply(settings, changes, where, "", type(settings))


def _apply(config: Any, changes: Any, where: str, prefix: str, root: type) -> Any:
    if not isinstance(changes, dict):
        raise OmniError(f"{where}: {prefix.rstrip('.') or 'the file'} must be a mapping of keys")
    hints = typing.get_type_hints(type(config))
    new = {}
    for key, value in changes.items():
        if key not in hints:
            name = key if isinstance(key, str) else shorten(key)
            near = _suggest(root, name[:80], prefix)
            raise OmniError(f"{where}: unknown key {prefix}{name:.80}{near}")
        current = getattr(config, key)
        if dataclasses.is_dataclass(current) and isinstance(value, dict):
            new[key] = _apply(current, value, where, f"{prefix}{key}.", root)
        elif isinstance(current, Shorthand):
            first, hint = next(iter(typing.get_type_hints(type(current)).items()))
            value = _coerce(value, hint, f"{where}: {prefix}{key}")
            new[key] = type(current)(**{first: value})
        else:
            new[key] = _coerce(value, hints[key], f"{where}: {prefix}{key}")
    return dataclasses.replace(config, **new)


def to_dict(config: Any) -> dict:
    """Nested plain dict of a config, with JSON- and YAML-safe values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def digest(*parts: Any) -> str:
    """Short stable hash of JSON-safe values: the key under which a stage's output is cached."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse_yaml(text: str, where: str) -> Any:
    """What untrusted YAML text holds.

    Raises:
        OmniError: it cannot be read; its message starts with `where`, the source of the text.
    """
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, AttributeError) as error:
        # Not only its own errors: numbers too long, dates that do not exist, keys that are lists.
        reason = " ".join(str(error).split())[:300]
        raise OmniError(f"{where} cannot be read: {reason}") from None


def shorten(value: Any) -> str:
    """Text of bounded length: YAML's aliases write a list of a billion entries in ten lines."""
    return reprlib.repr(value)


def _suggest(root: type, key: str, prefix: str) -> str:
    every = _all_keys(root)
    near = difflib.get_close_matches(prefix + key, every, 1, 0.6)
    near = near or [name for name in every if name.split(".")[-1] == key][:1]
    near = near or difflib.get_close_matches(key, [n.split(".")[-1] for n in every], 1)
    return f" (nearest valid key: {near[0]})" if near else ""


def _all_keys(schema: Any, prefix: str = "") -> list[str]:
    names = []
    for name, hint in typing.get_type_hints(schema).items():
        names.append(prefix + name)
        if dataclasses.is_dataclass(hint):
            names += _all_keys(hint, f"{prefix}{name}.")
    return names


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as type `hint`. PyYAML reads 3e-5 as text and `no` as False, hence by field type."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        options = typing.get_args(hint)
        value = "none" if value is None and "none" in options else value
        if value not in options:
            raise OmniError(f"{where} must be one of {', '.join(options)}, not {shorten(value)}")
        return value
    if origin is tuple:
        inner = typing.get_args(hint)
        if not isinstance(value, list | tuple) or len(value) != len(inner):
            raise OmniError(f"{where} must be a list of {len(inner)} numbers, not {shorten(value)}")
        return tuple(_coerce(v, t, where) for v, t in zip(value, inner, strict=True))
    if isinstance(hint, types.UnionType) or dataclasses.is_dataclass(hint):
        raise OmniError(f"{where} must be a mapping of keys, not {shorten(value)}")
    if hint in (int, float) and isinstance(value, int | float | str) and type(value) is not bool:
        number = _finite(value)
        if number is not None and (hint is float or number == int(number)):
            return value if type(value) is hint else hint(number)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str):
        return value
    raise OmniError(f"{where} must be of type {hint.__name__}, not {shorten(value)}")


def _finite(value: int | float | str) -> float | None:
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
