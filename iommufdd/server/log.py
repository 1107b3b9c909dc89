"""The daemon's log: one event a line, `name key=value ...`, through the standard library's logging."""

from __future__ import annotations

import json
import logging
import re
import time

logger = logging.getLogger("iommufdd")

BURST = 10  # lines of one kind about one uid ...
INTERVAL = 10.0  # ... in this many seconds (as lib/ratelimit.c)

_PLAIN = re.compile(r"[^\s\"=\\\x00-\x1f\x7f]+")


def event(level: int, name: str, **fields: object) -> None:
    """Log one event. Values come from peers too: `KeyValue` quotes them, so that a line stays a line."""
    if logger.isEnabledFor(level):
        logger.log(level, name, extra={"fields": fields})


def bug(error: Exception, **fields: object) -> None:
    """Log an exception that nobody expected: never what a peer did, always a mistake of ours."""
    logger.error("bug", exc_info=error, extra={"fields": fields})


class KeyValue(logging.Formatter):
    """`level event key=value key="two words"`"""

    def format(self, record: logging.LogRecord) -> str:
        fields = {"level": record.levelname.lower(), "event": record.getMessage(), **fields_of(record)}
        return " ".join(f"{key}={_value(value)}" for key, value in fields.items())


class Json(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        level = record.levelname.lower()
        fields = {"time": record.created, "level": level, "event": record.getMessage(), **fields_of(record)}
        return json.dumps(fields, default=str)


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    """What stands beside the message, by name; the traceback too."""
    fields: dict[str, object] = dict(getattr(record, "fields", {}))
    if record.exc_info:
        fields["traceback"] = logging.Formatter().formatException(record.exc_info)
    return fields


def _value(value: object) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


class Ratelimit:
    """At most BURST lines an INTERVAL for each key, so that a peer cannot fill the disk."""

    def __init__(self) -> None:
        self._windows: dict[object, tuple[float, int]] = {}

    def __call__(self, key: object) -> bool:
        """Whether a line may be written."""
        now = time.monotonic()
        since, count = self._windows.get(key, (now, 0))
        if now - since > INTERVAL:
            since, count = now, 0
        self._windows[key] = since, count + 1
        return count < BURST
