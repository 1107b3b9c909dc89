"""One package out of a suite that the machine does not use, by plain apt in folders of its own.

Nothing of the system is read but its list of sources and its Acquire settings (a proxy, say), nothing is written, and
no privilege is needed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from .say import CannotError, note

ETC = Path("/etc/apt")
ADVICE = "give the source yourself: LINUX_SRC=FILE (a tree, a .tar.xz or the package as a .deb)"
ONE_LINE = re.compile(r"deb\s+(?:\[(?P<options>[^\]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)(?:\s+(?P<components>.*))?$")
DEBIAN = re.compile(r"debian/?$")


class Archive(NamedTuple):
    """Where packages come from, as far as another suite of the same archive needs it."""

    uri: str
    suites: tuple[str, ...]
    signed_by: str  # empty where apt's own keyrings are meant; a key itself has many lines


def archives(etc: Path = ETC) -> list[Archive]:
    """What the machine is configured for, in both of apt's formats."""
    found: list[Archive] = []
    for path in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]:
        if path.suffix in (".list", ".sources") and path.is_file():
            text = path.read_text("utf-8", "replace")
            found += _one_line(text) if path.suffix == ".list" else _stanzas(text)
    return found


def _one_line(text: str) -> list[Archive]:
    found = []
    for line in text.splitlines():
        if entry := ONE_LINE.match(line.partition("#")[0].strip()):
            options = dict(option.partition("=")[::2] for option in (entry["options"] or "").split())
            found.append(Archive(entry["uri"], (entry["suite"],), options.get("signed-by", "")))
    return found


def _stanzas(text: str) -> list[Archive]:
    found = []
    for stanza in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        key = ""
        for line in stanza.splitlines():
            if line.startswith("#"):
                continue
            if line[:1].isspace() and key:
                fields[key] += "\n" + line
            elif ":" in line:
                name, _, value = line.partition(":")
                key = name.strip().lower()
                fields[key] = value.strip()
        if "deb" in fields.get("types", "").split() and fields.get("enabled", "yes").lower() not in ("no", "false"):
            suites = tuple(fields.get("suites", "").split())
            found += [Archive(uri, suites, fields.get("signed-by", "")) for uri in fields.get("uris", "").split()]
    return found


def with_suite(found: list[Archive], suite: str) -> list[Archive]:
    """The archives that should have the suite, likeliest first: configured for it, or Debian's own."""
    wanted = [archive for archive in found if suite in archive.suites]
    wanted += [archive for archive in found if DEBIAN.search(archive.uri)]
    once: dict[str, Archive] = {}
    for archive in wanted:
        once.setdefault(archive.uri.rstrip("/"), archive)
    return list(once.values())


def stanza(archive: Archive, suite: str) -> str:
    """A source of that suite alone."""
    fields = {"Types": "deb", "URIs": archive.uri, "Suites": suite, "Components": "main"}
    if archive.signed_by:
        fields["Signed-By"] = archive.signed_by
    return "".join(f"{name}: {value}\n" for name, value in fields.items())


def settings(folder: Path, dump: str) -> str:
    """An apt.conf that keeps apt inside the folder; of the machine's, as `apt-config dump` prints it, Acquire stays."""
    own = {
        "Dir::Etc::Parts": "/dev/null",
        "Dir::Etc::Main": "/dev/null",
        "Dir::Etc::SourceList": "/dev/null",
        "Dir::Etc::SourceParts": f"{folder}/sources.d",
        "Dir::State": f"{folder}/state",
        "Dir::State::status": f"{folder}/state/status",
        "Dir::Cache": f"{folder}/cache",
        "Dir::Log": f"{folder}/log",
        "Acquire::Languages": "none",
    }
    if os.geteuid() == 0:
        own["APT::Sandbox::User"] = "root"  # else apt warns that its own user cannot enter the folder
    kept = (line for line in dump.splitlines() if line.startswith("Acquire::") and not line.endswith(' "";'))
    apart = (line for line in kept if not line.startswith(("Acquire::IndexTargets", "Acquire::Languages")))
    return "".join(f"{line}\n" for line in [*apart, *(f'{name} "{value}";' for name, value in own.items())])


def download(package: str, suite: str, folder: Path, etc: Path = ETC) -> Path:
    """The package's .deb, in the folder."""
    if not shutil.which("apt-get"):
        raise CannotError(f"there is no apt-get here to fetch {package} with; {ADVICE}")
    candidates = with_suite(archives(etc), suite)
    if not candidates:
        raise CannotError(f"apt is configured for no Debian archive, so {package} cannot be fetched; {ADVICE}")
    _prepare(folder)
    said = ""
    for archive in candidates:
        (folder / "sources.d/archive.sources").write_text(stanza(archive, suite))
        note(f"asking the configured Debian archive for {package} of {suite}")
        said = _apt(folder, "update", "-qq", "--error-on=any")
        if not said:
            said = _fetch(folder, package)
            if not said:
                return next(folder.glob(f"{package}_*.deb"))
    raise CannotError(f"apt could not get {package} of {suite}: {said}; {ADVICE}")


def _prepare(folder: Path) -> None:
    for name in ("sources.d", "state/lists/partial", "cache/archives/partial", "log"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "state/status").touch()
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=False).stdout
    (folder / "apt.conf").write_text(settings(folder, dump))


def _fetch(folder: Path, package: str) -> str:
    if sys.stderr.isatty():
        return _apt(folder, "download", package, stream=True)
    note(f"downloading {package}")
    return _apt(folder, "download", "-qq", package)


def _apt(folder: Path, *arguments: str, stream: bool = False) -> str:
    """Its last complaint, empty if it had none and succeeded."""
    done = subprocess.run(
        ["apt-get", *arguments],
        cwd=folder,
        env=os.environ | {"APT_CONFIG": str(folder / "apt.conf"), "LC_ALL": "C.UTF-8"},
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if stream else subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return ""
    complaints = [line for line in done.stderr.splitlines() if line.startswith("E:")]
    return complaints[0].removeprefix("E:").strip() if complaints else f"apt-get ended with {done.returncode}"
