"""What goes wrong with files: bits, lengths, pieces out of place; safetensors headers and JSON values that lie.

A mutator takes a random generator and the bytes of a valid file and returns other bytes. `mutators_for(name)` lists those that make sense
for a file of that name.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

Mutator = Callable[[random.Random, bytes], bytes]

# --- bytes ----------------------------------------------------------------------------------------------------------------


def flip_bit(rng: random.Random, raw: bytes) -> bytes:
    changed = bytearray(raw or b"\0")
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_bit_at_the_front(rng: random.Random, raw: bytes) -> bytes:
    front = min(len(raw), 400)
    return flip_bit(rng, raw[:front]) + raw[front:]


def overwrite(rng: random.Random, raw: bytes) -> bytes:
    start = rng.randrange(len(raw) + 1)
    return raw[:start] + rng.randbytes(rng.randint(1, 16)) + raw[start + 16 :]


def truncate(rng: random.Random, raw: bytes) -> bytes:
    return raw[: rng.choice((0, 1, 7, 8, len(raw) - 1, rng.randrange(len(raw) + 1)))]


def extend(rng: random.Random, raw: bytes) -> bytes:
    return raw + rng.choice((b"\0", b"\n", raw, rng.randbytes(50)))


def splice(rng: random.Random, raw: bytes) -> bytes:
    """A piece of the file put into another place, over what was there or between."""
    a, b, size = rng.randrange(len(raw) + 1), rng.randrange(len(raw) + 1), rng.randint(1, max(1, len(raw) // 4))
    return raw[:a] + raw[b : b + size] + raw[a + rng.choice((0, size)) :]


def replaced(rng: random.Random, raw: bytes) -> bytes:
    return rng.choice(
        (b"\xff\xfe" + raw, b"\x00" * 64, b"[" * 100_000, b"null", b"\x80\x04N.", b"PK\x03\x04", rng.randbytes(200))
    )


BYTES: tuple[Mutator, ...] = (flip_bit, flip_bit_at_the_front, overwrite, truncate, extend, splice, replaced)

# --- JSON values ------------------------------------------------------------------------------------------------------------

DEEP, LONG, TWICE = "@@deep@@", "@@long@@", "@@twice@@"
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 2**31, 2**63, 2**64, 10**18, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf"),
    "", "a", "0", "NaN", "../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "(a+)+$", "*" * 60, "x" * 5000, "__class__", "__import__('os')",
    [], [[]], [None], [0] * 300, {}, {"a": {}}, DEEP, LONG, TWICE,
)  # fmt: skip


def nodes(value: Any, found: list[tuple[Any, Any]] | None = None) -> list[tuple[Any, Any]]:
    """Every place in a JSON value: (container, key)."""
    found = [] if found is None else found
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(items):
        found.append((value, key))
        nodes(child, found)
    return found


def change_value(rng: random.Random, value: Any) -> Any:
    """One place of a JSON value changed: another value, a nearby one, gone, renamed, doubled, or swapped with another place."""
    places = nodes(value)
    if not places:
        return rng.choice(HOSTILE)
    container, key = rng.choice(places)
    how = rng.randrange(6)
    if how == 0:
        del container[key]
    elif how == 1 and isinstance(container, dict):
        container[rng.choice(("", "x", "../x", "__class__", "a.b", key + " ", key.upper(), "\ud800"))] = container.pop(
            key
        )
    elif how == 2:
        other, there = rng.choice(places)
        container[key], other[there] = json.loads(json.dumps(other[there])), json.loads(json.dumps(container[key]))
    elif how == 3 and isinstance(container[key], int | float):
        container[key] = rng.choice(
            (container[key] + 1, container[key] - 1, -container[key], container[key] * 2**40, str(container[key]))
        )
    elif how == 4 and isinstance(container, list):
        container.insert(key, json.loads(json.dumps(container[key])))
    else:
        container[key] = rng.choice(HOSTILE)
    return value


def dumped(value: Any) -> bytes:
    """JSON text with what `json.dumps` cannot write: depth without end, whole numbers of 5,000 digits, a name twice."""
    text = json.dumps(value)
    text = text.replace(f'"{DEEP}"', "[" * 50_000 + "]" * 50_000).replace(f'"{LONG}"', "9" * 5_000)
    return text.replace(f'"{TWICE}"', '{"a": 1, "a": 2}').encode()


def json_value(rng: random.Random, raw: bytes) -> bytes:
    return dumped(change_value(rng, json.loads(raw)))


def json_lines(rng: random.Random, raw: bytes) -> bytes:
    lines = raw.split(b"\n")
    place = rng.randrange(len(lines))
    lines[place] = json_value(rng, lines[place] or b"{}")
    return b"\n".join(lines)


# --- safetensors --------------------------------------------------------------------------------------------------------------


def taken_apart(raw: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def put_together(header: Any, data: bytes) -> bytes:
    text = dumped(header)
    return len(text).to_bytes(8, "little") + text + data


def header_value(rng: random.Random, raw: bytes) -> bytes:
    header, data = taken_apart(raw)
    return put_together(change_value(rng, header), data)


def header_length(rng: random.Random, raw: bytes) -> bytes:
    length = int.from_bytes(raw[:8], "little")
    return rng.choice((0, 1, length - 1, length + 1, len(raw), 2**40, 2**63, 2**64 - 1)).to_bytes(8, "little") + raw[8:]


def metadata_value(rng: random.Random, raw: bytes) -> bytes:
    """A value inside a JSON document that stands as text in the metadata."""
    header, data = taken_apart(raw)
    metadata = header.get("__metadata__", {})
    inner = [name for name, text in metadata.items() if text[:1] in "[{"]
    if not inner:
        return header_value(rng, raw)
    name = rng.choice(inner)
    metadata[name] = dumped(change_value(rng, json.loads(metadata[name]))).decode()
    return put_together(header, data)


def tensor_swap(rng: random.Random, raw: bytes) -> bytes:
    """Two tensors change places, names, shapes or types; or one gets a hostile name."""
    header, data = taken_apart(raw)
    names = [name for name in header if name != "__metadata__"]
    if not names:
        return flip_bit(rng, raw)
    a, b = rng.choice(names), rng.choice(names)
    how = rng.randrange(5)
    if how == 0:
        header[a], header[b] = header[b], header[a]
    elif how < 3:
        field = ("data_offsets", "shape")[how - 1]
        header[a][field], header[b][field] = header[b][field], header[a][field]
    elif how == 3:
        header[a]["dtype"] = rng.choice(("F32", "I32", "BF16", "BOOL", "F8_E4M3", "U8", "F64", "X", 3))
    else:
        header[rng.choice(("", "../x", "__class__.x", "a" * 3000, "x.weight", "\u2028"))] = header.pop(a)
    return put_together(header, data)


def data_bit(rng: random.Random, raw: bytes) -> bytes:
    _, data = taken_apart(raw)
    return raw[: len(raw) - len(data)] + (flip_bit(rng, data) if data else b"\0")


JSON: tuple[Mutator, ...] = (json_value, json_value, json_value)
LINES: tuple[Mutator, ...] = (json_lines, json_lines)
SAFETENSORS: tuple[Mutator, ...] = (header_value, header_length, metadata_value, metadata_value, tensor_swap, data_bit)


def mutators_for(name: str) -> tuple[Mutator, ...]:
    if name.endswith((".safetensors", ".sparse")):
        return BYTES + SAFETENSORS
    if name.endswith(".jsonl"):
        return BYTES + LINES
    return BYTES + JSON if name.endswith(".json") else BYTES


def mutated(rng: random.Random, name: str, raw: bytes) -> tuple[str, bytes]:
    """What was done, and the file after it. A mutator that does not fit what an earlier one left does bytes instead."""
    mutator = rng.choice(mutators_for(name))
    try:
        return mutator.__name__, mutator(rng, raw)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError):
        return "flip_bit", flip_bit(rng, raw)
