"""What real programs do with the file, with descriptors that ioctls give, with processes and signals."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .conftest import HABITS, LIMIT

if TYPE_CHECKING:
    from iommufd_client.admin import Admin
    from iommufd_client.testing import Daemon
    from iommufd_uapi.admin import Counts

    from .conftest import Mount

OURS = ("node", "memory", "numbers", "wakes", "alarms", "crowd", "killed", "setuid")
AS_UNDER_RUN = ("threads", "forks", "execs", "cloexec", "rights", "full", "alarms", "interrupts", "memory")
X86_64 = {"numbers", "wakes", "alarms", "crowd", "killed", "setuid"}  # take descriptors


@pytest.mark.parametrize("habit", OURS)
def test_a_program_with_this_habit(mount: Mount, daemon: Daemon, habit: str) -> None:
    if habit in X86_64 and os.uname().machine != "x86_64":
        pytest.skip("descriptors are given on x86-64 only")
    if habit == "setuid" and os.geteuid():
        pytest.skip("only root can become another user")
    result = mount.habit(habit, "--socket-path", daemon.socket_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert not daemon.log.count("event=bug")


@pytest.mark.parametrize("habit", AS_UNDER_RUN)
def test_a_program_with_this_habit_sees_what_a_kernel_shows(
    mount: Mount, compiled: Path, daemon: Daemon, habit: str
) -> None:
    result = mount("--socket-path", daemon.socket_path, "/dev/iommu", "--", compiled / "behave", habit)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    assert set(result.stdout.split()) == {"ok"}


def test_a_traced_program_gets_no_descriptors_and_the_log_says_so(mount: Mount, daemon: Daemon) -> None:
    result = mount.habit("traced", "--socket-path", daemon.socket_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "event=no-descriptor" in daemon.log


def test_nothing_is_left_in_the_daemon(mount: Mount, daemon: Daemon) -> None:
    """The last namespace is taken down after its process has been waited for: in the end nothing is left."""
    with daemon.admin() as admin:
        before = admin.stats()
        for habit in ("node", "numbers", "crowd", "killed"):
            mount.habit(habit, "--socket-path", daemon.socket_path)
        assert left_behind(before, admin) == []


def left_behind(before: Counts, admin: Admin) -> list[str]:
    """What there is more of, when it has had time to go."""
    end = time.monotonic() + 5
    while (left := _more(before, admin.stats())) and time.monotonic() < end:
        time.sleep(0.02)
    return left


def _more(before: Counts, after: Counts) -> list[str]:
    counts = ("contexts", "channels", "objects", "page_files", "files", "charged_fds", "open_fds")
    return [count for count in counts if getattr(after, count) > getattr(before, count)]


def test_a_private_daemon_serves_the_same(mount: Mount) -> None:
    assert mount.habit("node").returncode == 0


def test_what_fails_is_explained(mount: Mount) -> None:
    result = mount("--explain", "--summary", "/dev/iommu", "--", sys.executable, HABITS, "memory")
    assert "IOMMU_IOAS_ALLOC = EFAULT" in result.stderr
    assert "ioctls in" in result.stderr


@pytest.mark.parametrize("habit", ["node", "numbers", "wakes", "crowd"])
def test_as_another_user_in_a_user_namespace(mount: Mount, habit: str) -> None:
    """Mounted, served and used without any privilege."""
    result = become_another_user(mount, "/dev/iommu", "--", sys.executable, str(HABITS), habit)
    assert result.returncode == 0, result.stdout + result.stderr


def become_another_user(mount: Mount, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as somebody without rights."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    become = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        # The node is for root only on many hosts: another one, in a mount namespace of the test.
        command = "mount -t tmpfs none /mnt && mknod -m 666 /mnt/fuse c 10 229 && mount --bind /mnt/fuse /dev/fuse"
        inside = ["unshare", "-m", "sh", "-c", f'{command} && exec "$@"', "sh", *become, *words]
        return subprocess.run(inside, env=mount.environment, capture_output=True, text=True, timeout=LIMIT)

    probe = run(*mount.words("/dev/iommu", "--", "true"))
    if probe.returncode:
        pytest.skip(f"another user cannot: {probe.stderr.strip().splitlines()[-1]}")
    return run(*mount.words(*arguments))
