"""The log: one line an event, whatever a value contains."""

import json
import logging
import time

import pytest

from iommufdd.server import log


def record(**fields: object) -> logging.LogRecord:
    made = logging.LogRecord("iommufdd", logging.WARNING, __file__, 1, "channel-closed", None, None)
    made.fields = fields
    return made


def test_text() -> None:
    text = log.KeyValue().format(record(pid=7, why='two words "and" quotes', nl="a\nb", empty="", eq="a=b"))
    assert text == (
        'level=warning event=channel-closed pid=7 why="two words \\"and\\" quotes" nl="a\\nb" empty="" eq="a=b"'
    )


def test_json() -> None:
    line = log.Json().format(record(pid=7, why="a\nb"))
    assert "\n" not in line
    assert json.loads(line) | {"time": 0} == {
        "time": 0,
        "level": "warning",
        "event": "channel-closed",
        "pid": 7,
        "why": "a\nb",
    }


def test_a_bug_is_one_line_too(caplog: pytest.LogCaptureFixture) -> None:
    log.bug(KeyError("x"), pid=1)
    text = log.KeyValue().format(caplog.records[0])
    assert text.startswith("level=error event=bug pid=1 traceback=")
    assert "\n" not in text


def test_ratelimit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    limit = log.Ratelimit()
    assert [limit("a") for _ in range(12)] == [True] * 10 + [False] * 2
    assert limit("b")
    now = 11.0
    assert limit("a")
