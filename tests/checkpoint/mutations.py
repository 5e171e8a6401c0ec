"""Seeded mutations: what a disk, a network, or somebody who means ill can do to a run's files."""

import io
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from tests.checkpoint.forge import archive_of, comment_of, records_of, seal

_EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF)
# A directory's entry, from its signature: what a reader of the archive trusts.
_ENTRY_FIELDS = {8: "H", 10: "H", 16: "I", 20: "I", 24: "I", 28: "H", 30: "H", 32: "H", 42: "I"}
_END_FIELDS = {4: "H", 6: "H", 8: "H", 10: "H", 12: "I", 16: "I", 20: "H"}
_END64_FIELDS = {4: "Q", 16: "I", 20: "I", 24: "Q", 32: "Q", 40: "Q", 48: "Q"}


def mutate_bytes(draw: Random, content: bytes, donor: bytes) -> bytes:
    """Changes a file in one to three ways; `donor` is another file, whose parts may be taken."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        content = draw.choice(_BYTES)(draw, content, donor)
    return content


def _span(draw: Random, content: bytes) -> tuple[int, int]:
    start = draw.randrange(len(content) + 1)
    return start, min(len(content), start + draw.choice((1, 2, 4, 16, 100, len(content))))


def _flip(draw: Random, content: bytes, donor: bytes) -> bytes:
    new = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 8)) if content else 0):
        new[draw.randrange(len(new))] ^= 1 << draw.randrange(8)
    return bytes(new)


def _cut(draw: Random, content: bytes, donor: bytes) -> bytes:
    start, end = _span(draw, content)
    return content[:start] + content[end:]


def _truncate(draw: Random, content: bytes, donor: bytes) -> bytes:
    return content[: draw.randrange(len(content) + 1)]


def _insert(draw: Random, content: bytes, donor: bytes) -> bytes:
    start, _ = _span(draw, content)
    return content[:start] + draw.randbytes(draw.choice((1, 4, 50))) + content[start:]


def _repeat(draw: Random, content: bytes, donor: bytes) -> bytes:
    start, end = _span(draw, content)
    return content[:end] * draw.choice((1, 2)) + content[start:end] + content[end:]


def _swap(draw: Random, content: bytes, donor: bytes) -> bytes:
    a, b, c, d = sorted(draw.randrange(len(content) + 1) for _ in range(4))
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def _blank(draw: Random, content: bytes, donor: bytes) -> bytes:
    start, end = _span(draw, content)
    return content[:start] + draw.choice((b"\0", b"\xff", b" ")) * (end - start) + content[end:]


def _splice(draw: Random, content: bytes, donor: bytes) -> bytes:
    start, end = _span(draw, content)
    return content[:start] + donor[start:end] + content[end:]


def _extreme(draw: Random, content: bytes, donor: bytes) -> bytes:
    layout = draw.choice("BHIQ")
    start = draw.randrange(len(content) + 1)
    number = struct.pack(
        f"<{layout}", draw.choice(_EXTREMES) & (2 ** (8 * struct.calcsize(layout)) - 1)
    )
    return content[:start] + number + content[start + len(number) :]


_BYTES: tuple[Callable[[Random, bytes, bytes], bytes], ...] = (
    *(_flip, _flip, _flip, _cut, _truncate, _insert, _repeat, _swap, _blank, _splice, _extreme),
)


def evil_pickle(draw: Random, canary: Path) -> bytes:
    """A pickle that makes the folder `canary` when somebody unpickles it as Python does."""
    name = str(canary).encode()
    text = b"X" + struct.pack("<I", len(name)) + name
    code = f"__import__('os').makedirs({str(canary)!r}, exist_ok=True)".encode()
    code = b"X" + struct.pack("<I", len(code)) + code
    run = draw.choice(
        (
            b"cos\nmakedirs\n(" + text + b"tR",
            b"cposix\nmkdir\n" + text + b"\x85R",
            b"\x8c\x02os\x8c\x08makedirs\x93" + text + b"\x85R",
            b"(" + text + b"ios\nmakedirs\n",
            b"cbuiltins\neval\n" + code + b"\x85R",
            b"cbuiltins\ngetattr\ncos\nsystem\n" + text + b"\x86R",
            b"ctorch._utils\n_rebuild_tensor\ncos\nmakedirs\n" + text + b"\x86R",
            b"ccollections\nOrderedDict\n)R}" + b"X\x05\0\0\0items" + b"cos\nmakedirs\nsb",
        )
    )
    return b"\x80\x02}(X\x05\0\0\0model" + run + b"u."


def mutate_archive(draw: Random, archive: bytes, donor: bytes, canary: Path) -> bytes:
    """Changes a zip archive as one who knows the format does: its records, or its directory."""
    return draw.choice((_edit_record, _edit_record, _edit_directory, _repack, _bomb, _poison))(
        draw, archive, donor, canary
    )


def _edit_record(draw: Random, archive: bytes, donor: bytes, canary: Path) -> bytes:
    records = records_of(archive)
    # Most of all what torch reads first.
    name = draw.choice([*records, *[n for n in records if n.endswith("data.pkl")] * 10])
    change = draw.choice(("mutate", "mutate", "mutate", "drop", "rename"))
    content = records.pop(name)
    if change == "mutate":
        content = mutate_bytes(draw, content, donor)
    elif change == "rename":
        name = draw.choice(("../../x", "/etc/passwd", "a/../b", name.upper(), "x" * 3000, " "))
    return archive_of(records if change == "drop" else {**records, name: content})


def _edit_directory(draw: Random, archive: bytes, donor: bytes, canary: Path) -> bytes:
    starts = {b"PK\1\2": _ENTRY_FIELDS, b"PK\5\6": _END_FIELDS, b"PK\6\6": _END64_FIELDS}
    start = draw.choice(list(starts))
    places = [match.start() for match in re.finditer(re.escape(start), archive)]
    offset, layout = draw.choice(list(starts[start].items()))
    size = struct.calcsize(layout)
    new = bytearray(archive)
    at = draw.choice(places) + offset
    old = int.from_bytes(new[at : at + size], "little")
    value = draw.choice((*_EXTREMES, old + 1, old - 1, old * 2, 8, 9, 99)) % 2 ** (8 * size)
    new[at : at + size] = value.to_bytes(size, "little")
    return bytes(new)


def _repack(draw: Random, archive: bytes, donor: bytes, canary: Path) -> bytes:
    items = list(records_of(archive).items())
    draw.shuffle(items)
    kinds = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    return archive_of(dict(items), draw.choice(kinds))


def _bomb(draw: Random, archive: bytes, donor: bytes, canary: Path) -> bytes:
    """One record of zeros, or a number in the pickle that claims more than there is."""
    records = records_of(archive)
    name = draw.choice(list(records))
    if draw.random() < 0.5:
        return archive_of({**records, name: bytes(1 << 24)}, zipfile.ZIP_DEFLATED)
    (pickled,) = (n for n in records if n.endswith("data.pkl"))
    numbers = [m.start() for m in re.finditer(rb"K.", records[pickled], re.DOTALL)]
    at = draw.choice(numbers)
    huge = b"\x8a\x08" + draw.choice(_EXTREMES[4:]).to_bytes(8, "little")
    content = records[pickled]
    return archive_of({**records, pickled: content[:at] + huge + content[at + 2 :]})


def _poison(draw: Random, archive: bytes, donor: bytes, canary: Path) -> bytes:
    records = records_of(archive)
    (name,) = (n for n in records if n.endswith("data.pkl"))
    evil, content = evil_pickle(draw, canary), records[name]
    if draw.random() < 0.5:
        at = draw.randrange(2, len(content))
        evil = content[:at] + evil[2:-2] + content[at:]
    if draw.random() < 0.2:
        return archive_of({**records, name.replace("data", "constants"): evil})
    return archive_of({**records, name: evil})


_ODD_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2, 1.5, 2**53, 2**63, 2**64, -(2**70), 1e308, float("nan"), "", "x"),
    *("../../x", "/etc/passwd", "9" * 5000, "\0", "\ud800", [], [1], {}, {"a": 1}, [[[[]]]]),
)


def mutate_manifest(draw: Random, entries: dict[str, Any], donor: bytes) -> bytes:
    """The comment of a manifest whose checksum is right, of an archive that may be sound."""
    entries = dict(entries)
    key = draw.choice(list(entries))
    change = draw.choice(("value", "value", "value", "drop", "add", "other", "text", "deep"))
    if change == "value":
        entries[key] = draw.choice(_ODD_VALUES)
    elif change == "drop":
        del entries[key]
    elif change == "add":
        entries[draw.choice(("surprise", "path", "__class__", "self"))] = draw.choice(_ODD_VALUES)
    text = json.dumps(draw.choice(_ODD_VALUES) if change == "other" else entries).encode()
    if change == "text":
        text = mutate_bytes(draw, text, donor)
    elif change == "deep":
        text = b'{"schema": ' + b"[" * draw.choice((10, 30_000))
    return comment_of(text)[:60_000]


def forge(
    draw: Random, archive: bytes, entries: dict[str, Any], donor: bytes, canary: Path
) -> bytes:
    """A checkpoint with right checksums that is not what anybody saved."""
    kind = draw.choice(("archive", "archive", "archive", "manifest", "bare", "legacy"))
    if kind == "archive":
        return seal(mutate_archive(draw, archive, donor, canary))
    if kind == "manifest":
        comment = mutate_manifest(draw, entries, donor)
        return archive[:-2] + len(comment).to_bytes(2, "little") + comment
    if kind == "bare":
        return evil_pickle(draw, canary)
    buffer = io.BytesIO()
    torch.save({"model": {}}, buffer, _use_new_zipfile_serialization=False)
    # The format before zip: three pickles of torch's own, then the data's.
    content = buffer.getvalue()
    at = content.index(pickle.dumps({"model": {}}, protocol=2)[:10])
    return content[:at] + evil_pickle(draw, canary)


_TOKENS = (
    *(
        "5",
        "-1",
        "0.5",
        "1e400",
        "inf",
        ".nan",
        "true",
        "null",
        "~",
        "''",
        "x",
        "[]",
        "{}",
        "[[1]]",
    ),
    *("[1, x, null]", "{a: 1}", "0x" + "f" * 5000, "9" * 400, "9" * 5000, "2020-01-01", "1:30:0"),
    *("!!python/object/apply:os.makedirs [{canary}]", "!!python/name:os.system", "!!bool x"),
    *("!!python/object/new:os.makedirs [{canary}]", "!!python/module:os", "!!set {{a}}", "!x y"),
    *("!!binary aGk=", "!!omap [a: 1]", "&a [*a]", "*nowhere", "&a x", "<<: *a", "| \n   x", "@"),
    *('"\\ud800"', '"\\0"', "__import__('os').makedirs('{canary}')", "(" * 300, "[" * 300),
)


def mutate_config(draw: Random, text: str, donor: str, canary: Path) -> bytes:
    """Changes a config's lines, keys and values, or its bytes."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        lines = text.splitlines()
        at = draw.randrange(len(lines))
        key, colon, value = lines[at].partition(":")
        token = draw.choice(_TOKENS).replace("{canary}", str(canary)).replace("{{", "{")
        change = draw.choice(("value", "value", "value", "key", "line", "indent", "swap", "base"))
        if change == "value" and colon:
            lines[at] = f"{key}: {token.replace('}}', '}')}"
        elif change == "key":
            lines[at] = f"{draw.choice((key + 'S', token, key.lower(), '__class__'))}{colon}{value}"
        elif change == "line":
            lines.insert(at, draw.choice(donor.splitlines()))
        elif change == "indent":
            lines[at] = " " * draw.randrange(6) + lines[at].strip()
        elif change == "swap":
            other = draw.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        elif change == "base":
            bases = ("config.yaml", "[]", "[5]", "none.yaml", "/dev/null", "..", f"http://x/{at}")
            lines.insert(0, f"_BASE_: {draw.choice((*bases, token))}")
        text = "\n".join(lines)
    content = text.encode("utf-8", "surrogatepass")
    return mutate_bytes(draw, content, donor.encode()) if draw.random() < 0.3 else content
