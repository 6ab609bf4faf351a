"""`finetuning.html` in a run folder: the verdict in words, the figures beside both controls, what it took, and all that left the client."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from hanse.errors import ConfigError
from hanse.finetuning.contract import Project
from hanse.finetuning.evidence import Evidence
from hanse.finetuning.metrics import in_percent
from hanse.finetuning.page import write_page
from hanse.server.run import Run
from hanse.server.wording import duration

REPORT = "finetuning.html"
RATES = {"EER": "eer", "HTER": "hter", "FPR": "fpr", "FNR": "fnr", "Accuracy": "accuracy"}
MAX_TENSORS = 200
LEFT, RIGHT, TOP, BOTTOM = 52, 744, 14, 228  # of the curve, in the drawing's own units

Event = Mapping[str, Any]


def write_report(folder: Path) -> Path:
    """Write the report of a completed run anew. Raises ConfigError if the run was none of fine-tuning, or did not come to its end."""
    run = Run(folder)
    gates = run.events("gate")
    if not gates:
        raise ConfigError(f"{folder} is no completed run of fine-tuning", hint="`hanse show` says what came of it.")
    evidence = msgspec.json.decode(gates[-1]["evidence"], type=Evidence)
    arguments = run.facts["job"]["arguments"]
    project = msgspec.convert(arguments["project"], Project)
    client, figures, crossed = arguments["client"], run.events("figures"), run.events("crossed")
    left = _left(each for each in crossed if each["party"] == client)
    return write_page(
        folder / REPORT,
        "report.html.j2",
        project=project,
        client=client,
        began=datetime.fromtimestamp(run.facts["started"], UTC).strftime("%Y-%m-%d %H:%M"),
        evidence=evidence,
        tiles=_tiles(run, project, client, figures, crossed),
        rates=list(RATES),
        rows=[_row(each) for each in figures if "rows" in each],
        curve=_curve([each for each in figures if each["party"] == client]),
        slices=_slices(evidence),
        crossed=_crossed(crossed),
        left=left[:MAX_TENSORS],
        more_left=max(0, len(left) - MAX_TENSORS),
        numbers=", ".join(_numbers(run, client)) or "none",
        facts=_facts(run, project, evidence),
    )


def write_bundle(folder: Path, target: Path) -> Path:
    """What an auditor needs of a run, as one zip: the report, the evidence, every event, what was run, and digests of all of it.

    Scores of single rows are not in it: they stay with the vendor.
    """
    report = write_report(folder)
    evidence = Run(folder).events("gate")[-1]["evidence"]
    part = target.with_name(f".{target.name}.part")
    try:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("evidence.json", evidence)
            for path in (report, folder / "run.json", folder / "metrics.jsonl"):
                with archive.open(path.name, "w") as inside, path.open("rb") as source:
                    shutil.copyfileobj(source, inside)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return target


def _tiles(run: Run, project: Project, client: str, figures: Sequence[Event], crossed: Sequence[Event]) -> list[dict[str, str]]:
    by = {(each["what"], each["party"]): each for each in figures}
    vendor = project.vendor.site
    theirs = [each for each in crossed if each["party"] == client]
    trained = [each for each in theirs if each["task"] in ("train", "gradient")]
    seconds = run.facts["ended"] - run.facts["started"]
    cpu = sum(each["cpu_seconds"] or 0.0 for each in theirs)
    return [
        _tile("Client's EER", by["candidate", client], by["base", client], "eer"),
        _tile("Client's HTER", by["candidate", client], by["base", client], "hter"),
        _tile("Vendor's HTER", by["candidate", vendor], by["base", vendor], "hter"),
        {"name": "Round trips", "value": f"{len(trained):,}", "about": "of training with the client, controls included"},
        {"name": "Left the client", "value": _bytes(theirs, "up_bytes"), "about": "in all"},
        {"name": "Time", "value": duration(seconds), "about": f"{duration(cpu)} of CPU at the client"},
    ]


def _tile(name: str, new: Event, old: Event, rate: str) -> dict[str, str]:
    return {"name": name, "value": f"{100 * new[rate]:.2f} %", "about": f"the deployed version has {100 * old[rate]:.2f} %"}


def _row(figures: Event) -> dict[str, Any]:
    rates = [_percent(figures, rate) for rate in RATES.values()]
    return {"what": figures["what"], "party": figures["party"], "rates": rates, "count": f"{figures['rows']:,.0f}"}


def _percent(figures: Event, rate: str) -> str:
    if rate not in figures:
        return "–"
    text = f"{100 * figures[rate]:.2f}"
    low, high = figures.get(f"{rate}_low"), figures.get(f"{rate}_high")
    return text if low is None or high is None else f"{text} ({100 * low:.2f}–{100 * high:.2f})"


def _curve(figures: Sequence[Event]) -> dict[str, Any] | None:
    """The client's EER along the run, and the level of the deployed version."""
    base = next((each["eer"] for each in figures if each["what"] == "base"), None)
    along = [each["eer"] for each in figures if each["what"].startswith("before ")]
    last = [each["eer"] for each in figures if each["what"] == "candidate"]
    values = [100 * value for value in along + last]
    if base is None or len(values) < 2:
        return None
    top = max(*values, 100 * base, 0.1) * 1.1
    x = [LEFT + (RIGHT - LEFT) * (number + 0.5) / len(values) for number in range(len(values))]
    y = [BOTTOM - (BOTTOM - TOP) * value / top for value in values]
    labels = [*(str(number) for number in range(len(along))), "candidate"]
    every = -(-len(values) // 13)
    dots = [
        {
            "x": round(at, 1),
            "y": round(high, 1),
            "title": f"{value:.2f} %",
            "label": label if number % every == 0 or label == "candidate" else "",
        }
        for number, (at, high, value, label) in enumerate(zip(x, y, values, labels, strict=True))
    ]
    ticks = [{"at": round(BOTTOM - (BOTTOM - TOP) * share, 1), "label": f"{top * share:.1f}"} for share in (0, 0.25, 0.5, 0.75, 1)]
    return {
        "path": "M" + "L".join(f"{at:.1f},{high:.1f}" for at, high in zip(x, y, strict=True)),
        "level": round(BOTTOM - (BOTTOM - TOP) * 100 * base / top, 1),
        "dots": dots, "ticks": ticks, "first": f"{values[0]:.2f}", "last": f"{values[-1]:.2f}", "base": f"{100 * base:.2f}",
    }  # fmt: skip


def _slices(evidence: Evidence) -> dict[str, Any] | None:
    rows = []
    for column, values in evidence.new.slices.items():
        for value, new in values.items():
            old = evidence.old.slices[column][value]
            rows.append([f"{column} = {value}", *map(in_percent, (old.hter, new.hter, old.eer, new.eer))])
    return {"columns": ", ".join(evidence.new.slices), "rows": rows} if rows else None


def _crossed(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Each party's tasks, summed up."""
    groups: dict[tuple[str, str], list[Event]] = defaultdict(list)
    for each in events:
        groups[each["party"], each["task"]].append(each)
    return [
        {
            "party": party, "task": task, "times": f"{len(group):,}",
            "down": _bytes(group, "down_bytes"), "up": _bytes(group, "up_bytes"),
            "seconds": f"{sum(each['seconds'] for each in group):.1f}", "cpu": f"{sum(each['cpu_seconds'] or 0.0 for each in group):.1f}",
        }
        for (party, task), group in groups.items()
    ]  # fmt: skip


def _bytes(events: Sequence[Event], which: str) -> str:
    count = sum(each[which] for each in events)
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


@dataclass
class _Left:
    times: int = 0
    norms: list[float] = field(default_factory=list)


def _left(events: Iterable[Event]) -> list[dict[str, Any]]:
    """The tensors that left, by name, task, shape and type."""
    found: dict[tuple[str, str, str, str], _Left] = defaultdict(_Left)
    for event in events:
        for tensor in event["tensors"]:
            key = tensor["name"], event["task"], " × ".join(map(str, tensor["shape"])) or "one number", tensor["dtype"]
            found[key].times += 1
            if tensor["norm"] is not None:
                found[key].norms.append(tensor["norm"])
    return [
        {
            "name": name, "task": task, "shape": shape, "dtype": dtype, "times": f"{each.times:,}",
            "norm": f"{min(each.norms):.4g} – {max(each.norms):.4g}" if each.norms else "–",
        }
        for (name, task, shape, dtype), each in found.items()
    ]  # fmt: skip


def _numbers(run: Run, client: str) -> list[str]:
    """The names of the metrics that the client sent."""
    return sorted(Counter(name for event in run.events("update") if event["site"] == client for name in event["metrics"]))


def _facts(run: Run, project: Project, evidence: Evidence) -> list[tuple[str, str]]:
    learning = {name: value for name, value in msgspec.to_builtins(project.learning).items()}
    return [
        ("Deployed model", evidence.about.get("old", "")),
        ("Candidate", evidence.about.get("new", "")),
        ("Contract", project.digest),
        ("Holdout", evidence.rows),
        ("Evidence", evidence.digest),
        ("Job", str(run.facts["job"]["digest"] or "not written to a folder")),
        ("How it was trained", f"{project.learning.mode}; " + json.dumps(learning)),
        ("Seed", str(run.facts["seed"])),
        ("Versions", ", ".join(f"{name} {version}" for name, version in run.facts["versions"].items())),
    ]
