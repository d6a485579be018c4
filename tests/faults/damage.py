"""Damaged and hostile files, made of valid ones as a plan describes; Hypothesis draws the plans."""

import io
import json
import zipfile

from hypothesis import strategies as st

MAGIC = [
    b"",
    b"\x00" * 8,
    b"\xff" * 8,
    b"\xff\xff\xff\x7f",
    b"\x00\x00\x00\x00\x01\x00\x00\x00",
    b"99999999999",
    b"-1",
    b"1e999",
    b"nan",
    b"../../../escaped",
    b"(4294967296,)",
    b"'|O'",
    b"\x80\x04\x95",
    b"cos\nsystem\n(S'touch escaped'\ntR.",
    b"[" * 3000,
    b"*a",
    b"&a [*a]",
]
WEIRD = [
    *(None, True, -1, 0, 1 << 70, -(10**400), 0.5, 1e308, float("nan"), float("inf")),
    *("", "../../../escaped", "/escaped", "x" * 5000, "\x00\x1b[31m", "9" * 5000, "1e400"),
    *([], {}, [[]], [[1, 2]], {"a": {"b": []}}, [1e9] * 3, "!!python/object:os.system"),
]

edits = st.lists(
    st.tuples(
        st.sampled_from(["overwrite", "insert", "cut", "truncate", "double", "move"]),
        st.integers(0, 1 << 24),
        st.integers(0, 1 << 24),
        st.sampled_from(MAGIC) | st.binary(max_size=8),
    ),
    min_size=1,
    max_size=5,
)
plans = st.tuples(
    st.integers(0, 1 << 10),
    st.sampled_from(["surface", "inside", "values", "keys"]),
    st.integers(0, 1 << 16),
    st.sampled_from(WEIRD),
    edits,
)


def edited(data, changes):
    for kind, where, length, value in changes:
        at = where % (len(data) + 1)
        span = length % 64 if length % 2 else length % (len(data) + 1)
        if kind == "overwrite":
            data = data[:at] + value + data[at + len(value) :]
        elif kind == "insert":
            data = data[:at] + value + data[at:]
        elif kind == "cut":
            data = data[:at] + data[at + span :]
        elif kind == "truncate":
            data = data[:at]
        elif kind == "double" and len(data) < 1 << 20:
            data = data[:at] + data[at : at + span] * 2 + data[at + span :]
        elif kind == "move":
            data = data[:at] + data[at + span :] + data[at : at + span]
    return data


def paths_of(tree, prefix=()):
    yield prefix
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from paths_of(value, (*prefix, key))


def with_value(tree, path, value):
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = with_value(tree[path[0]], path[1:], value)
    return copy


def with_key(tree, path, key):
    """The tree with the last key of `path` renamed; an entry of a list is dropped."""
    if not path:
        return [tree]
    if len(path) > 1:
        return with_value(tree, path[:1], with_key(tree[path[0]], path[1:], key))
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    value = copy.pop(path[0])
    if isinstance(copy, dict):
        copy[key if isinstance(key, str) else repr(key)] = value
    return copy


def changed(tree, kind, where, value):
    paths = list(paths_of(tree))
    return (with_key if kind == "keys" else with_value)(tree, paths[where % len(paths)], value)


def crafted(seeds, plan, repair=lambda data: data):
    """The file that a plan makes of one of the seeds."""
    which, kind, where, value, changes = plan
    data = seeds[which % len(seeds)]
    if kind in ("values", "keys"):
        try:
            tree = json.loads(data)
        except ValueError:
            kind = "inside"
        else:
            return repair(json.dumps(changed(tree, kind, where, value)).encode())
    if kind == "inside" and data[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parts = [(member.filename, archive.read(member)) for member in archive.infolist()]
        name, part = parts[where % len(parts)]
        parts[where % len(parts)] = name, edited(part, changes)
        out, packed = io.BytesIO(), zipfile.ZIP_DEFLATED if which % 5 == 0 else zipfile.ZIP_STORED
        with zipfile.ZipFile(out, "w", packed) as archive:
            for name, part in parts:
                archive.writestr(name, part)
        return out.getvalue()
    data = edited(data, changes)
    return repair(data) if kind == "inside" else data


def flip(path, position):
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
