"""The words of an ioctl program: numbers, hex, fills, patches and the masks of the output.

Each function answers as the C runner that made the recordings does, its limits and error texts included.
"""

from __future__ import annotations

import array
import re
import sys
from dataclasses import dataclass, field
from typing import Protocol

MAX_BYTES = 1 << 16  # of one struct, read or write
MAX_TOKENS = 252
U64 = 2**64 - 1

_NUMBER = re.compile(r"\s*([+-]?)(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)")
_HEX_NUMBER = re.compile(r"(?:0[xX])?([0-9a-fA-F]+)")
_HEX_BYTE = re.compile(r"[0-9a-fA-F]{2}")
_WIDTHS = {"u8": 1, "u16": 2, "u32": 4, "fd": 4, "u64": 8, "ptr": 8}
_SAVES = {"save8": 1, "save16": 2, "save32": 4, "save64": 8}


class ProgramError(Exception):
    """The program is wrong: the runner prints why and exits 64."""


class Lookup(Protocol):
    """The name spaces that a patch's value is looked up in."""

    def expr(self, text: str) -> int: ...
    def bufaddr(self, text: str) -> int: ...
    def getfd(self, text: str) -> int: ...


def strtoull(text: str) -> tuple[int, str]:
    """strtoull(text, &end, 0): the value (saturated, a minus sign wraps) and the rest of the text."""
    match = _NUMBER.match(text)
    if match is None:
        return 0, text
    sign, digits = match.groups()
    base = 16 if digits[:2] in ("0x", "0X") else 8 if digits[0] == "0" else 10
    value = min(int(digits, base), U64)
    return (-value & U64 if sign == "-" else value), text[match.end() :]


def number(text: str) -> int:
    return strtoull(text)[0]


def c_int(value: int) -> int:
    """(int)value."""
    return (value & 0xFFFFFFFF ^ 0x80000000) - 0x80000000


def c_long(value: int) -> int:
    """(long)value."""
    return (value & U64 ^ 1 << 63) - (1 << 63)


def terms(text: str) -> list[tuple[int, str]]:
    """An EXPR as signed terms; an empty term counts as 0."""
    parts = re.split(r"([+-])", text)
    if max(map(len, parts)) > 63:
        raise ProgramError("expr too long")
    signs = [1, *(1 if sign == "+" else -1 for sign in parts[1::2])]
    return list(zip(signs, parts[::2], strict=True))


def unhex(text: str) -> bytearray:
    """HEX: bytes, `_` and `.` ignored, `00x40,` repeats, `-` is empty."""
    out = bytearray()
    at = 0 if text != "-" else 1
    while at < len(text):
        if text[at] in "_.":
            at += 1
            continue
        if not _HEX_BYTE.match(text, at):
            raise ProgramError(f"bad hex at {text[at : at + 8]}")
        byte, count, at = int(text[at : at + 2], 16), 1, at + 2
        if text[at : at + 1] == "x":
            count, at = _repetition(text, at + 1)
        if len(out) + count > MAX_BYTES:
            raise ProgramError("hex too long")
        out += bytes([byte]) * count
    return out


def _repetition(text: str, at: int) -> tuple[int, int]:
    match = _HEX_NUMBER.match(text, at)
    end = match.end() if match else at
    return int(match[1], 16) if match else 0, end + (text[end : end + 1] == ",")


def fill_bytes(pattern: str, size: int) -> bytes:
    """What `fill=` writes: a byte, or `ctr:SEED`, u32 words counting up (whole words only)."""
    if not pattern.startswith("ctr:"):
        return bytes([number(pattern) & 0xFF]) * size
    seed, count = number(pattern[4:]) & 0xFFFFFFFF, size // 4
    words = array.array("I", (word & 0xFFFFFFFF for word in range(seed, seed + count)))
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def prot_of(text: str) -> int:
    """PROT_READ 1, PROT_WRITE 2, PROT_EXEC 4."""
    return sum({"r": 1, "w": 2, "x": 4}.get(letter, 0) for letter in set(text))


@dataclass(frozen=True)
class Line:
    """One line of a program: its number, its tokens and the text after `#`."""

    number: int
    tokens: list[str]
    label: str

    def __getitem__(self, at: int) -> str:
        """Token `at`; missing ones read as "0"."""
        return self.tokens[at] if at < len(self.tokens) else "0"

    def __len__(self) -> int:
        return len(self.tokens)

    def option(self, key: str) -> str | None:
        """The value of `key=value`."""
        for token in self.tokens[1:]:
            if token.startswith(key + "="):
                return token[len(key) + 1 :]
        return None

    @property
    def end(self) -> str:
        return f"  # {self.label}" if self.label else ""


def parse_line(number: int, text: str) -> Line:
    body, _, label = text.partition("#")
    tokens = [token for token in re.split(r"[ \t]+", body) if token]
    return Line(number, tokens[:MAX_TOKENS], label.lstrip(" "))


def parse_program(text: str) -> list[Line]:
    """The lines that are steps."""
    lines = (parse_line(at, line) for at, line in enumerate(text.split("\n"), 1))
    return [line for line in lines if line.tokens]


@dataclass(frozen=True)
class Patch:
    """A pointer or a descriptor put into a struct: masked as long as it stays what it was."""

    letter: str
    offset: int
    original: bytes


@dataclass(frozen=True)
class After:
    """What to do with the bytes after the call: s save, f an fd, m mask."""

    kind: str
    offset: int
    width: int
    name: str


@dataclass
class Options:
    """Patches and after-steps of one line."""

    patches: list[Patch] = field(default_factory=list)
    after: list[After] = field(default_factory=list)

    def parse(self, token: str, data: bytearray, names: Lookup) -> bool:
        """Take one token, patching `data`; False when it is no option."""
        kind, at, rest = token.partition("@")
        if not at:
            return False
        offset, rest = strtoull(rest)
        if kind in _WIDTHS:
            self._patch(kind, offset, rest, data, names)
        else:
            self._after(kind, offset, rest)
        return True

    def _patch(self, kind: str, offset: int, rest: str, data: bytearray, names: Lookup) -> None:
        if rest[:1] != "=":
            raise ProgramError(f"bad patch {kind}")
        width = _WIDTHS[kind]
        if offset + width > len(data):
            raise ProgramError(f"patch {kind}@{offset} past the {len(data)} bytes")
        lookup = {"ptr": names.bufaddr, "fd": names.getfd}.get(kind, names.expr)
        value = lookup(rest[1:]) & ((1 << 8 * width) - 1)
        data[offset : offset + width] = value.to_bytes(width, "little")
        if kind in ("ptr", "fd"):
            self.patches.append(Patch("P" if kind == "ptr" else "N", offset, value.to_bytes(width, "little")))

    def _after(self, kind: str, offset: int, rest: str) -> None:
        if rest[:1] != ":":
            raise ProgramError(f"bad option {kind}")
        name = rest[1:48]
        if kind in _SAVES:
            self.after.append(After("s", offset, _SAVES[kind], name))
        elif kind == "outfd":
            self.after.append(After("f", offset, 4, name))
        elif kind == "mask":
            self.after.append(After("m", offset, number(rest[1:]), name))
        else:
            raise ProgramError(f"unknown option {kind}")

    def masked(self, data: bytes | bytearray, *, ok: bool) -> str:
        """The bytes in hex, with P, N, D and X over those that differ between runs."""
        letters = [f"{byte:02x}" for byte in data]
        for patch in self.patches:
            end = patch.offset + len(patch.original)
            if data[patch.offset : end] == patch.original:
                letters[patch.offset : end] = [2 * patch.letter] * len(patch.original)
        for after in self.after:
            end = after.offset + after.width
            if end <= len(data) and (after.kind == "m" or (after.kind == "f" and ok)):
                letters[after.offset : end] = ["XX" if after.kind == "m" else "DD"] * after.width
        return "".join(letters)
