"""A writer of STEs, CDs, L1CDs and event records that shares nothing with the product: bit numbers as they are printed
in IHI0070 5.2, 5.3, 5.4 and 7.3, one entry for each field."""

from __future__ import annotations

#: (word, highest bit, lowest bit)
STE = {
    "V": (0, 0, 0), "Config": (0, 3, 1), "S1Fmt": (0, 5, 4), "S1CDMax": (0, 63, 59),
    "S1DSS": (1, 1, 0), "S1CIR": (1, 3, 2), "S1COR": (1, 5, 4), "S1CSH": (1, 7, 6), "S1STALLD": (1, 27, 27),
    "EATS": (1, 29, 28), "SHCFG": (1, 45, 44), "S2VMID": (2, 15, 0), "S2S": (2, 57, 57), "S2R": (2, 58, 58),
}  # fmt: skip
CD = {
    "T0SZ": (0, 5, 0), "TG0": (0, 7, 6), "EPD0": (0, 14, 14), "ENDI": (0, 15, 15), "T1SZ": (0, 21, 16),
    "TG1": (0, 23, 22), "EPD1": (0, 30, 30), "V": (0, 31, 31), "IPS": (0, 34, 32), "AFFD": (0, 35, 35),
    "WXN": (0, 36, 36), "TBI0": (0, 38, 38), "TBI1": (0, 39, 39), "PAN": (0, 40, 40), "AA64": (0, 41, 41),
    "HD": (0, 42, 42), "HA": (0, 43, 43), "S": (0, 44, 44), "R": (0, 45, 45), "A": (0, 46, 46), "ASET": (0, 47, 47),
    "ASID": (0, 63, 48), "HAD0": (1, 1, 1), "HAFT": (1, 3, 3), "HAD1": (2, 1, 1),
}  # fmt: skip
ADDRESS = 0x000FFFFFFFFFFFFF

#: event numbers, 7.3
C_BAD_STREAMID, C_BAD_STE, F_BAD_ATS_TREQ, F_STREAM_DISABLED = 0x02, 0x04, 0x05, 0x06
C_BAD_SUBSTREAMID, F_CD_FETCH, C_BAD_CD, F_WALK_EABT = 0x08, 0x09, 0x0A, 0x0B
F_TRANSLATION, F_ADDR_SIZE, F_ACCESS, F_PERMISSION = 0x10, 0x11, 0x12, 0x13
CLASS_CD, CLASS_TT, CLASS_IN = 0, 1, 2


def put(words: list[int], place: tuple[int, int, int], value: int) -> None:
    """Store a field."""
    word, high, low = place
    mask = 2 ** (high + 1) - 2**low
    words[word] = words[word] & ~mask | value * 2**low & mask


def ste(pointer: int = 0, **fields: int) -> tuple[int, ...]:
    """A valid STE with stage 1 through the CD table at pointer, but for what fields say."""
    words = [pointer & ADDRESS & ~63, 0, 0, 0, 0, 0, 0, 0]
    for name, value in {"V": 1, "Config": 5, "S1DSS": 2, "S1STALLD": 1, **fields}.items():
        put(words, STE[name], value)
    return tuple(words)


def changed(words: tuple[int, ...], **fields: int) -> tuple[int, ...]:
    """The STE with other fields."""
    new = list(words)
    for name, value in fields.items():
        put(new, STE[name], value)
    return tuple(new)


def cd(ttb0: int, ttb1: int = 0, **fields: int) -> bytes:
    """A valid CD for 48 bits of address and 4 KiB pages through TTB0, but for what fields say."""
    words = [0, ttb0 & ADDRESS & ~15, ttb1 & ADDRESS & ~15, 0, 0, 0, 0, 0]
    usual = {"T0SZ": 16, "EPD1": 1, "V": 1, "IPS": 5, "AA64": 1, "R": 1, "A": 1, "ASET": 1, "ASID": 5}
    for name, value in {**usual, **fields}.items():
        put(words, CD[name], value)
    return b"".join(word.to_bytes(8, "little") for word in words)


def l1cd(pointer: int, valid: int = 1) -> bytes:
    """An L1CD; pointer is a multiple of 4 KiB."""
    return (pointer & ADDRESS & ~4095 | valid).to_bytes(8, "little")


def event(
    number: int, sid: int, *, ssv: int = 0, ssid: int = 0, stag: int = 0, stall: int = 0, pnu: int = 0, ind: int = 0,
    rnw: int = 0, s2: int = 0, cls: int = 0, ttrnw: int = 0, addr: int = 0, w3: int = 0,
) -> tuple[int, int, int, int]:  # fmt: skip
    """An event record; w3: the IPA or fetch address as it stands there."""
    return (
        number + 2048 * ssv + 4096 * ssid + 2**32 * sid,
        stag + 2**31 * stall + 2**33 * pnu + 2**34 * ind + 2**35 * rnw + 2**39 * s2 + 2**40 * cls + 2**44 * ttrnw,
        addr,
        w3,
    )
