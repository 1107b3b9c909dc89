"""A client in C, written from docs/PROTOCOL.md alone, against a real daemon."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.server.conftest import Daemon

SOURCE = Path(__file__).with_name("client.c")


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_c_client(daemon: Daemon, tmp_path: Path) -> None:
    binary = tmp_path / "client"
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["gcc", *flags, "-o", binary, SOURCE], check=True)
    done = subprocess.run([binary, daemon.path], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == 21
    assert "FAILED" not in done.stdout
