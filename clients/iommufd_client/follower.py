"""Room client: `run --trace FILE`, lines that the daemon sends on a socket of their own, written to a file."""

from __future__ import annotations

import os
import socket

from .keeper import RunError

CHUNK = 65_536


class Follower:
    """A file, and the socket whose bytes go there. Who does not write delays nobody but himself."""

    def __init__(self, path: str) -> None:
        """"-" is stderr. RunError."""
        try:
            self._file = os.dup(2) if path == "-" else os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        except OSError as error:
            raise RunError(f"{path}: {error.strerror}") from None
        self._ours, self.theirs = socket.socketpair()

    def fileno(self) -> int:
        return self._ours.fileno()

    def pump(self) -> bool:
        """Write what has come, or wait for it; False when nothing more will."""
        try:
            data = self._ours.recv(CHUNK)
        except OSError:
            return False
        more = bool(data)
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError:  # a full disk, a pipe that nobody reads: the rest is not wanted
            return False
        return more

    def close(self) -> None:
        self._ours.close()
        os.close(self._file)
