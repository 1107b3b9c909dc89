"""Where the source comes from, apt's private configuration, and the exported headers; nothing is fetched."""

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.selftest import apt, build, source
from tests.selftest.say import BrokenError, CannotError

MAKEFILE = "# SPDX\nVERSION = 7\nPATCHLEVEL = 2\nSUBLEVEL = 12\nEXTRAVERSION =\n"
needs_dpkg = pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="no dpkg-deb")


def make_tree(folder: Path) -> Path:
    for name in source.FILES:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(MAKEFILE if name == "Makefile" else f"/* {name} */\n")
    return folder


def make_tar(path: Path, *, without: str = "", top: str = "linux-source-7.2") -> Path:
    with tarfile.open(path, "w:xz") as tar:
        for name in ("README", *source.FILES, "usr/Makefile"):
            if name != without:
                member = tarfile.TarInfo(f"{top}/{name}")
                content = MAKEFILE.encode() if name == "Makefile" else name.encode()
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def make_deb(folder: Path) -> Path:
    root = folder / "package"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "usr/src").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(
        "Package: linux-source-7.2\nVersion: 7.2.12-1\nArchitecture: all\nMaintainer: a <a@b>\nDescription: x\n"
    )
    make_tar(root / "usr/src/linux-source-7.2.tar.xz")
    path = folder / "linux-source-7.2_7.2.12-1_all.deb"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", root, path], check=True, capture_output=True)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one, and nothing installed or to be fetched."""

    def fetch(package: str, *_: object) -> Path:
        raise CannotError(f"would fetch {package}")

    monkeypatch.setattr(source, "INSTALLED", tmp_path / "not-installed.tar.xz")
    monkeypatch.setattr(apt, "download", fetch)
    return tmp_path / "cache"


# ---- finding it --------------------------------------------------------------------------------------------


def test_a_given_tree(tmp_path: Path, cache: Path) -> None:
    found = source.find(make_tree(tmp_path / "tree"), cache)
    assert (found.tree, found.version) == (tmp_path / "tree", "7.2.12")


def test_a_given_tar_is_unpacked_once(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar = make_tar(tmp_path / "linux-7.2.12.tar.xz", top="linux-7.2.12")
    first, again = source.find(tar, cache), source.find(tar, cache)
    assert first == again
    assert (first.tree / "include/uapi/linux/vfio.h").read_text() == "include/uapi/linux/vfio.h"
    assert not (first.tree / "README").exists()
    assert capsys.readouterr().out.count("unpacking") == 1
    assert [path.name for path in cache.iterdir()] == [first.tree.name]


@needs_dpkg
def test_a_given_package(tmp_path: Path, cache: Path) -> None:
    assert source.find(make_deb(tmp_path), cache).version == "7.2.12"


@needs_dpkg
def test_fetched_then_cached(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deb = make_deb(tmp_path)
    monkeypatch.setattr(apt, "download", lambda *_: deb)
    assert source.find(None, cache).origin.endswith("fetched")
    assert source.find(None, cache).origin.endswith("cached")


def test_the_installed_package(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "INSTALLED", make_tar(tmp_path / "linux-source-7.2.tar.xz"))
    assert source.find(None, cache).origin.endswith("installed")


def test_nothing_here(cache: Path) -> None:
    with pytest.raises(CannotError, match=r"would fetch linux-source-7\.2"):
        source.find(None, cache)


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_a_given_path_that_is_no_source(name: str, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CannotError, match=f"{name}"):
        source.find(tmp_path / name, cache)


def test_archives_that_are_no_source(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "text.tar.xz").write_text("hello")
    with pytest.raises(BrokenError, match="cannot unpack"):
        source.find(tmp_path / "text.tar.xz", cache)
    with pytest.raises(BrokenError, match=r"it has no .*iommufd_utils\.h"):
        source.find(make_tar(tmp_path / "a.tar.xz", without=f"{source.SELFTESTS}/iommu/iommufd_utils.h"), cache)
    assert list(cache.iterdir()) == []


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert source.default_cache() == tmp_path / "iommufdd"


# ---- apt ---------------------------------------------------------------------------------------------------

STANZAS = """\
Types: deb
# a comment
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mQINB

Types: deb-src
URIs: http://source.example/debian

Enabled: no
Types: deb
URIs: http://off.example/debian
Suites: trixie-backports
"""
LINES = """\
deb [arch=amd64 signed-by=/k.gpg] http://lines.example/debian/ trixie main contrib # comment
#deb http://commented.example/debian trixie main
deb-src http://source.example/debian trixie main
deb http://vendor.example/apt stable main
"""


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text(LINES)
    (tmp_path / "sources.list.d/debian.sources").write_text(STANZAS)
    (tmp_path / "sources.list.d/debian.sources.off").write_text("Types: deb\nURIs: http://no.example/debian\n")
    return tmp_path


def test_what_apt_is_configured_for(etc: Path) -> None:
    found = {archive.uri: archive for archive in apt.archives(etc)}
    assert list(found) == [
        "http://lines.example/debian/",
        "http://vendor.example/apt",
        "http://mirror.example/debian",
        "http://mirror.example/debian-security",
    ]
    assert found["http://lines.example/debian/"].signed_by == "/k.gpg"
    assert found["http://mirror.example/debian"].suites == ("bookworm", "bookworm-updates")
    assert found["http://mirror.example/debian-security"].signed_by.endswith("\n .\n mQINB")


def test_candidates_for_a_suite(etc: Path) -> None:
    (etc / "sources.list.d/extra.list").write_text("deb http://own.example/copy trixie-backports main\n")
    found = apt.with_suite(apt.archives(etc), "trixie-backports")
    assert [archive.uri for archive in found] == [
        "http://own.example/copy",
        "http://lines.example/debian/",
        "http://mirror.example/debian",
    ]


def test_an_archive_is_tried_once(etc: Path) -> None:
    (etc / "sources.list.d/extra.list").write_text("deb http://mirror.example/debian/ trixie-backports main\n")
    found = apt.with_suite(apt.archives(etc), "trixie-backports")
    assert [archive.uri.rstrip("/") for archive in found] == [
        "http://mirror.example/debian",
        "http://lines.example/debian",
    ]


def test_the_stanza_written() -> None:
    archive = apt.Archive("http://mirror.example/debian", ("trixie",), "/k.gpg")
    assert apt.stanza(archive, "x-backports") == (
        "Types: deb\nURIs: http://mirror.example/debian\nSuites: x-backports\nComponents: main\nSigned-By: /k.gpg\n"
    )
    assert "Signed-By" not in apt.stanza(archive._replace(signed_by=""), "x")


def test_apt_stays_in_its_folder(tmp_path: Path) -> None:
    dump = (
        'APT::Update::Post-Invoke:: "touch /x";\nAcquire "";\nAcquire::http::Proxy "http://p:3";\nDir::State "var";\n'
        'Acquire::IndexTargets::deb::DEP-11::MetaKey "y";\nAcquire::Languages "de";\n'
    )
    lines = apt.settings(tmp_path, dump).splitlines()
    assert lines[0] == 'Acquire::http::Proxy "http://p:3";'
    assert not [line for line in lines if "Post-Invoke" in line or "IndexTargets" in line or line == "var"]
    assert f'Dir::State "{tmp_path}/state";' in lines
    assert 'Acquire::Languages "none";' in lines


def test_no_apt_or_no_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    with pytest.raises(CannotError, match="no Debian archive"):
        apt.download("linux-source-7.2", "trixie-backports", tmp_path / "work", tmp_path)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(CannotError, match="LINUX_SRC="):
        apt.download("linux-source-7.2", "trixie-backports", tmp_path / "work", tmp_path)


# ---- building ----------------------------------------------------------------------------------------------


def test_headers_as_userspace_gets_them() -> None:
    header = (
        "#ifndef _UAPI_X_H\n#include <linux/compiler.h>\n\t__u64 __user *data;\t/* the inline asm */\n"
        "struct { int a; } __packed;\nstatic inline int f(void);\n#endif /* _UAPI_X_H */\n"
    )
    assert build.exported(header) == (
        "#ifndef _X_H\n\n\t__u64 *data;\t/* the __inline__ asm */\n"
        "struct { int a; } __attribute__((packed));\nstatic __inline__ int f(void);\n#endif /* _X_H */\n"
    )


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    with pytest.raises(CannotError, match=r"no-such-compiler; apt-get install gcc"):
        build.compiler()


@pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc")
def test_no_libcap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CannotError, match=r"sys/capability\.h.*apt-get install libcap-dev"):
        build._require_libcap(["gcc", "-nostdinc"])


@pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc")
def test_a_source_that_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_require_libcap", lambda _: None)
    tree = make_tree(tmp_path / "tree")
    (tree / source.SELFTESTS / "iommu/iommufd.c").write_text("int main(void) { return nothing; }\n")
    with pytest.raises(BrokenError, match=r"iommufd\.c does not compile: .*nothing"):
        build.build(source.Source(tree, "made"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]
