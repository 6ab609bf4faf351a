from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hanse.server.report import write_report
from hanse.server.statistics_section import MAX_COLUMNS, statistics_section


def summary(count: int, **more: Any) -> dict[str, Any]:
    return {"sites": 1, "count": count, "missing": 3, "sum": 2.0 * count, "mean": 2.0, "variance": 4.0, "min": None, "max": None} | more


def histogram(*counts: int, hidden: int = 0) -> dict[str, Any]:
    return {
        "histogram": {"sites": 2, "counts": list(counts), "below": 1, "above": 0, "hidden": hidden},
        "quantiles": [{"q": 0.5, "value": 1.5, "low": 1.0, "high": 2.25}, {"q": 0.9, "value": 2.5, "low": 2.0, "high": None}],
    }


def event(**columns: Any) -> dict[str, Any]:
    return {"event": "statistics", "round": 0, "columns": columns, "members": {}}


AGE = {
    "edges": [0.0, 1.0, 2.0, 3.0],
    "groups": {
        "": summary(1_000, **histogram(10, 30, 60, hidden=12)),
        "eu": summary(700, **histogram(10, 0, 10)),
        "eu-x": summary(1),
        "eu/de": summary(300, **histogram(5, 5, 5)),
    },
    "sites": {"site-10": summary(1), "site-2": summary(2, min=0.5, max=9.0)},
    "withheld": ["site-3"],
}


def test_a_column_has_its_groups_and_sites_in_order() -> None:
    [column], left_out = statistics_section(event(age=AGE))
    assert column.headings == ["values", "missing", "mean", "std. dev.", "min", "max", "50 %", "90 %"]
    assert [(row.name, row.depth) for row in column.rows] == [
        ("all sites", 0), ("eu", 1), ("de", 2), ("eu-x", 1), ("site-2", 0), ("site-10", 0),
    ]  # fmt: skip
    assert column.rows[0].cells == ["1,000", "3", "2.000", "2.000", "–", "–", "1.500 ± 0.75", "–"]
    assert column.rows[4].cells == ["2", "3", "2.000", "2.000", "0.5000", "9.000", "–", "–"]
    assert column.withheld == "Withheld in part or whole by 1 site: site-3."
    assert (column.cut, left_out) == (0, [])


def test_its_chart_has_a_bar_a_bin_and_a_line_a_group() -> None:
    [column], _ = statistics_section(event(age=AGE))
    assert column.chart is not None
    assert [mark.title for mark in column.chart.marks if mark.look == "bar"] == [
        "0.0000 to 1.000: 10 values, 10.0 %",
        "1.000 to 2.000: 30 values, 30.0 %",
        "2.000 to 3.000: 60 values, 60.0 %",
    ]
    assert column.chart.legend == [("bar", "all sites"), ("site s0", "eu")]
    assert column.chart.note == "1 values lie outside the range. 12 are in cells that were not sent."


def test_nothing_told() -> None:
    assert statistics_section(None) == ([], [])
    [column], _ = statistics_section(event(age={"edges": None, "groups": {"": summary(0, mean=None, variance=None)}, "withheld": []}))
    assert column.chart is None
    assert column.headings == ["values", "missing", "mean", "std. dev."]
    assert column.rows[0].cells == ["0", "3", "–", "–"]


def test_of_many_columns_the_first_are_shown() -> None:
    columns, left_out = statistics_section(event(**{f"c{n}": AGE for n in range(30)}))
    assert [column.name for column in columns] == [f"c{n}" for n in range(MAX_COLUMNS)]
    assert left_out == [f"c{n}" for n in range(MAX_COLUMNS, 30)]


def test_the_page_shows_it_and_escapes_names(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"status": "completed", "job": {"name": "a", "recipe": "statistics"}}))
    (tmp_path / "metrics.jsonl").write_text(json.dumps(event(**{"<script>x</script>": AGE})) + "\n")
    page = write_report(tmp_path).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;x&lt;/script&gt;" in page
    assert page.count('class="bar"') >= 3
    assert "1.500 ± 0.75" in page
