"""Room client: `iommufdctl doctor`, what `iommufdctl run` and `iommufdctl mount` need.

`run`: seccomp user notification (run.py), the right to look into CMD's memory, and some optional parts. `mount`: FUSE.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING

from iommufd_uapi import seccomp

from . import doctor_probe as probe
from .doctor import FAIL, NOTE, OK, Finding, read_text

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT_DAEMON = "iommufdctl run --socket-path /run/iommufdd/iommufdd.sock -- CMD"  # where a unit of systemd has it
ALL, ONE, NOBODY = "all", "one", ""  # for whom a /dev/iommu can be mounted
OUTSIDE = "start it outside of iommufdctl run, of a container with a seccomp agent, of a sandbox"
YAMA = "/proc/sys/kernel/yama/ptrace_scope"


# ---- needed by run ----


def architecture() -> Iterator[Finding]:
    topic, machine = "run: machine", os.uname().machine
    if seccomp.native() is None:
        advice = "the client library and the native protocol work everywhere"
        yield Finding(topic, FAIL, f"{machine}: system calls are known of x86_64 and aarch64", advice)
    elif struct.calcsize("P") != 8:
        yield Finding(topic, FAIL, f"a 32-bit Python on {machine}", "install a 64-bit Python")
    else:
        yield Finding(topic, OK, f"{machine}: its system calls are known; those of 32-bit programs are not seen")


def notification() -> Iterator[Finding]:
    """User notification as such, and WAIT_KILLABLE_RECV, without which a signal would repeat an ioctl."""
    topic, numbers = "run: seccomp", seccomp.native()
    if numbers is None:
        return
    killable = seccomp.SECCOMP_FILTER_FLAG_NEW_LISTENER | seccomp.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
    actions = read_text("/proc/sys/kernel/seccomp/actions_avail")
    if actions is not None and "user_notif" not in actions.split():
        advice = "a kernel from 5.19 on with CONFIG_SECCOMP_FILTER has it"
        yield Finding(topic, FAIL, "the kernel has no user notification (user_notif)", advice)
        return
    number = probe.knows(numbers, seccomp.SECCOMP_FILTER_FLAG_NEW_LISTENER)
    if number != errno.EFAULT:
        yield Finding(topic, FAIL, f"seccomp(): {os.strerror(number)}", "a sandbox forbids it, or the kernel lacks it")
    elif probe.knows(numbers, killable) != errno.EFAULT:
        seen = "no WAIT_KILLABLE_RECV (Linux 5.19): a signal would carry out an ioctl twice"
        yield Finding(topic, FAIL, seen, "use a kernel from 5.19 on")
    else:
        yield Finding(topic, OK, "user_notif, which signals do not disturb (WAIT_KILLABLE_RECV)")
        yield from _listener(numbers)


def _listener(numbers: seccomp.Syscalls) -> Iterator[Finding]:
    topic = "run: listener"
    number = probe.outcome(lambda: _ignore(probe.listen(numbers)))
    if number == errno.EBUSY:
        yield Finding(topic, FAIL, "a program around this one listens already, and there can be one only", OUTSIDE)
        return
    if number:
        yield Finding(topic, FAIL, f"cannot be installed: {probe.said(number)}", OUTSIDE)
        return
    yield Finding(topic, OK, "can be installed; nobody else listens")
    topic = "run: wake-up"
    if probe.outcome(lambda: probe.wake_up(numbers)):
        seen = "no SYNC_WAKE_UP (Linux 6.6): an ioctl takes up to 80 us instead of 20"
        yield Finding(topic, NOTE, seen, "bind it to one CPU: taskset -c 0 iommufdctl run -- CMD")
    else:
        yield Finding(topic, OK, "on the caller's CPU (SYNC_WAKE_UP)")


def _ignore(_result: object) -> None:
    """To make a trial of a function with a result."""


def reach() -> Iterator[Finding]:
    """The daemon of `run` is CMD's sibling, whom Yama's scope 1 keeps out; its keeper is the ancestor, who may."""
    topic, number = "run: ptrace", probe.reach()
    scope = read_text(YAMA)
    if not number:
        known = "" if scope in (None, "0") else f", though kernel.yama.ptrace_scope is {scope}"
        yield Finding(topic, OK, f"the daemon may look into CMD's memory{known}")
    elif not probe.reach_below():
        why = f" (kernel.yama.ptrace_scope is {scope})" if scope not in (None, "0") else ""
        yield Finding(topic, OK, f"run opens CMD's memory for the daemon, which may not{why}")
    elif scope == "2":
        seen = "kernel.yama.ptrace_scope is 2: only who has CAP_SYS_PTRACE may look into CMD's memory"
        ways = ["sysctl kernel.yama.ptrace_scope=1", f"a daemon of root: {ROOT_DAEMON}"]
        if not probe.outcome(probe.reach_in_user_namespace):
            ways.append("unshare -r iommufdctl run -- CMD")
        yield Finding(topic, FAIL, seen, "; or ".join(ways))
    elif scope == "3":
        seen = "kernel.yama.ptrace_scope is 3: nobody may look into CMD's memory"
        yield Finding(topic, FAIL, seen, "boot without it; the client library and the native protocol work")
    else:
        seen = f"the daemon may not look into CMD's memory: {probe.said(number)}"
        yield Finding(topic, FAIL, seen, f"allow ptrace in the sandbox, or a daemon of root: {ROOT_DAEMON}")


# ---- optional parts of run ----


def pins() -> Iterator[Finding]:
    topic, number = "run: pins", probe.map_files()
    if not number:
        yield Finding(topic, OK, "shared memory stays pinned after munmap() and exit (/proc/PID/map_files)")
        return
    seen = "shared memory that no process maps or has open any more is lost to DMA: no /proc/PID/map_files"
    advice = "be root; or keep a descriptor of it (memfd, not MAP_ANONYMOUS). It takes CAP_CHECKPOINT_RESTORE"
    yield Finding(topic, NOTE, seen, advice)


def descriptors() -> Iterator[Finding]:
    import resource

    from .run import BASE, ROOM, fd_base

    topic, base = "run: descriptors", fd_base()
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    if base >= BASE:
        yield Finding(topic, OK, f"RLIMIT_NOFILE is {limit}: the daemon's start at {base}")
        return
    seen = f"RLIMIT_NOFILE is {limit}: the daemon's start at {base}, from where on each read() and write() takes 15 us"
    yield Finding(topic, NOTE, seen, f"ulimit -n {BASE + ROOM}")


def fault_injection() -> Iterator[Finding]:
    """The folder that stands in for /sys/kernel/debug; VmPin and VmLck need nothing."""
    from .debugfs import debug_folder

    topic = "run --proc"
    number = probe.outcome(lambda: os.close(debug_folder()))
    if number:
        seen = f"no fault injection: {probe.said(number)}"
        yield Finding(topic, NOTE, seen, "only for fail-nth tests: be root, or allow user namespaces")
    else:
        yield Finding(topic, OK, "VmPin, VmLck and fault injection can be served")


def user_namespaces() -> Iterator[Finding]:
    topic, number = "user namespaces", probe.outcome(probe.user_namespace)
    if not number:
        yield Finding(topic, OK, "can be made")
        return
    switches = {
        "user.max_user_namespaces": "0",
        "kernel.unprivileged_userns_clone": "0",
        "kernel.apparmor_restrict_unprivileged_userns": "1",
    }
    off = [f"{name}={value}" for name, value in switches.items() if read_text(_sysctl(name)) == value]
    why = f" ({', '.join(off)})" if off else ""
    advice = "only for fault injection of run --proc, and for mount, without root; root needs none"
    yield Finding(topic, NOTE, f"{probe.said(number)}{why}", advice)


def _sysctl(name: str) -> str:
    return f"/proc/sys/{name.replace('.', '/')}"


# ---- mount ----


def mounts() -> str:
    """For whom we can mount: ALL, which takes root; ONE, in a namespace of its own; NOBODY."""
    if not os.access(probe.DEV_FUSE, os.R_OK | os.W_OK):
        return NOBODY
    if os.geteuid() == 0 and not probe.outcome(probe.mount_for_all):
        return ALL
    return NOBODY if probe.outcome(probe.mount_for_one) else ONE


def mount() -> Iterator[Finding]:
    path, for_whom = probe.DEV_FUSE, mounts()
    advice = "only for what run cannot serve (doctor CMD says what it is): "
    if for_whom == ALL:
        yield Finding("mount", OK, "a /dev/iommu for everybody can be mounted")
        yield _exact()
    elif for_whom == ONE:
        yield Finding("mount", OK, "a /dev/iommu for one program can be mounted: iommufdctl mount /dev/iommu -- CMD")
        yield _exact()
    elif not os.path.exists(path):
        yield Finding("mount", NOTE, f"{path} is not there", f"{advice}modprobe fuse")
    elif not os.access(path, os.R_OK | os.W_OK):
        yield Finding("mount", NOTE, f"{path} may not be opened", f"{advice}be root, or chmod 0666 {path}")
    else:
        why = probe.said(probe.outcome(probe.mount_for_one))
        yield Finding("mount", NOTE, f"not here: {why}", f"{advice}be root, or allow user namespaces")


def _exact() -> Finding:
    """Whether CMD can have a listener besides."""
    topic, numbers = "mount --exact", seccomp.native()
    if numbers is None or probe.outcome(lambda: _ignore(probe.listen(numbers))):
        return Finding(topic, NOTE, "no seccomp listener here: mmap() and reads of nothing differ from a device's")
    seen = "mmap() and reads of nothing are a device's too: iommufdctl mount --exact /dev/iommu -- CMD"
    return Finding(topic, OK, seen)


CHECKS = (
    architecture, notification, reach, pins, descriptors, fault_injection, user_namespaces, mount,
)  # fmt: skip
