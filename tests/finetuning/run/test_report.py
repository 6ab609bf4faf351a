from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hanse.errors import ConfigError
from hanse.finetuning.evidence import Evidence
from hanse.finetuning.metrics import in_percent, read_scores
from hanse.finetuning.report import write_bundle, write_report
from hanse.server.run import Run

Pair = Any  # of conftest.py
HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)>'{{ 7*7 }}&amp;\x00‮"


class Page(HTMLParser):
    """A page's elements, its words, and the cells of each table by the heading before it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source, self.tags, self.words, self.tables = text, [], "", {}
        self._heading, self._cell = "", False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "h2":
            self._heading = ""
        if tag == "tr":
            self.tables.setdefault(self._heading, []).append([])
        if tag in ("td", "th"):
            self.tables[self._heading][-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        within = next((tag for tag, _ in reversed(self.tags) if tag not in ("b", "small", "span")), "")
        if within == "style":
            return
        self.words += data
        if within == "h2" and not self._cell:
            self._heading += data.strip()
        if self._cell:
            self.tables[self._heading][-1][-1] += data


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def run(pair: Pair) -> Run:
    """A short run with both controls."""
    run: Run = pair.execute(controls=True, round_trips=2, client_steps=10, vendor_alone_steps=5, client_alone_steps=5)
    return run


def run_evidence(run: Run) -> Evidence:
    (gate,) = run.events("gate")
    return msgspec.json.decode(gate["evidence"], type=Evidence)


@pytest.fixture
def altered(run: Run, tmp_path: Path) -> Callable[..., Path]:
    """Copies the run folder with its events changed."""

    def alter(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
        folder = tmp_path / "altered"
        shutil.copytree(run.folder, folder)
        events = [change(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        return folder

    return alter


def test_it_says_the_verdict_and_the_figures_of_the_events(run: Run) -> None:
    page = read(write_report(run.folder))
    evidence = json.loads(run.events("gate")[0]["evidence"])
    assert re.sub(r"\s+", " ", evidence["words"]) in re.sub(r"\s+", " ", page.words)
    assert f"line-3: {evidence['outcome']}" in page.words
    assert ("span", {"class": f"pill {evidence['outcome']}"}) in page.tags
    header, *rows = page.tables["What was measured"]
    assert header == ["Model", "Measured by", "EER", "HTER", "FPR", "FNR", "Accuracy", "Rows"]
    assert [row[:2] for row in rows] == [
        [model, party] for model in ("base", "vendor alone", "client alone", "candidate") for party in ("acme", "north")
    ]
    measured = {(event["what"], event["party"]): event for event in run.events("figures")}
    for model, party, *cells, count in rows:
        event = measured[model, party]
        for rate, cell in zip(("eer", "hter", "fpr", "fnr", "accuracy"), cells, strict=True):
            low, high = event[f"{rate}_low"], event[f"{rate}_high"]
            assert cell == f"{100 * event[rate]:.2f} ({100 * low:.2f}–{100 * high:.2f})"
        assert count == f"{event['rows']:,.0f}" == {"acme": "800", "north": "200"}[party]
    assert [row[:2] for row in page.tables["The vendor's gate"][1:]] == [[each["test"], each["verdict"]] for each in evidence["findings"]]
    by_device = page.tables["By device, on the vendor's holdout"][1:]
    assert [row[0] for row in by_device] == ["device = acme-0", "device = acme-1"]
    found = run_evidence(run)
    for name, *cells in by_device:
        old, new = (each.slices["device"][name.removeprefix("device = ")] for each in (found.old, found.new))
        assert cells == [in_percent(figure) for figure in (old.hter, new.hter, old.eer, new.eer)]
    facts = dict(page.tables["To check it"])
    assert (facts["Candidate"], facts["Deployed model"]) == (evidence["about"]["new"], evidence["about"]["old"])


def test_it_lists_all_that_left_the_client_and_what_it_took(run: Run) -> None:
    page = read(write_report(run.folder))
    left = [event for event in run.events("crossed") if event["party"] == "north"]
    counted: dict[tuple[str, str], int] = {}
    for event in left:
        for tensor in event["tensors"]:
            counted[tensor["name"], event["task"]] = counted.get((tensor["name"], event["task"]), 0) + 1
    rows = page.tables["What left north"][1:]
    listed: dict[tuple[str, str], int] = {}
    for name, task, _, _, times, _ in rows:
        listed[name, task] = listed.get((name, task), 0) + int(times)
    assert listed == counted
    assert set(counted) >= {("values/0.weight", "train"), ("scales/0.weight", "train")}
    took = {(row[0], row[1]): row for row in page.tables["What it took"][1:]}
    assert int(took["north", "train"][2]) == sum(event["task"] == "train" for event in left)
    up = sum(event["up_bytes"] for event in left if event["task"] == "train")
    assert took["north", "train"][4] == f"{up / 1e3:.1f} kB"
    assert "loss" in page.words
    sent = {name for event in run.events("update") if event["site"] == "north" for name in event["metrics"]}
    assert all(name in page.words for name in sent)


def test_it_stands_alone_and_can_run_nothing(run: Run) -> None:
    page = read(write_report(run.folder))
    assert not re.search(r"https?:|//\w|url\(|@import|javascript:", page.source)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") or name in ("src", "href") for _, attributes in page.tags for name in attributes)
    (policy,) = [a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'sha256-")


def test_what_parties_wrote_is_text_and_nothing_else(altered: Callable[..., Path]) -> None:
    def hostile(event: dict[str, Any]) -> dict[str, Any]:
        if event["event"] == "crossed":
            event["tensors"] = [{**tensor, "name": HOSTILE, "dtype": HOSTILE} for tensor in event["tensors"]]
            event["task"] = f"{event['task']}{HOSTILE}" if event["task"] == "evaluate" else event["task"]
        if event["event"] == "figures" and event["what"] == "vendor alone":
            event["what"] = HOSTILE
        if event["event"] == "update":
            event["metrics"] = {HOSTILE: 1.0}
        if event["event"] == "gate":
            evidence = json.loads(event["evidence"])
            for name in ("old", "new"):
                evidence[name]["slices"] = {HOSTILE: {HOSTILE: evidence[name]["slices"]["device"]["acme-0"]}}
            evidence["words"] = evidence["findings"][0]["words"] = evidence["about"]["old"] = HOSTILE
            event["evidence"] = json.dumps(evidence)
        return event

    page = read(write_report(altered(hostile)))
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.words.count("<script>alert(1)</script>") > 8
    assert "{{ 7*7 }}" in page.words
    assert len([tag for tag, _ in page.tags if tag == "meta"]) == 4


def test_it_can_be_printed(run: Run, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("no `chromium` on the PATH: install Debian's package of that name")
    report = write_report(run.folder)
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        asked, said = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.goto(report.as_uri())
        assert page.locator("h1").inner_text() == "line-3"
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        pdf = page.pdf(format="A4")
        browser.close()
    assert (asked, said, wide) == ([report.as_uri()], [], 0)
    assert pdf.startswith(b"%PDF")
    assert len(pdf) > 20_000
    assert b"/Font" in pdf


def test_the_bundle_has_all_but_the_scores_of_rows(run: Run, pair: Pair, tmp_path: Path) -> None:
    target = tmp_path / "audit.zip"
    assert write_bundle(run.folder, target) == target
    with zipfile.ZipFile(target) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    assert set(files) == {"finetuning.html", "evidence.json", "run.json", "metrics.jsonl"}
    assert files["evidence.json"].decode() == run.events("gate")[0]["evidence"]
    assert files["metrics.jsonl"] == (run.folder / "metrics.jsonl").read_bytes()
    assert [path.name for path in tmp_path.glob(".*.part")] == []
    kept = [read_scores(path) for folder in (pair.vendor, pair.client) for path in (folder / "scores").rglob("*.safetensors")]
    assert len(kept) > 4
    everything = b"".join(files.values()).decode()
    for scores in kept:
        assert not any(repr(float(score)) in everything for score in scores.scores if 0.001 < score < 0.999)
        assert not any(f'"{name}"' in everything for name in scores.names)


def test_what_is_no_completed_run_has_no_report(pair: Pair, run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        write_report(tmp_path)
    folder = tmp_path / "unfinished"
    shutil.copytree(run.folder, folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(line for line in lines if '"gate"' not in line))
    with pytest.raises(ConfigError, match="no completed run of fine-tuning"):
        write_report(folder)
    with pytest.raises(ConfigError, match="no completed run of fine-tuning"):
        write_bundle(folder, tmp_path / "x.zip")
    assert not (tmp_path / "x.zip").exists()
