"""`iommufdctl doctor CMD`: what a program is, and which way it goes. The programs are headers without code."""

from __future__ import annotations

import io
import json
import os
import struct
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from iommufd_client import cli as command
from iommufd_client import doctor_program as dp
from iommufd_client import doctor_run, doctor_show
from iommufd_client.doctor import FAIL, NOTE, OK, Finding
from iommufd_client.doctor_run import ALL, NOBODY, ONE
from iommufd_client.elf import EM_386, EM_AARCH64, EM_X86_64, MACHINES, Elf, Script, identify

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GO = struct.pack("<III", 4, 8, 4) + b"Go\0\0" + b"build-id"
NATIVE, NATIVE_32 = dp.NATIVE.get(os.uname().machine, (0, 0))
FOREIGN = EM_AARCH64 if NATIVE == EM_X86_64 else EM_X86_64
ME = os.geteuid()
SOMEBODY_ELSE = 54_321

pytestmark = pytest.mark.skipif(not NATIVE, reason="a machine that run is not made for")


def elf(
    machine: int = NATIVE, bits: int = 64, *, loader: str = "", note: bytes = b"", order: str = "<", kind: int = 2
) -> bytes:
    """An ELF header, program headers, and what they name."""
    parts = [(3, loader.encode() + b"\0")] * bool(loader) + [(4, note)] * bool(note)
    big = bits == 64
    size, entry = (64, 56) if big else (52, 32)
    at = size + entry * len(parts)
    headers, bodies = b"", b""
    for number, body in parts:
        where = at + len(bodies)
        shape = (number, 4, where, 0, 0, len(body), len(body), 1) if big else (number, where, 0, 0, len(body), 0, 4, 1)
        headers += struct.pack(f"{order}IIQQQQQQ" if big else f"{order}IIIIIIII", *shape)
        bodies += body
    ident = b"\x7fELF" + bytes([2 if big else 1, 1 if order == "<" else 2, 1]) + bytes(9)
    rest = struct.pack(
        f"{order}HHIQQQIHHHHHH" if big else f"{order}HHIIIIIHHHHHH",
        *(kind, machine, 1, 0, size if parts else 0, 0, 0, size, entry, len(parts), 0, 0, 0),
    )
    return ident + rest + headers + bodies


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., str]:
    def program(content: bytes | str, name: str = "program", mode: int = 0o755) -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        path.chmod(mode)
        return str(path)

    return program


@pytest.fixture(autouse=True)
def plain_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """No mount options, no rights but those of the mode bits' owner."""
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=0))
    monkeypatch.setattr(dp, "_status", {"NoNewPrivs": "0", "CapPrm": "0"}.get)


def way(path: str, failing: tuple[str, ...] = (), mounts: str = NOBODY) -> dp.Way:
    return dp.choose(dp.look(path), [path], failing, mounts)


# ---- what it is ----


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [32, 64])
def test_elf(bits: int, order: str) -> None:
    for machine in (NATIVE, EM_386, 8):
        content = elf(machine, bits, loader="/lib/ld.so", note=GO, order=order)
        assert identify(io.BytesIO(content)) == Elf(bits, machine, "/lib/ld.so", go=True)
        assert identify(io.BytesIO(elf(machine, bits, order=order, kind=3))) == Elf(bits, machine, "", go=False)


def test_what_is_no_program() -> None:
    whole = elf(loader="/lib/ld.so")
    for content in (b"", b"#!", b"#!  \n", b"text", b"\x7fELF", whole[:40], whole[:80], elf(kind=1), elf(kind=4)):
        assert identify(io.BytesIO(content)) is None
    assert identify(io.BytesIO(b"\x7fELF\x03" + whole[5:])) is None


def test_headers_that_lie_are_not_believed() -> None:
    huge = bytearray(elf(loader="/lib/ld.so"))
    struct.pack_into("<Q", huge, 32, 1 << 63)  # e_phoff
    assert identify(io.BytesIO(huge)) is None
    for at in range(16, 64):
        broken = bytearray(elf(loader="/lib/ld.so"))
        broken[at] = 0xFF
        assert isinstance(identify(io.BytesIO(broken)), Elf | None)


def test_script() -> None:
    assert identify(io.BytesIO(b"#! /bin/sh -e -x \nexit\n")) == Script("/bin/sh", "-e -x")
    assert identify(io.BytesIO(b"#!/bin/sh")) == Script("/bin/sh", "")


def test_machine_names() -> None:
    assert {MACHINES[EM_X86_64], MACHINES[EM_AARCH64]} == {"x86_64", "aarch64"}
    assert Elf(64, 4711, "", go=False).machine_name == "machine 4711"


# ---- where it is ----


def test_it_is_found_on_path(make: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = make(elf())
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "program").write_text("not executable")
    monkeypatch.setenv("PATH", f"{tmp_path}/first:{tmp_path}")
    assert dp.look("program").path == path
    assert dp.look("nothing").trouble == "is not on PATH"
    monkeypatch.setenv("PATH", f"{tmp_path}/first")
    assert dp.look("program").trouble == "is not executable (chmod +x)"


def test_what_cannot_be_executed(make: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert dp.look(f"{tmp_path}/nothing").trouble == "No such file or directory"
    assert dp.look(str(tmp_path)).trouble == "is a directory"
    assert dp.look(os.devnull).trouble == "is not a regular file"
    assert dp.look(make(elf(), mode=0o644)).trouble == "is not executable (chmod +x)"
    text = dp.look(make("echo"))
    assert text.trouble == "is neither ELF nor a script with #!"
    assert text.advice.startswith("if it is a script without #!: sh ")
    missing = dp.look(make(elf(loader="/nonexistent/ld.so")))
    assert missing.trouble == "wants the loader /nonexistent/ld.so, which is not there"
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_NOEXEC))
    assert dp.look(make(elf())).trouble == "lies on a file system that is mounted noexec"


def test_scripts(make: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    binary = make(elf(), "binary")
    script = make(f"#!{binary} -x\n", "script")
    assert dp.look(script)[:3] == (binary, Elf(64, NATIVE, "", go=False), (script,))
    outer = make(f"#!{script}\n", "outer")
    assert dp.look(outer).scripts == (outer, script)
    monkeypatch.setenv("PATH", str(tmp_path))
    for line in ("/usr/bin/env binary", "/usr/bin/env -S A=b binary -x"):
        assert dp.look(make(f"#!{line}\n", "by-env")).path == binary
    assert dp.look(make("#!/nonexistent/sh\n")).trouble.startswith("wants the interpreter /nonexistent/sh, which")
    assert dp.look(make("#!/usr/bin/env nothing\n")).trouble == "wants the interpreter nothing, which is not on PATH"
    loop = make(f"#!{tmp_path}/loop\n", "loop")
    assert "too deep" in dp.look(loop).trouble


# ---- the way ----


@pytest.mark.parametrize("content", [elf(), elf(kind=3), elf(loader=sys.executable), elf(note=GO)])
def test_by_run(content: bytes, make: Callable[..., str]) -> None:
    path = make(content)
    found = way(path)
    assert (found.way, found.commands, found.complete) == ("run", (f"iommufdctl run -- {path}",), True)


def test_arguments_are_quoted(make: Callable[..., str]) -> None:
    path = make(elf())
    assert dp.choose(dp.look(path), [path, "a b"], (), NOBODY).commands == (f"iommufdctl run -- {path} 'a b'",)


def test_another_machine(make: Callable[..., str]) -> None:
    found = way(make(elf(FOREIGN)), mounts=ALL)
    assert found.way == "none"
    assert MACHINES[FOREIGN] in found.reason


@pytest.mark.parametrize("machine", {NATIVE, NATIVE_32})  # x32 is 32-bit code of x86_64
def test_32_bits(machine: int, make: Callable[..., str]) -> None:
    path = make(elf(machine, 32))
    assert way(path).way == "none"
    found = way(path, mounts=ONE)
    assert (found.way, found.commands) == ("mount", (f"iommufdctl mount /dev/iommu -- {path}",))
    assert not found.complete
    assert way(path, failing=("run: listener",), mounts=ONE).way == "mount"


@pytest.mark.parametrize(
    ("failing", "mounts", "user", "expected"),
    [
        ("run: listener", NOBODY, 0, ()),
        ("run: listener", ALL, 0, ("mount",)),
        ("run: seccomp", ONE, 1000, ("mount",)),
        ("run: ptrace", ONE, 1000, ("mount", "--exact")),  # CMD is then in a user namespace of ours
        ("run: ptrace", ALL, 0, ()),
        ("run: machine", ALL, 0, ()),
        ("memfd seals", ALL, 0, ()),
    ],
)
def test_where_run_does_not_work(
    failing: str,
    mounts: str,
    user: int,
    expected: tuple[str, ...],
    make: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = make(elf())
    program = dp.look(path)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    found = dp.choose(program, [path], (failing,), mounts)
    assert found.way == (expected[0] if expected else "none")
    assert found.commands == tuple([" ".join(["iommufdctl", *expected, "/dev/iommu --", path])] * bool(expected))
    assert failing in found.reason


def test_set_user_id(make: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(elf(), mode=0o4755)
    assert dp.look(path).privileges == ()  # it is our own
    monkeypatch.setattr(os, "geteuid", lambda: SOMEBODY_ELSE)
    assert dp.look(path).privileges == (f"set-user-ID {ME}",)
    monkeypatch.setattr(dp, "DEV_FUSE", path)
    found = way(path)
    assert (found.way, found.commands) == ("mount", ("sudo iommufdctl mount /dev/iommu", path))
    monkeypatch.setattr(dp, "DEV_FUSE", "/nonexistent")
    found = way(path)
    assert (found.way, found.complete) == ("run", False)
    assert found.reason == f"but without set-user-ID {ME}"


def test_set_group_id(make: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    group = os.getegid()
    path = make(elf(), mode=0o2755)
    monkeypatch.setattr(os, "getegid", lambda: SOMEBODY_ELSE)
    assert dp.look(path).privileges == (f"set-group-ID {group}",)
    os.chmod(path, 0o2745)  # without x for the group, the bit once meant locks
    assert dp.look(path).privileges == ()


def test_privileges_that_exec_does_not_give(make: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(elf(), mode=0o4755)
    script = make(f"#!{make(elf(), 'interpreter')}\n", "script", mode=0o4755)
    monkeypatch.setattr(os, "geteuid", lambda: SOMEBODY_ELSE)
    assert dp.look(script).privileges == ()
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_NOSUID))
    assert dp.look(path).privileges == ()
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=0))
    monkeypatch.setattr(dp, "_status", {"NoNewPrivs": "1"}.get)
    assert dp.look(path).privileges == ()


@pytest.mark.parametrize("revision", [1, 2, 3])
def test_file_capabilities(revision: int, make: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = [revision << 24 | 1, 1 << 13, 0] + [1 << 8, 0] * (revision > 1) + [0] * (revision > 2)
    monkeypatch.setattr(os, "getxattr", lambda *_: struct.pack(f"<{len(words)}I", *words))
    path = make(elf())
    mask = 1 << 13 | (1 << 40 if revision > 1 else 0)
    assert dp.file_capabilities(path) == mask
    assert dp.look(path).privileges == ("file capabilities",)
    monkeypatch.setattr(dp, "_status", {"CapPrm": f"{mask:x}"}.get)
    assert dp.look(path).privileges == ()  # we have them already


def test_root_keeps_privileges_by_mount(make: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(elf())
    program = dp.look(path)._replace(privileges=("file capabilities",))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert dp.choose(program, [path], (), ALL).commands == (f"iommufdctl mount --exact /dev/iommu -- {path}",)
    failing = ("run: listener",)
    assert dp.choose(program, [path], failing, ALL).commands == (f"iommufdctl mount /dev/iommu -- {path}",)
    assert dp.choose(program, [path], (), NOBODY).way == "run"


def test_unreadable(make: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(elf(), mode=0o711)
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **_: mode != os.R_OK and may(path, mode))
    monkeypatch.setattr(os, "geteuid", lambda: SOMEBODY_ELSE)
    program = dp.look(path)
    assert (program.readable, program.elf) == (False, None)
    found = dp.choose(program, [path], (), NOBODY)
    assert (found.way, found.commands) == ("run", (f"iommufdctl run --socket-path {dp.SOCKET} -- {path}",))
    assert "root" in found.reason
    verdicts = {finding.topic: finding.verdict for finding in dp.findings(program, found)}
    assert verdicts == {"program": OK, "machine": NOTE, "privileges": OK, "readable": NOTE, "way": OK}


# ---- the command ----


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """One on which run works and mount does not."""
    monkeypatch.setattr(doctor_show, "examine", lambda _: [Finding("run: listener", OK, "can be installed")])
    monkeypatch.setattr(doctor_run, "mounts", lambda: NOBODY)
    return monkeypatch


def test_text(make: Callable[..., str], host: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(elf(note=GO))
    assert command.main(["doctor", "--", path, "--json"]) == 0  # its own option
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"ok    program     {path}: ELF, static, Go"
    assert [line.split()[1] for line in lines[1:-1]] == ["machine", "privileges", "readable", "way"]
    assert lines[-1] == f"                  -> iommufdctl run -- {path} --json"


def test_what_stands_in_the_way_is_said(
    make: Callable[..., str], host: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    host.setattr(doctor_show, "examine", lambda _: [Finding("run: listener", FAIL, "somebody listens", "elsewhere")])
    assert command.main(["doctor", make(elf())]) == 1
    text = capsys.readouterr().out
    assert text.startswith("FAIL  run: listener  somebody listens\n")
    assert "FAIL  way" in text


def test_json(make: Callable[..., str], host: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(elf(loader=sys.executable))
    script = make(f"#!{path}\n", "script")
    assert command.main(["doctor", "--json", script]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["way"], found["commands"]) == ("run", [f"iommufdctl run -- {script}"])
    assert found["program"] == {
        "path": path,
        "scripts": [script],
        "machine": MACHINES[NATIVE],
        "bits": 64,
        "static": False,
        "loader": sys.executable,
        "go": False,
        "privileges": [],
        "readable": True,
    }
    assert [each["topic"] for each in found["host"]] == ["run: listener"]


def test_no_such_program(host: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["doctor", "--json", "/nonexistent"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["way"], found["program"]["machine"]) == ("none", None)


def test_this_python_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    program = dp.look(sys.executable)
    assert program.trouble == ""
    if program.readable:
        assert program.elf is not None
        assert program.elf.machine == NATIVE
