from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from hanse.errors import ConfigError, NotInstalled
from hanse.server.report import write_report

Event = dict[str, Any]


class Page(HTMLParser):
    """A parsed report: its tags with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data + " "

    @property
    def words(self) -> str:
        return " ".join(self.text.split())

    def pictures(self) -> list[ElementTree.Element]:
        return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", self.source, re.DOTALL)]

    def picture(self, label: str) -> ElementTree.Element:
        return next(svg for svg in self.pictures() if svg.get("aria-label", "").startswith(label))


def looks(picture: ElementTree.Element) -> list[str]:
    return [path.get("class", "") for path in picture.iter("path")]


def report(folder: Path, events: Iterable[Event] = (), **run: Any) -> Page:
    facts: Event = {
        "hanse": "0.1.0",
        "job": {"name": "digits", "recipe": "fedavg", "arguments": {"rounds": 2, "local": {"lr": 0.1}}, "digest": "blake3:0f"},
        "status": "completed",
        "reason": "",
        "started": 1_800_000_000.0,
        "ended": 1_800_000_006.5,
        "seed": 7,
        "sites": ["site-1", "site-2"],
        "workers": 2,
        "rounds": {"done": 2, "total": 2},
        "best": {"metric": "accuracy", "value": 0.97, "round": 1},
        "metrics": {},
        "model": "model.safetensors",
        "versions": {"python": "3.11.7"},
        "digests": {"model.safetensors": "blake3:ab"},
    }
    (folder / "run.json").write_text(json.dumps(facts | run))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def update(site: str, round: int, task: str = "train", seconds: float = 0.1, **metrics: float) -> Event:
    return {"event": "update", "round": round, "task": task, "site": site, "seconds": seconds, "metrics": metrics, "weight": 180.0}


def committed(round: int, **metrics: float) -> Event:
    return {"event": "round", "round": round, "time": 0.0, "seconds": 1.5, "asked": 2, "good": 2, "metrics": metrics, "best": True}


def rounds(count: int, sites: Iterable[str] = ("site-1", "site-2")) -> list[Event]:
    names = list(sites)
    return [
        event
        for round in range(count)
        for event in [*(update(site, round, accuracy=0.5 + round / 100) for site in names), committed(round, accuracy=0.5 + round / 100)]
    ]


def failure(site: str, message: str, round: int = 0, hint: str = "") -> Event:
    return {"event": "failure", "round": round, "task": "train", "site": site, "code": "ValueError", "message": message, "hint": hint}


def record(key: str, value: Any, *, step: int | None = None, kind: str = "scalar", site: str = "site-1") -> Event:
    return {"event": "record", "round": 0, "site": site, "key": key, "value": value, "step": step, "kind": kind}


def test_says_at_a_glance_what_came_out(tmp_path: Path) -> None:
    page = report(tmp_path, [*rounds(2), failure("site-2", "no data")])
    assert "fedavg with 2 sites finished 2 rounds in 6.5 s; best accuracy 0.9700, in round 2." in page.words
    assert "Best accuracy 0.9700 in round 2" in page.words
    assert "Failures 1 of tasks at sites" in page.words
    assert "completed" in page.words
    assert "site-1 2 0 0.10 s 180 0.5100" in page.words
    assert 'local {"lr": 0.1}' in page.words
    assert "blake3:ab" in page.words
    assert "python 3.11.7" in page.words


def test_says_how_much_time_was_simulated(tmp_path: Path) -> None:
    simulated = [event | {"virtual_s": 3600.0 * (event["round"] + 1)} if event["event"] == "round" else event for event in rounds(2)]
    assert "Simulated time 2 h 00 min 1 h 00 min a round Time 6.5 s" in report(tmp_path, simulated).words
    assert "imulated" not in report(tmp_path, rounds(2)).words


def test_stands_alone(tmp_path: Path) -> None:
    page = report(tmp_path, rounds(3))
    assert not re.search(r"https?:|//\w|url\(|@import", page.source)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    assert not any(name in ("src", "href", "style") or name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_its_policy_permits_nothing_but_its_own_style(tmp_path: Path) -> None:
    page = report(tmp_path, rounds(1))
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy") or ""
    style = re.search(r"<style>(.*?)</style>", page.source, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'")
    assert "unsafe" not in policy


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style></title><i>",
    "{{ 7 * 7 }}",
    "\x1b[2J\x00\u202e\ud800",
    "</svg>",
]


def test_hostile_text_is_shown_as_text(tmp_path: Path) -> None:
    events: list[Event] = []
    for text in HOSTILE:
        events += [update(text, 0, task=text, **{text: 1.0}), failure(text, text, hint=text), record(text, 1.0, site=text)]
        events += [record(text, text, kind=kind, site=text) for kind in ("text", "param", "tag", "log", text)]
        events += [{"event": "message", "level": "warning", "text": text}, {"event": "end", "time": 0, "status": "failed", "resume": text}]
    events += [
        committed(0, **{HOSTILE[0]: 1.0}),
        {"event": "cross_site", "scores": {m: {s: {HOSTILE[0]: 1.0} for s in HOSTILE} for m in HOSTILE}},
    ]
    plain = report(tmp_path, [*rounds(1), record("a", 1.0)])
    job = {"name": HOSTILE[0], "recipe": HOSTILE[1], "arguments": {HOSTILE[2]: HOSTILE[1]}, "digest": HOSTILE[0]}
    page = report(
        tmp_path, events, job=job, status="failed", reason=HOSTILE[0], sites=HOSTILE, versions={HOSTILE[1]: HOSTILE[2]}, best=None
    )
    assert not {"script", "img", "i"} & {tag for tag, _ in page.tags}
    assert {name for _, attributes in page.tags for name in attributes} <= {name for _, a in plain.tags for name in a} | {"open", "rx"}
    assert page.source.count("<style>") == page.source.count("</style>") == 1
    assert "49" not in page.words.split()
    assert all(text in page.text for text in HOSTILE[:4])
    assert not set("\x1b\x00\u202e") & set(page.source)
    assert page.pictures()


def test_every_site_is_named_and_every_picture_is_well_formed(tmp_path: Path) -> None:
    sites = [f"site-{rank}" for rank in range(1, 31)]
    page = report(tmp_path, rounds(3, sites), sites=[*sites, "never-came"])
    for site in [*sites, "never-came"]:
        assert f" {site} " in page.text
    assert looks(page.picture("accuracy")) == ["site"] * 30 + ["bold"]
    titles = [title.text or "" for title in page.picture("accuracy").iter("title")]
    assert "site-30: 0.5200 at round 3" in titles
    assert "global, round 1: 0.5000" in titles


def test_tasks_that_share_a_name_have_a_chart_each(tmp_path: Path) -> None:
    events = []
    for round in range(3):
        events += [update("site-1", round, "train", accuracy=0.99), update("site-1", round, "evaluate", accuracy=0.60)]
        events += [committed(round, accuracy=0.61)]
    page = report(tmp_path, events)
    evaluated, trained = page.picture("accuracy, evaluate"), page.picture("accuracy, train")
    assert "global" in [title.text for title in evaluated.iter("title")]  # the curve that lies at the global one
    assert "mean of sites" in [title.text for title in trained.iter("title")]
    assert "accuracy, train accuracy, evaluate" in page.words  # columns of the sites table


def test_a_run_that_failed_before_its_first_round(tmp_path: Path) -> None:
    reason = "TooFewUpdates: 0 of 2 updates are good\n  site-1: no module named 'torch'"
    page = report(tmp_path, [], status="failed", reason=reason, rounds={"done": 0, "total": 5}, best=None, ended=None)
    assert "fedavg with 2 sites failed after 0 of 5 rounds." in page.words
    assert reason in page.text
    assert "site-2" in page.words


def test_a_run_that_is_not_over_and_has_said_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"status": "running"}')
    page = Page(write_report(tmp_path).read_text())
    assert "The job is running: 0 rounds done." in page.words


def test_a_stopped_run_says_how_to_go_on(tmp_path: Path) -> None:
    end = {"event": "end", "time": 0.0, "status": "stopped", "reason": "", "resume": "hanse run --resume runs/digits-001"}
    page = report(tmp_path, [*rounds(1), end], status="stopped", rounds={"done": 1, "total": 9})
    assert "was stopped after 1 of 9 rounds" in page.words
    assert "hanse run --resume runs/digits-001" in page.words


def test_values_that_are_missing_or_no_number_leave_gaps(tmp_path: Path) -> None:
    events = [committed(0, accuracy=0.5), committed(1), committed(2, accuracy=math.nan), committed(3, accuracy=0.7)]
    events += [update("site-1", 0, loss=math.inf), update("site-1", 1, loss=0.5), update("site-2", 0), update("site-2", 1, loss=math.nan)]
    events[0]["metrics"]["note"] = "not a number"
    page = report(tmp_path, events)
    accuracy = page.picture("accuracy").find("path")
    assert accuracy is not None
    assert accuracy.get("d", "").count("M") == 2  # broken at the NaN
    assert "1 value not finite, left out." in page.words
    assert all("nan" not in path.get("d", "") and "inf" not in path.get("d", "") for svg in page.pictures() for path in svg.iter("path"))
    assert not [svg for svg in page.pictures() if svg.get("aria-label", "").startswith("note")]


def test_lines_that_are_broken_are_passed_over(tmp_path: Path) -> None:
    report(tmp_path, rounds(2))
    with (tmp_path / "metrics.jsonl").open("ab") as journal:
        journal.write(b'[1]\n\xff\xfe\n{"event": "later"}\n{"event": "failure", "rou')
    page = Page(write_report(tmp_path).read_text())
    assert "site-1 2 0 0.10 s" in page.words


def test_a_thousand_sites_make_a_page_of_reasonable_size(tmp_path: Path) -> None:
    sites = [f"site-{rank}" for rank in range(1000)]
    events = rounds(20, sites)
    events += [failure("site-998", "out of memory\n" + "x" * 5000, round) for round in range(150)]
    events += [record(f"key-{key}", float(step), step=step, site=site) for key in range(30) for site in sites[:40] for step in range(20)]
    page = report(tmp_path, events, sites=sites)
    assert len(page.source) < 1_000_000
    assert looks(page.picture("accuracy")) == ["band", "median", "bold"]
    assert "The 100 of 1,000 sites that failed most or took longest" in page.words
    assert "The first 100 of 150" in page.words
    assert "site-998 20 150" in page.words
    assert "key-29" in page.words  # too many to draw: named
    assert len(page.pictures()) < 120


def test_a_job_of_many_devices_gives_only_their_number(tmp_path: Path) -> None:
    page = report(tmp_path, rounds(1, ["site-5", "site-77"]), sites={"count": 1_000_000})
    assert "fedavg with 1,000,000 sites" in page.words
    assert "site-77" in page.words


def test_models_on_sites_are_a_table_with_heat(tmp_path: Path) -> None:
    scores = {"global": {"site-1": {"accuracy": 0.9}, "site-2": {"accuracy": 0.5}}, "site-1": {"site-1": {"accuracy": 0.7}, "site-2": {}}}
    page = report(tmp_path, [{"event": "cross_site", "round": 1, "scores": scores}])
    assert "accuracy site-1 site-2 global 0.9000 0.5000 site-1 0.7000 –" in page.words
    heats = [a["class"] for tag, a in page.tags if tag == "td" and (a.get("class") or "").startswith("h")]
    assert heats[:3] == ["h9", "h0", "h4"]  # (0.7 − 0.5) / (0.9 − 0.5) · 9 = 4.5, to even


def test_tracked_values_are_charts_and_tables(tmp_path: Path) -> None:
    events = [record("train/loss", 1.0 / (step + 1), step=step) for step in range(20)]
    events += [record("restarts", float(value), step=value % 5) for value in range(10)]
    events += [record("batch_size", 64, kind="param", site=site) for site in ("site-1", "site-2")]
    events += [record("confusions", "3 taken for 8", kind="text"), record("log", "epoch done", kind="log")]
    page = report(tmp_path, events)
    assert page.picture("train/loss").get("aria-label") == "train/loss, by step, 1 site"
    assert page.picture("restarts").get("aria-label") == "restarts, by value, 1 site"  # the steps begin anew: all ten are drawn
    assert "batch_size 64 site-1, site-2" in page.words
    assert "confusions site-1 3 taken for 8" in page.words
    assert "epoch done" in page.words


def test_a_report_is_replaced_whole(tmp_path: Path) -> None:
    report(tmp_path, rounds(1))
    page = report(tmp_path, rounds(4), rounds={"done": 4, "total": 4})
    assert "finished 4 rounds" in page.words
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "metrics.jsonl", "report.html"}


@pytest.mark.parametrize("content", [None, "{", "[]", '"x"'])
def test_what_is_no_run_folder_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(ConfigError, match=r"run\.json"):
        write_report(tmp_path)


def test_without_jinja2_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(NotInstalled, match=r"pip install 'hanse\[report\]'"):
        write_report(tmp_path)


def test_jinja2_is_loaded_only_to_write() -> None:
    code = "import sys, hanse.server.report; print('jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
