"""Damage, seeded: to bytes, to JSON, to safetensors headers and to values. The same seed gives the same
damage.
"""

from __future__ import annotations

import json
import math
import random
import struct
from typing import Any

NUMBERS = [-(2**63), -1, 0, 1, 2, 3, 255, 2**16, 2**31 - 1, 2**31, 2**62, 2**64, 10**30]
BLOBS = [
    b"",
    b"\x00" * 64,
    b"\xff" * 64,
    b"RIFF",
    b"\x89PNG\r\n\x1a\n",
    b"GIF89a",
    b"ftypisom",
    b"%!PS-Adobe-3.0\n",
]
ODD_JSON = [
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    10**30,
    1e308,
    math.nan,
    math.inf,
    "",
    "x",
    "F32",
    "\x00",
    "../../etc/x",
]
ODD_JSON += [[], [[]], [-1], [2**62], {}, {"a": {}}, [None] * 50, "(a+)+$", "é" * 300]


def damage(data: bytes, rng: random.Random, donor: bytes = b"") -> bytes:
    """Bytes with one to fifty faults: flips, numbers where lengths may be, cuts, repeats, pieces of another
    file.
    """
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8, 50])):
        at = rng.randrange(len(out)) if out else 0
        kind = rng.randrange(9)
        if kind == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and out:
            out[at] = rng.randrange(256)
        elif kind == 2:
            form = rng.choice(["<I", ">I", "<Q", ">Q", "<H", ">H"])
            number = rng.choice(NUMBERS) % 2 ** (8 * struct.calcsize(form))
            out[at : at + struct.calcsize(form)] = struct.pack(form, number)
        elif kind == 3 and rng.random() < 0.5:
            del out[at:]
        elif kind == 4:
            del out[at : at + rng.choice([1, 2, 4, 16, 500])]
        elif kind == 5:
            piece = bytes(out[at : at + rng.choice([4, 32, 400])])
            place = rng.randrange(len(out) + 1)
            out[place:place] = piece * rng.choice([1, 2, 20])
        elif kind == 6:
            out[at:at] = rng.choice([*BLOBS, rng.randbytes(rng.randrange(64))])
        elif kind == 7 and donor:
            start = rng.randrange(len(donor))
            out[at:] = donor[start:]
        elif out:
            out[: rng.randrange(1, 16)] = b""
    return bytes(out)


def damage_json(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """A JSON value with something inside dropped, renamed, copied over another or replaced."""
    if isinstance(value, dict) and value and (depth == 0 or rng.random() < 0.85):
        key, out = rng.choice(list(value)), dict(value)
        kind = rng.randrange(8)
        if kind == 0:
            del out[key]
        elif kind == 1:
            out[rng.choice(["", key + "x", key.upper(), "\x00", key * 40, "__metadata__"])] = out.pop(key)
        elif kind == 2:
            out[rng.choice(list(value))] = value[key]
        elif kind == 3:
            out[key] = rng.choice(ODD_JSON)
        else:
            out[key] = damage_json(value[key], rng, depth + 1)
        return out
    if isinstance(value, list) and value and rng.random() < 0.8:
        out_list = list(value)
        at = rng.randrange(len(out_list))
        kind = rng.randrange(4)
        if kind == 0:
            del out_list[at]
        elif kind == 1:
            out_list[at:at] = [out_list[at]] * rng.choice([1, 5])
        else:
            out_list[at] = damage_json(out_list[at], rng, depth + 1)
        return out_list
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.6:
        return rng.choice([*NUMBERS, value + 1, value - 1, -value, 2 * value, float(value), str(value)])
    return rng.choice(ODD_JSON)


def damage_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header is still JSON and says something else."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for _ in range(rng.choice([1, 1, 2, 4])):
        header = damage_json(header, rng)
    text = json.dumps(header).encode()
    said = (
        len(text)
        if rng.random() < 0.9
        else rng.choice([0, 1, len(text) - 1, len(text) + 9, 2**40, 2**64 - 1])
    )
    return struct.pack("<Q", said) + text + data[8 + length :]
