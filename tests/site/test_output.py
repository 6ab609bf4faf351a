from __future__ import annotations

import logging
import sys

import pytest

from hanse.site.output import Output


def test_lines_of_each_site_go_to_the_sink() -> None:
    lines: list[tuple[str, str]] = []
    output = Output(lambda site, line: lines.append((site, line)))
    with output.of("a"):
        print("one\ntwo")
        print("be", end="")
    with output.of("b"):
        print("other", file=sys.stderr)
        print("never ended", end="")
    with output.of("a"):
        print("gun")
        print("10%\r50%\r100%")
    output.close()
    assert lines == [("a", "one"), ("a", "two"), ("b", "other"), ("a", "begun"), ("a", "100%"), ("b", "never ended")]


def test_without_a_sink_the_name_stands_before(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output()
    with output.of("site-3"):
        print("hello")
        print("careful", file=sys.stderr)
    print("not a site's")
    assert capsys.readouterr().out == "site-3: hello\nsite-3: careful\nnot a site's\n"


def test_a_logging_handler_made_at_one_site_serves_all(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[tuple[str, str]] = []
    output = Output(lambda site, line: lines.append((site, line)))
    with output.of("a"):
        handler = logging.StreamHandler()
    record = logging.makeLogRecord({"msg": "hello"})
    with output.of("b"):
        handler.handle(record)
    handler.handle(record)
    assert lines == [("b", "hello")]
    assert capsys.readouterr().out == "hello\n"


def test_an_error_puts_the_streams_back() -> None:
    out = sys.stdout
    with pytest.raises(ValueError, match="x"), Output(lambda site, line: None).of("a"):
        raise ValueError("x")
    assert sys.stdout is out
