"""The suite's source: from where the caller says, from the cache, from the installed package, or fetched."""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple, cast

from . import apt
from .say import BrokenError, CannotError, note, progress

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = "linux-source-7.2"
SUITE = "trixie-backports"
INSTALLED = Path("/usr/src") / f"{PACKAGE}.tar.xz"

SELFTESTS = "tools/testing/selftests"
FILES = (  # what the build reads, and the Makefile for the version
    "Makefile",
    "drivers/iommu/iommufd/iommufd_test.h",
    "include/uapi/linux/iommufd.h",
    "include/uapi/linux/stddef.h",
    "include/uapi/linux/vfio.h",
    f"{SELFTESTS}/iommu/iommufd.c",
    f"{SELFTESTS}/iommu/iommufd_fail_nth.c",
    f"{SELFTESTS}/iommu/iommufd_utils.h",
    f"{SELFTESTS}/kselftest.h",
    f"{SELFTESTS}/kselftest_harness.h",
)
VERSION = re.compile(r"^(VERSION|PATCHLEVEL|SUBLEVEL) = (\d+)$", re.MULTILINE)
INNER = re.compile(r"usr/src/linux-source-[^/]*\.tar(\.\w+)?$")
READING = (OSError, EOFError, lzma.LZMAError, tarfile.TarError)


class Source(NamedTuple):
    """A tree with the files above."""

    tree: Path
    origin: str  # for people

    @property
    def version(self) -> str:
        """As the tree's Makefile has it: 7.2.12."""
        return ".".join(number for _, number in VERSION.findall((self.tree / "Makefile").read_text("utf-8")))


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "iommufdd"


def find(given: Path | None, cache: Path) -> Source:
    """`given` if there is one, and nothing else then."""
    cache.mkdir(parents=True, exist_ok=True)
    if given is not None:
        return _given(given.expanduser(), cache)
    tree = cache / PACKAGE
    if _complete(tree):
        return Source(tree, f"{PACKAGE}, cached")
    if INSTALLED.is_file():
        return Source(_unpacked(INSTALLED, tree), f"{INSTALLED}, installed")
    with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as folder:
        deb = apt.download(PACKAGE, SUITE, Path(folder))
        return Source(_unpacked(deb, tree), f"{deb.stem} of {SUITE}, fetched")


def _given(path: Path, cache: Path) -> Source:
    if path.is_dir():
        if missing := [name for name in FILES if not (path / name).is_file()]:
            raise CannotError(f"{path} is not an unpacked Linux source: it has no {missing[0]}")
        return Source(path.resolve(), str(path))
    if not path.is_file():
        raise CannotError(f"there is no {path}")
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    tree = cache / f"given-{key}"
    return Source(tree if _complete(tree) else _unpacked(path, tree), str(path))


def _complete(tree: Path) -> bool:
    return all((tree / name).is_file() for name in FILES)


def _unpacked(archive: Path, tree: Path) -> Path:
    """The tree, made beside and moved when it is whole: another run may be at the same."""
    note(f"unpacking {len(FILES)} files of {archive.name} (once)")
    with tempfile.TemporaryDirectory(dir=tree.parent, prefix="unpack-") as folder:
        made = Path(folder) / "tree"
        try:
            with _tarball(archive) as stream:
                extract(stream, made)
        except READING as error:
            raise BrokenError(f"cannot unpack {archive}: {error}") from None
        finally:
            progress("")
        try:
            made.replace(tree)
        except OSError:
            if not _complete(tree):
                shutil.rmtree(tree)
                made.replace(tree)
    return tree


def extract(stream: IO[bytes], tree: Path) -> None:
    """The files above out of a compressed tar whose members lie in one folder; reads no further than the last."""
    missing = set(FILES)
    with tarfile.open(fileobj=stream, mode="r|*") as tar:
        for number, member in enumerate(tar):
            if number % 1000 == 0:
                progress(f"unpacking: {number} files looked at, {len(missing)} to find")
            name = member.name.removeprefix("./").partition("/")[2]
            if name in missing and (content := tar.extractfile(member)):
                target = tree / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.read())
                missing.remove(name)
                if not missing:
                    return
    raise BrokenError(f"the archive is no Linux source with an iommufd selftest: it has no {min(missing)}")


@contextmanager
def _tarball(archive: Path) -> Iterator[IO[bytes]]:
    """The source's tar, out of its package if it is in one."""
    if archive.suffix != ".deb":
        with archive.open("rb") as stream:
            yield stream
        return
    if not shutil.which("dpkg-deb"):
        raise CannotError(f"there is no dpkg-deb here to open {archive.name} with; {apt.ADVICE}")
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as package:
        try:
            yield from _inner(cast("io.BufferedReader", package.stdout), archive.name)
        finally:
            package.kill()


def _inner(package: IO[bytes], name: str) -> Iterator[IO[bytes]]:
    with tarfile.open(fileobj=package, mode="r|") as tar:
        for member in tar:
            if INNER.search(member.name) and (inner := tar.extractfile(member)):
                yield inner
                return
    raise BrokenError(f"{name} has no /usr/src/linux-source-*.tar in it")
