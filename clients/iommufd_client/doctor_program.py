"""Room client: `iommufdctl doctor CMD`, which way a program gets its /dev/iommu on this host, and why.

`run` serves static, dynamic and Go programs and scripts alike. Not seen are system calls of 32-bit programs; under
no_new_privs set-user-ID, set-group-ID and file capabilities have no effect; and memory of a program that its user
may not read can be looked into by root only. `mount` serves the first two: 32-bit programs but for ioctls that return
descriptors, and privileged ones when root mounts, as a user namespace of somebody else knows no other users. What FUSE
leaves to the kernel `mount --exact` answers for 64-bit programs, where seccomp can be listened to.
"""

from __future__ import annotations

import os
import shlex
import stat
import struct
from typing import TYPE_CHECKING, NamedTuple

from .doctor import FAIL, NOTE, OK, Finding, read_text
from .doctor_probe import DEV_FUSE
from .doctor_run import ALL, ONE
from .elf import EM_386, EM_AARCH64, EM_ARM, EM_X86_64, Elf, Script, identify

if TYPE_CHECKING:
    from collections.abc import Sequence

RUN, MOUNT, NONE = "run", "mount", "none"
LISTENING = {"run: machine", "run: seccomp", "run: listener"}  # checks of `run` that count for mount --exact
DEEPEST = 5  # scripts of scripts, as in the kernel
SOCKET = "/run/iommufdd/iommufdd.sock"  # of a daemon that runs as root
NATIVE = {"x86_64": (EM_X86_64, EM_386), "aarch64": (EM_AARCH64, EM_ARM)}  # 64 and 32 bits
VFS_CAP = struct.Struct("<III")  # the start of struct vfs_cap_data: magic_etc, permitted, inheritable
VFS_CAP_HIGH = struct.Struct("<I")  # permitted, bits 32 and up


class Program(NamedTuple):
    """What is known of CMD before it runs. For a script, of its interpreter."""

    path: str = ""
    elf: Elf | None = None  #: None when it cannot be read, or executed
    scripts: tuple[str, ...] = ()  #: the scripts whose interpreter it is, outermost first
    privileges: tuple[str, ...] = ()  #: what exec would give the caller
    readable: bool = True
    trouble: str = ""  #: why it cannot be executed
    advice: str = ""


class Way(NamedTuple):
    """How it gets its /dev/iommu."""

    way: str  #: "run", "mount", "none"
    reason: str
    commands: tuple[str, ...] = ()  #: to be typed; the second one in another terminal
    complete: bool = True  #: whether the program is all that it is elsewhere


# ---- what it is ----


def look(command: str) -> Program:
    """Find it as execvp() does, and read its file."""
    path, trouble = _find(command)
    return Program(path, trouble=trouble) if trouble else _inspect(path, ())


def _find(command: str) -> tuple[str, str]:
    """(path, ""), or why it cannot be executed."""
    if "/" in command:
        return command, _obstacle(command)
    places = [os.path.join(folder or ".", command) for folder in os.get_exec_path()]
    there = [place for place in places if os.path.isfile(place)]
    for place in there:
        if not _obstacle(place):
            return place, ""
    return (there[0], _obstacle(there[0])) if there else (command, "is not on PATH")


def _obstacle(path: str) -> str:
    """Why exec would refuse the file; "" when nothing is seen."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return error.strerror or str(error)
    if not stat.S_ISREG(mode):
        return "is a directory" if stat.S_ISDIR(mode) else "is not a regular file"
    if os.statvfs(path).f_flag & os.ST_NOEXEC:
        return "lies on a file system that is mounted noexec"
    return "" if os.access(path, os.X_OK, effective_ids=True) else "is not executable (chmod +x)"


def _inspect(path: str, scripts: tuple[str, ...]) -> Program:
    readable = os.access(path, os.R_OK, effective_ids=True)
    privileges = tuple(_gains(path))
    if not readable:
        return Program(path, None, scripts, privileges, readable=False)
    with open(path, "rb") as file:
        found = identify(file)
    if isinstance(found, Script):
        return _behind(path, found, scripts)
    if found is None:
        advice = "" if scripts else f"if it is a script without #!: sh {shlex.quote(path)}"
        return Program(path, None, scripts, trouble="is neither ELF nor a script with #!", advice=advice)
    trouble = f"wants the loader {found.loader}, which is not there" if _missing(found.loader) else ""
    return Program(path, found, scripts, privileges, trouble=trouble)


def _missing(loader: str) -> bool:
    return bool(loader) and not os.path.exists(loader)


def _behind(path: str, script: Script, scripts: tuple[str, ...]) -> Program:
    """The interpreter of a script; behind `env`, what it starts."""
    chain = (*scripts, path)
    if len(chain) > DEEPEST:
        return Program(path, None, chain, trouble="is a script of a script of a script, too deep for the kernel")
    interpreter = script.interpreter
    if os.path.basename(interpreter) == "env" and (name := _started_by_env(script.argument)):
        interpreter, trouble = _find(name)
    else:
        trouble = _obstacle(interpreter)
    if trouble:
        return Program(path, None, chain, trouble=f"wants the interpreter {interpreter}, which {_clause(trouble)}")
    return _inspect(interpreter, chain)


def _clause(trouble: str) -> str:
    return trouble if trouble.startswith(("is ", "lies ")) else f"cannot be used: {trouble}"


def _started_by_env(argument: str) -> str:
    """The first word that is neither an option nor a variable; env -S splits the words, without it there is one."""
    words = [word for word in argument.split() if not word.startswith("-") and "=" not in word]
    return words[0] if words else ""


# ---- privileges ----


def _gains(path: str) -> list[str]:
    """What exec would give that the caller does not have already."""
    if os.statvfs(path).f_flag & os.ST_NOSUID or _status("NoNewPrivs") == "1":
        return []
    status, gains = os.stat(path), []
    if status.st_mode & stat.S_ISUID and status.st_uid != os.geteuid():
        gains.append(f"set-user-ID {status.st_uid}")
    if status.st_mode & stat.S_ISGID and status.st_mode & stat.S_IXGRP and status.st_gid != os.getegid():
        gains.append(f"set-group-ID {status.st_gid}")
    if file_capabilities(path) & ~int(_status("CapPrm") or "0", 16):
        gains.append("file capabilities")
    return gains


def file_capabilities(path: str) -> int:
    """The permitted set that the file grants, as a mask."""
    try:
        data = os.getxattr(path, "security.capability")
    except OSError:
        return 0
    if len(data) < VFS_CAP.size:
        return 0
    _, permitted, _ = VFS_CAP.unpack_from(data)
    if len(data) >= VFS_CAP.size + VFS_CAP_HIGH.size:
        permitted |= VFS_CAP_HIGH.unpack_from(data, VFS_CAP.size)[0] << 32
    return int(permitted)


def _status(name: str) -> str:
    for line in (read_text("/proc/self/status") or "").splitlines():
        key, _, text = line.partition(":")
        if key == name:
            return text.strip()
    return ""


# ---- the way ----


def choose(program: Program, words: Sequence[str], failing: Sequence[str], mounts: str) -> Way:
    """`words` are CMD and its arguments, `failing` the checks of `run` that fail, `mounts` as doctor_run has it."""
    line = shlex.join(words)
    elf = program.elf
    if program.trouble:
        return Way(NONE, f"{program.path} {program.trouble}")
    if elf is not None and not _of_this_machine(elf):
        return Way(NONE, f"a program for {elf.machine_name}: an emulator does not pass its ioctls on")
    if nothing := [topic for topic in failing if not topic.startswith("run: ")]:
        return Way(NONE, f"iommufdd does not work here ({', '.join(nothing)})")
    if elf is not None and elf.bits == 32:
        reason = "a 32-bit program, whose system calls run does not see"
        return _by_mount(f"/dev/iommu -- {line}", reason, failing, mounts)._replace(complete=False)
    if program.privileges and _root_may_mount(mounts):
        return _privileged(program, line, failing)
    if failing:
        reason = f"run does not work here ({', '.join(failing)})"
        return _by_mount(f"{_exactly(failing)}/dev/iommu -- {line}", reason, failing, mounts)
    if not program.readable and os.geteuid():
        reason = "only a daemon of root may look into it, because you may not read its file"
        return Way(RUN, reason, (f"iommufdctl run --socket-path {SOCKET} -- {line}",))
    command = f"iommufdctl run -- {line}"
    if program.privileges:
        return Way(RUN, f"but without {_list(program.privileges)}", (command,), complete=False)
    return Way(RUN, "nothing stands against it", (command,))


def _root_may_mount(mounts: str) -> bool:
    """Whether we can, as root; or, as far as is seen from here, root could."""
    return mounts == ALL if os.geteuid() == 0 else os.path.exists(DEV_FUSE)


def _exactly(failing: Sequence[str]) -> str:
    """The option of mount, where its listener can be had; 64-bit programs alone have a use for it."""
    return "" if LISTENING & set(failing) else "--exact "


def _privileged(program: Program, line: str, failing: Sequence[str]) -> Way:
    reason = f"for {_list(program.privileges)}, which run would take away"
    if os.geteuid() == 0:
        return Way(MOUNT, reason, (f"iommufdctl mount {_exactly(failing)}/dev/iommu -- {line}",))
    return Way(MOUNT, f"{reason}; only root can", ("sudo iommufdctl mount /dev/iommu", line))


def _by_mount(words: str, reason: str, failing: Sequence[str], mounts: str) -> Way:
    if not mounts or any(not _mount_copes(topic, mounts) for topic in failing):
        return Way(NONE, f"{reason}; mount might, but does not work here")
    return Way(MOUNT, reason, (f"iommufdctl mount {words}",))


def _mount_copes(topic: str, mounts: str) -> bool:
    """Whether mount works although a check of `run` fails. It looks into CMD too, but may, where CMD is in a user
    namespace that the daemon's user has made.
    """
    if topic == "run: ptrace":
        return mounts == ONE and os.geteuid() != 0
    return topic in ("run: seccomp", "run: listener")


def _of_this_machine(elf: Elf) -> bool:
    return elf.machine in NATIVE.get(os.uname().machine, (elf.machine,))


def _list(privileges: Sequence[str]) -> str:
    return " and ".join(privileges)


# ---- for people ----


def findings(program: Program, way: Way) -> list[Finding]:
    """What is to be said of it, the way last."""
    found = [_kind(program)]
    if not program.trouble:
        found += [_machine(program), _privileges(program, way), _reading(program)]
    verdict = FAIL if way.way == NONE else OK if way.complete else NOTE
    seen = "no way" if way.way == NONE else f"by {way.way}"
    advice = ", then in another terminal: ".join(way.commands)
    return [*found, Finding("way", verdict, f"{seen}: {way.reason}", advice)]


def _kind(program: Program) -> Finding:
    if program.trouble:
        return Finding("program", FAIL, f"{program.path} {program.trouble}", program.advice)
    kind = "cannot be read, so its kind is unknown" if program.elf is None else _kind_of(program.elf)
    chain = "".join(f"{script}: a script for " for script in program.scripts)
    return Finding("program", OK, f"{chain}{program.path}: {kind}")


def _kind_of(elf: Elf) -> str:
    linked = f"dynamic, loader {elf.loader}" if elf.loader else "static"
    return f"ELF, {linked}{', Go' if elf.go else ''}"


def _machine(program: Program) -> Finding:
    elf = program.elf
    if elf is None:
        return Finding("machine", NOTE, "unknown; system calls of a 32-bit program are not seen by run")
    seen = f"{elf.machine_name}, {elf.bits} bits"
    if not _of_this_machine(elf):
        return Finding("machine", FAIL, f"{seen}; this one is {os.uname().machine}")
    if elf.bits == 32:
        seen += ": run does not see its system calls; mount serves all but ioctls that return descriptors"
        return Finding("machine", NOTE, seen)
    return Finding("machine", OK, f"{seen}: its system calls are seen, whatever it is linked with")


def _privileges(program: Program, way: Way) -> Finding:
    if not program.privileges:
        return Finding("privileges", OK, "it gains none by exec, so none are lost to no_new_privs")
    seen = f"it gains {_list(program.privileges)}, which run takes away (no_new_privs)"
    return Finding("privileges", OK if way.way == MOUNT else NOTE, seen)


def _reading(program: Program) -> Finding:
    if program.readable:
        return Finding("readable", OK, "the daemon may look into its memory where it may look into CMD's")
    return Finding("readable", NOTE, "no: the kernel hides its memory from all but root (non-dumpable)")
