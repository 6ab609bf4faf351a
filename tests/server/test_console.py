from __future__ import annotations

import io
import json
import math
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.errors import ConfigError
from hanse.server.console import Console

Event = dict[str, Any]
START: Event = {"event": "start", "time": 100.0, "job": "digits", "sites": 8, "workers": 2, "rounds": 12, "seed": 0}


def update(site: str, round: int = 0, task: str = "train", seconds: float = 0.1, **metrics: float) -> Event:
    return {"event": "update", "round": round, "task": task, "site": site, "seconds": seconds, "metrics": metrics, "weight": 1.0}


def committed(round: int = 0, good: int = 8, best: bool = False, **metrics: Any) -> Event:
    return {"event": "round", "round": round, "time": 1.0, "seconds": 1.25, "asked": 8, "good": good, "metrics": metrics, "best": best}


def failure(site: str, message: str, round: int = 0, code: str = "ValueError") -> Event:
    return {"event": "failure", "round": round, "task": "train", "site": site, "code": code, "message": message, "hint": ""}


def end(status: str = "completed", **more: Any) -> Event:
    return {"event": "end", "time": 106.5, "status": status, "reason": "", **more}


def printed(events: Iterable[Event], mode: str = "plain") -> str:
    file = io.StringIO()
    console = Console(mode, file)
    for event in events:
        console.show(event)
        console.progress(0, 1, 2)
    return file.getvalue()


def test_one_line_a_round() -> None:
    lines = printed([START, committed(accuracy=0.55, loss=1.5), committed(9, good=7, best=True, accuracy=0.97216)]).splitlines()
    assert lines == [
        "digits: 8 sites, 2 workers, 12 rounds, seed 0",
        "round  1/12      1.2 s  8/8 sites  accuracy 0.5500  loss 1.500",
        "round 10/12 *    1.2 s  7/8 sites  accuracy 0.9722",
    ]


def test_simulated_time_stands_beside_the_real_one() -> None:
    (line,) = printed([committed(accuracy=0.55) | {"virtual_s": 7323.0}]).splitlines()
    assert line == "round 1      1.2 s  8/8 sites  2 h 02 min simulated  accuracy 0.5500"


def test_a_resumed_run_says_from_where() -> None:
    assert printed([START | {"resumed": 3}]).endswith("seed 0, resumed after 3 commits\n")


def test_a_round_stays_in_eighty_columns() -> None:
    (line,) = printed([committed(**{f"metric_number_{index}": 0.5 for index in range(9)})]).splitlines()
    assert len(line) <= 80
    assert "metric_number_0 0.5000" in line
    assert line.endswith("  +8")


def test_a_failure_is_one_line_with_site_and_reason() -> None:
    (line,) = printed([failure("site-3", "cannot reshape\nTraceback\n  File x", code="ValueError")]).splitlines()
    assert line == "  site-3 failed: ValueError: cannot reshape"


@pytest.mark.parametrize("closing", [committed(good=0), failure("site-1", "next round", round=1), end("failed")])
def test_more_than_ten_failures_a_round_are_summed_up(closing: Event) -> None:
    failures = [failure(f"site-{index}", "no data", code="KeyError" if index % 5 == 0 else "ValueError") for index in range(25)]
    lines = printed([*failures, closing]).splitlines()
    assert lines[9] == "  site-9 failed: ValueError: no data"
    assert lines[10] == "  and 15 more failed; in all ValueError 20, KeyError 5"


def test_the_closing_lines_say_what_came_out_and_where_it_is() -> None:
    best = {"metric": "accuracy", "value": 0.97, "round": 4}
    text = printed(
        [START, end(best=best, folder="runs/d", model="runs/d/model.safetensors", report="runs/d/report.html", resume="never mind")]
    )
    assert text.splitlines()[-5:] == [
        "completed in 6.5 s",
        "  best    accuracy 0.9700 in round 5",
        "  model   runs/d/model.safetensors",
        "  report  runs/d/report.html",
        "  folder  runs/d",
    ]


def test_a_failed_job_says_why_and_how_to_go_on() -> None:
    lines = printed(
        [START, end("failed", best=None, resume="hanse run --resume runs/d") | {"reason": "1 of 8\n  site-3: no data"}]
    ).splitlines()
    assert lines[-4:] == ["failed in 6.5 s", "  1 of 8", "    site-3: no data", "  go on   hanse run --resume runs/d"]


def test_few_sites_have_a_row_each() -> None:
    events = [update(f"site-{rank}", seconds=0.2, accuracy=rank / 100) for rank in range(12, 0, -1)]
    events += [
        update("site-1", 1, seconds=0.4, accuracy=0.5),
        update("site-1", 1, task="evaluate", accuracy=0.9, seconds=0.3),
        failure("site-2", "x"),
    ]
    lines = printed([*events, end()]).splitlines()
    heading = next(index for index, line in enumerate(lines) if line.strip().startswith("site "))
    rows = [line.split() for line in lines[heading : heading + 13]]
    assert rows[0] == ["site", "failed", "mean", "time", "accuracy", "accuracy,", "evaluate"]
    assert rows[1] == ["site-1", "0", "0.30", "s", "0.5000", "0.9000"]
    assert rows[2] == ["site-2", "1", "0.20", "s", "0.0200", "–"]
    assert [row[0] for row in rows[1:]] == [f"site-{rank}" for rank in range(1, 13)]


def test_many_sites_are_summed_up_by_their_last_round() -> None:
    events = [update(f"site-{rank}", round, seconds=rank / 10, loss=float(rank + round)) for round in (0, 1) for rank in range(1, 14)]
    events += [update("site-14", 1, seconds=0.7, loss=math.nan)]
    lines = [line.split() for line in printed([*events, end()]).splitlines()]
    assert ["time", "0.10", "s", "0.70", "s", "1.3", "s"] in lines
    assert ["loss", "2.000", "8.000", "14.00"] in lines
    assert not any("site-1" in line for line in lines)


def test_the_closing_table_stays_in_eighty_columns() -> None:
    metrics = {f"a_rather_long_metric_{index}": 0.5 for index in range(8)}
    assert max(map(len, printed([update("s" * 99, **metrics), end()]).splitlines())) <= 80


def test_messages_and_cross_site_scores_have_a_line() -> None:
    text = printed(
        [
            {"event": "message", "level": "info", "text": "early stop: accuracy >= 0.95"},
            {"event": "message", "level": "warning", "text": "slow"},
            {"event": "cross_site", "round": 0, "scores": {"global": {"a": {"loss": 1.0}, "b": {}}, "a": {"b": {}}}},
            record := {"event": "record", "round": 0, "site": "a", "key": "k", "value": 1, "step": 0, "kind": "scalar"},
            {"event": "something new"},
        ]
    )
    assert record["event"] not in text
    assert text.splitlines() == [
        "early stop: accuracy >= 0.95",
        "warning: slow",
        "cross-site  2 models measured on 2 sites",
        "",
        "  loss of      a  b",
        "  global   1.000  –",
        "  a            –  –",
    ]


def test_sites_cannot_steer_the_terminal() -> None:
    evil = "\x1b[2J\x1b]0;owned\x07\rfake\x9b1m"
    events = [START | {"job": evil}, update(evil, **{evil: 1.0}), failure(evil, evil, code=evil), committed(**{evil: evil})]
    events += [
        {"event": "message", "level": "warning", "text": evil},
        end(evil, best={"metric": evil, "value": evil, "round": 0}) | {"reason": evil},
    ]
    text = printed(events)
    assert "\ufffd[2J" in text
    assert not set("\x1b\x07\r\x9b") & set(text)


def test_a_terminal_that_knows_few_letters_gets_question_marks() -> None:
    raw = io.BytesIO()
    terminal = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    Console("plain", terminal).show(failure("lübeck", "x"))
    assert raw.getvalue() == b"  l?beck failed: ValueError: x\n"


def test_json_is_every_event_and_nothing_else() -> None:
    events = [
        START,
        update("ü", accuracy=math.nan),
        end(folder=Path("runs") / "d", value=np.float32(0.5), infinite=[math.inf], count=np.int64(3)),
    ]
    lines = [json.loads(line, parse_constant=pytest.fail) for line in printed(events, "json").splitlines()]
    assert lines[0] == START
    assert lines[1]["metrics"] == {"accuracy": None}
    assert lines[2] == end(folder=str(Path("runs/d")), value=0.5, infinite=[None], count=3)


def test_quiet_is_quiet() -> None:
    assert printed([START, committed(), failure("a", "b"), end("failed")], "quiet") == ""


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="auto, plain, rich, json, quiet"):
        Console("loud")


def test_the_default_is_standard_output_and_plain_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    Console().show(committed(best=True))
    assert capsys.readouterr().out == "round 1 *    1.2 s  8/8 sites\n"


SCRIPT = """
import sys, threading
from hanse.server.console import Console
console = Console()
print("MODE", console.mode, sep="=")
console.show({"event": "start", "time": 1.0, "job": "[red]digits[/red]", "sites": 8, "workers": 2, "rounds": 5, "seed": 0})
console.progress(0, 3, 8)
console.show({"event": "failure", "round": 0, "task": "train", "site": "site-3", "code": "ValueError", "message": "no [bold]data " * 30})
console.show({"event": "round", "round": 0, "time": 2.0, "seconds": 1.2, "asked": 8, "good": 7, "metrics": {"accuracy": 0.97}})
console.show({"event": "end", "time": 3.0, "status": "failed", "reason": "x", "model": "runs/" + "x" * 90})
print("THREADS", threading.active_count(), sep="=")
"""


def in_terminal(**environment: str) -> str:
    """What SCRIPT writes to a real terminal of 80 columns."""
    ours, its = pty.openpty()
    settings = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24", "PYTHONIOENCODING": "utf-8", **environment}
    settings.pop("NO_COLOR", None) if "NO_COLOR" not in environment else None
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdin=its, stdout=its, stderr=its, env=settings)
    os.close(its)
    read = b""
    try:
        while chunk := os.read(ours, 4096):
            read += chunk
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0, read.decode()
    return read.decode()


def test_in_a_terminal_there_are_colours_and_a_progress_line_and_no_threads() -> None:
    text = in_terminal()
    assert "MODE=rich" in text
    assert "THREADS=1" in text
    assert "[red]digits[/red]" in text  # what sites and jobs are called is no markup
    before, _, after = text.partition("3/8 sites")
    assert before.endswith("━━━━━━━━━                 ")
    assert after.startswith("\x1b[K\r\x1b[K\x1b[31m  site-3 failed: ")  # the line is wiped before the next is printed
    failed = after.split("\x1b[31m")[1].split("\x1b[0m")[0]
    assert len(failed) <= 80
    assert "x" * 90 in text  # a path is never cut


def test_a_terminal_without_colours_is_respected() -> None:
    assert "\x1b[31m" not in in_terminal(NO_COLOR="1")
    dumb = in_terminal(TERM="dumb")
    assert "MODE=plain" in dumb
    assert "\x1b" not in dumb
    assert "MODE=plain" in in_terminal(PYTHONIOENCODING="latin-1")


def test_rich_is_loaded_only_for_a_terminal() -> None:
    code = "import sys, hanse.server.console as c\nc.Console().show({'event': 'end'})\nprint('rich' in sys.modules, file=sys.stderr)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr == "False\n"


def test_no_thread_is_started_here() -> None:
    before = threading.active_count()
    printed([START, committed(), end()], "rich")
    assert threading.active_count() == before
