"""`iommufdctl doctor`: the checks for `run` and `mount`, on this host and on hosts that lack something."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from iommufd_client import cli as command
from iommufd_client import doctor_probe as probe
from iommufd_client import doctor_run
from iommufd_client.doctor import FAIL, NOTE, OK, Finding
from iommufd_client.show import ansi, plain
from iommufd_uapi import seccomp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


def by_topic(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.topic: finding for finding in findings}


def failing(number: int) -> Callable[..., None]:
    """A trial that ends so."""

    def trial(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return trial


def works(*_: object) -> int:
    return 0


@pytest.fixture
def good_host(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Where everything works, whatever the tests run on."""
    monkeypatch.setattr(seccomp, "native", lambda: seccomp.ARCHITECTURES["x86_64"])
    monkeypatch.setattr(probe, "knows", lambda *_: errno.EFAULT)
    for name in ("listen", "wake_up", "reach", "map_files", "user_namespace", "mount_for_all", "mount_for_one"):
        monkeypatch.setattr(probe, name, works)
    texts = {"/proc/sys/kernel/seccomp/actions_avail": "trap errno user_notif allow"}
    monkeypatch.setattr(doctor_run, "read_text", texts.get)
    return monkeypatch


def read(monkeypatch: pytest.MonkeyPatch, **texts: str) -> None:
    """What the files of /proc/sys say, by their last names."""
    monkeypatch.setattr(doctor_run, "read_text", lambda path: texts.get(os.path.basename(path)))


# ---- trials ----


def test_outcomes() -> None:
    assert probe.outcome(lambda: None) == 0
    assert probe.outcome(failing(errno.EBUSY)) == errno.EBUSY
    assert probe.outcome(lambda: os.kill(os.getpid(), signal.SIGKILL)) == errno.ENOSYS
    assert probe.said(errno.EBUSY) == os.strerror(errno.EBUSY)
    assert probe.said(probe.outcome(lambda: sys.exit(1))) == "the trial failed"


def test_trials_leave_nothing_behind() -> None:
    def left() -> tuple[list[str], str, str, str]:
        children = Path("/proc/thread-self/children").read_text(encoding="ascii")  # other tests' may be among them
        with open("/proc/self/mounts", encoding="utf-8") as mounts, open("/proc/self/uid_map", encoding="utf-8") as ids:
            return os.listdir("/proc/self/fd"), mounts.read(), ids.read(), children

    before = left()
    for check in doctor_run.CHECKS:
        assert all(isinstance(finding, Finding) for finding in check())
    assert left() == before


def test_a_trial_is_not_the_verdict_on_the_process_that_makes_it() -> None:
    """The filter, no_new_privs and the namespaces stay in the child."""

    def lines() -> list[str]:
        with open("/proc/self/status", encoding="utf-8") as file:
            return [line for line in file if line.startswith(("NoNewPrivs", "Seccomp", "Cap"))]

    before = lines()
    list(doctor_run.notification())
    assert lines() == before


# ---- run ----


def test_a_good_host(good_host: pytest.MonkeyPatch) -> None:
    for check in (doctor_run.architecture, doctor_run.notification, doctor_run.reach, doctor_run.pins):
        assert {finding.verdict for finding in check()} == {OK}
    assert list(by_topic(doctor_run.notification())) == ["run: seccomp", "run: listener", "run: wake-up"]


def test_another_machine(good_host: pytest.MonkeyPatch) -> None:
    good_host.setattr(seccomp, "native", lambda: None)
    (finding,) = doctor_run.architecture()
    assert finding.verdict == FAIL
    assert "x86_64 and aarch64" in finding.seen
    assert list(doctor_run.notification()) == []


def test_no_user_notification(good_host: pytest.MonkeyPatch) -> None:
    read(good_host, actions_avail="kill_process errno allow")
    (finding,) = doctor_run.notification()
    assert (finding.topic, finding.verdict) == ("run: seccomp", FAIL)
    assert "user_notif" in finding.seen


def test_seccomp_is_forbidden(good_host: pytest.MonkeyPatch) -> None:
    good_host.setattr(probe, "knows", lambda *_: errno.EPERM)
    (finding,) = doctor_run.notification()
    assert (finding.verdict, finding.seen) == (FAIL, f"seccomp(): {os.strerror(errno.EPERM)}")


def test_linux_before_5_19(good_host: pytest.MonkeyPatch) -> None:
    known = seccomp.SECCOMP_FILTER_FLAG_NEW_LISTENER
    good_host.setattr(probe, "knows", lambda _, flags: errno.EFAULT if flags == known else errno.EINVAL)
    (finding,) = doctor_run.notification()
    assert finding.verdict == FAIL
    assert "5.19" in finding.seen


def test_linux_before_6_6(good_host: pytest.MonkeyPatch) -> None:
    good_host.setattr(probe, "wake_up", failing(errno.ENOTTY))
    found = by_topic(doctor_run.notification())
    assert found["run: listener"].verdict == OK
    assert found["run: wake-up"].verdict == NOTE
    assert "taskset" in found["run: wake-up"].advice


@pytest.mark.parametrize(("number", "words"), [(errno.EBUSY, "listens already"), (errno.EACCES, "cannot be installed")])
def test_no_listener(number: int, words: str, good_host: pytest.MonkeyPatch) -> None:
    good_host.setattr(probe, "listen", failing(number))
    found = by_topic(doctor_run.notification())
    assert found["run: listener"].verdict == FAIL
    assert words in found["run: listener"].seen
    assert "run: wake-up" not in found


@pytest.mark.parametrize(
    ("scope", "advice"),
    [
        ("1", "allow ptrace in the sandbox"),
        ("2", "sysctl kernel.yama.ptrace_scope=1; or a daemon of root"),
        ("3", "boot without it"),
        ("0", "allow ptrace in the sandbox"),
    ],
)
def test_memory_that_may_not_be_looked_into(scope: str, advice: str, good_host: pytest.MonkeyPatch) -> None:
    good_host.setattr(probe, "reach", lambda: errno.EACCES)
    good_host.setattr(probe, "reach_below", lambda: errno.EACCES)
    good_host.setattr(probe, "reach_in_user_namespace", failing(errno.EPERM))
    read(good_host, ptrace_scope=scope)
    (finding,) = doctor_run.reach()
    assert finding.verdict == FAIL
    assert finding.advice.startswith(advice)
    assert "unshare" not in finding.advice


def test_a_user_namespace_helps_against_yama(good_host: pytest.MonkeyPatch) -> None:
    good_host.setattr(probe, "reach", lambda: errno.EACCES)
    good_host.setattr(probe, "reach_below", lambda: errno.EACCES)
    good_host.setattr(probe, "reach_in_user_namespace", works)
    read(good_host, ptrace_scope="2")
    (finding,) = doctor_run.reach()
    assert finding.advice.endswith("; or unshare -r iommufdctl run -- CMD")


def test_the_keeper_may_what_the_daemon_may_not(good_host: pytest.MonkeyPatch) -> None:
    good_host.setattr(probe, "reach", lambda: errno.EACCES)
    good_host.setattr(probe, "reach_below", works)
    read(good_host, ptrace_scope="1")
    (finding,) = doctor_run.reach()
    assert (finding.verdict, finding.advice) == (OK, "")
    assert finding.seen == "run opens CMD's memory for the daemon, which may not (kernel.yama.ptrace_scope is 1)"


def test_a_parent_may_look_into_its_child() -> None:
    assert probe.reach_below() == 0


def test_yama_lets_root_pass(good_host: pytest.MonkeyPatch) -> None:
    read(good_host, ptrace_scope="1")
    (finding,) = doctor_run.reach()
    assert finding.verdict == OK
    assert finding.seen.endswith("though kernel.yama.ptrace_scope is 1")


def test_no_map_files(good_host: pytest.MonkeyPatch) -> None:
    good_host.setattr(probe, "map_files", lambda: errno.EPERM)
    (finding,) = doctor_run.pins()
    assert finding.verdict == NOTE
    assert "CAP_CHECKPOINT_RESTORE" in finding.advice


def test_the_limit_of_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    (finding,) = doctor_run.descriptors()
    assert finding.verdict == NOTE
    assert "start at 132" in finding.seen
    assert finding.advice == "ulimit -n 1024"
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    (finding,) = doctor_run.descriptors()
    assert (finding.verdict, "unlimited" in finding.seen) == (OK, True)


def test_no_user_namespaces(good_host: pytest.MonkeyPatch) -> None:
    good_host.setattr(probe, "user_namespace", failing(errno.ENOSPC))
    read(good_host, max_user_namespaces="0")
    (finding,) = doctor_run.user_namespaces()
    assert finding.verdict == NOTE
    assert finding.seen.endswith("(user.max_user_namespaces=0)")


# ---- mount ----


def has_fuse(monkeypatch: pytest.MonkeyPatch, path: Path, *, user: int) -> None:
    path.touch()
    monkeypatch.setattr(probe, "DEV_FUSE", str(path))
    monkeypatch.setattr(os, "geteuid", lambda: user)


def test_for_whom_it_can_be_mounted(good_host: pytest.MonkeyPatch, tmp_path: Path) -> None:
    good_host.setattr(probe, "DEV_FUSE", str(tmp_path / "fuse"))
    (finding,) = doctor_run.mount()
    assert (doctor_run.mounts(), finding.verdict) == (doctor_run.NOBODY, NOTE)
    assert finding.advice.endswith("modprobe fuse")
    has_fuse(good_host, tmp_path / "fuse", user=0)
    assert doctor_run.mounts() == doctor_run.ALL
    assert [(each.topic, each.verdict) for each in doctor_run.mount()] == [("mount", OK), ("mount --exact", OK)]
    good_host.setattr(probe, "mount_for_all", failing(errno.EPERM))
    assert doctor_run.mounts() == doctor_run.ONE
    good_host.setattr(probe, "listen", failing(errno.EBUSY))
    assert [(each.topic, each.verdict) for each in doctor_run.mount()] == [("mount", OK), ("mount --exact", NOTE)]
    has_fuse(good_host, tmp_path / "fuse", user=1000)
    good_host.setattr(probe, "mount_for_one", failing(errno.EPERM))
    (finding,) = doctor_run.mount()
    assert (doctor_run.mounts(), finding.verdict) == (doctor_run.NOBODY, NOTE)
    assert os.strerror(errno.EPERM) in finding.seen


# ---- the command ----


def test_exit_status_and_summary(
    good_host: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["doctor", "--socket-path", str(tmp_path / "nothing")]
    assert command.main(words) == 0
    assert capsys.readouterr().out.endswith("\niommufdctl run works here\n")
    good_host.setattr(probe, "listen", failing(errno.EBUSY))
    assert command.main(words) == 1
    text = capsys.readouterr().out
    assert "FAIL  run: listener" in text
    assert text.endswith("\niommufdctl run does not work here: run: listener\n")
    assert command.main([*words, "--json"]) == 1
    found = {each["topic"]: each for each in json.loads(capsys.readouterr().out)}
    assert found["run: listener"]["verdict"] == "fail"


def test_colours(good_host: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["doctor", "--socket-path", str(tmp_path / "nothing")]
    for paint in (plain, ansi):
        good_host.setattr(command, "_paint", lambda paint=paint: paint)
        command.main(words)
        assert ("\x1b" in capsys.readouterr().out) == (paint is ansi)


def test_run_inside_run() -> None:
    """The one listener there can be, for real."""
    path = os.pathsep.join(each or os.getcwd() for each in sys.path)
    environment = os.environ | {"PYTHONPATH": path}
    doctor = [sys.executable, "-m", "iommufd_client.cli", "doctor", "--json"]
    run = [sys.executable, "-m", "iommufd_client.cli", "run", "--"]
    outside = subprocess.run(doctor, capture_output=True, text=True, env=environment, timeout=60)
    if outside.returncode:
        pytest.skip("run does not work here")
    inside = subprocess.run([*run, *doctor], capture_output=True, text=True, env=environment, timeout=60)
    found = {each["topic"]: each for each in json.loads(inside.stdout)}
    assert inside.returncode == 1
    assert [topic for topic, each in found.items() if each["verdict"] == FAIL] == ["run: listener"]
    assert "listens already" in found["run: listener"]["seen"]
