"""The suite's programs, compiled from unchanged sources outside the tree, the kernel's flags on the command line."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from .say import BrokenError, CannotError, note
from .source import FILES, SELFTESTS

if TYPE_CHECKING:
    from .source import Source

PROGRAMS = ("iommufd", "iommufd_fail_nth")
UAPI = ("linux/iommufd.h", "linux/vfio.h", "linux/stddef.h")  # all other headers are the system's
FLAGS = ("-Wall", "-O2", "-Wno-unused-function", "-D_GNU_SOURCE=")  # iommu/Makefile and lib.mk
LIBCAP = "#include <sys/capability.h>\nint main(void) { return !cap_get_proc(); }\n"

EXPORT = (  # what scripts/headers_install.sh does to these; unifdef changes nothing here
    (r"([\s(])(__user|__force|__iomem)\s", r"\1"),
    (r"__attribute_const__(\s|$)", r"\1"),
    (r"^#include <linux/compiler\.h>", ""),
    (r"(^|[^a-zA-Z0-9])__packed([^a-zA-Z0-9_]|$)", r"\1__attribute__((packed))\2"),
    (r"(^|\s)(inline|asm|volatile)([\s(]|$)", r"\1__\2__\3"),
    (r"#(ifndef|define|endif\s*/[*])\s*_UAPI", r"#\1 "),
)


def exported(header: str) -> str:
    """A header under include/uapi as userspace gets it."""
    lines = header.splitlines()
    for pattern, replacement in EXPORT:
        lines = [re.sub(pattern, replacement, line) for line in lines]
    return "\n".join(lines) + "\n"


def compiler() -> list[str]:
    command = shlex.split(os.environ.get("CC", "")) or ["gcc"]
    if not shutil.which(command[0]):
        raise CannotError(f"there is no C compiler {command[0]}; apt-get install gcc libc6-dev libcap-dev")
    return command


def build(source: Source, cache: Path, *, verbose: bool = False) -> Path:
    """The folder with the programs, made once for each source and compiler."""
    command = compiler()
    folder = cache / f"selftest-{_key(source.tree, command)}"
    if all((folder / program).is_file() for program in PROGRAMS):
        return folder
    _require_libcap(command)
    note(f"compiling {' and '.join(PROGRAMS)} of Linux {source.version} with {' '.join(command)}")
    with tempfile.TemporaryDirectory(dir=cache, prefix="build-") as made:
        _compile(source.tree, command, Path(made), verbose=verbose)
        folder.mkdir(exist_ok=True)
        for program in PROGRAMS:
            (Path(made) / program).replace(folder / program)
    return folder


def _key(tree: Path, command: list[str]) -> str:
    version = subprocess.run([*command, "--version"], capture_output=True, check=False).stdout
    digest = hashlib.sha256(repr((command, version, FLAGS, EXPORT)).encode())
    for name in FILES:
        digest.update((tree / name).read_bytes())
    return digest.hexdigest()[:12]


def _require_libcap(command: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*command, "-x", "c", "-", "-o", f"{folder}/probe", "-lcap"],
            input=LIBCAP, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        what = "headers of libcap (sys/capability.h)" if "capability.h" in done.stderr else "libcap to link with"
        raise CannotError(f"there are no {what}; apt-get install libcap-dev")


def _compile(tree: Path, command: list[str], made: Path, *, verbose: bool) -> None:
    for name in UAPI:
        target = made / "include" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(exported((tree / "include/uapi" / name).read_text("utf-8")))
    for program in PROGRAMS:
        line = [
            *command, *FLAGS, f"-I{tree / SELFTESTS}", "-isystem", str(made / "include"),
            f"{program}.c", "-o", str(made / program), "-lcap",
        ]  # fmt: skip
        done = subprocess.run(line, cwd=tree / SELFTESTS / "iommu", capture_output=True, text=True, check=False)
        if verbose:
            note(f"$ {shlex.join(line)}\n{done.stderr}".rstrip())
        if done.returncode:
            errors = [text for text in done.stderr.splitlines() if "error:" in text] or done.stderr.splitlines()[-1:]
            raise BrokenError(f"{program}.c does not compile: {'; '.join(errors[:3])}")
