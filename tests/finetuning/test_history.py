from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse.errors import ConfigError, WireError
from hanse.finetuning.contract import Party, Project, write_project
from hanse.finetuning.history import TRANSITIONS, History, State
from hanse.site.ledger import Ledger

A, B, C = (f"blake3:{digit * 64}" for digit in "abc")
WAY: tuple[State, ...] = (
    "draft", "data check", "base evaluation", "training", "candidate", "vendor gate", "client acceptance", "approved", "deployed",
    "monitored",
)  # fmt: skip


def test_the_whole_way(folder: Path) -> None:
    history = History(folder)
    assert (history.state, history.lines) == ("draft", [])
    for state in WAY:
        history.move(state, who="vera", why="next", n_rows=3)
        assert History(folder).state == state
    assert [line["kind"] for line in history.lines] == [*WAY]
    assert {(line["who"], line["why"], line["n_rows"], line["client"]) for line in history.lines} == {("vera", "next", 3, "north")}
    assert all(line["time"] > "2026" for line in history.lines)
    assert history.verify() == len(WAY)


def test_a_step_that_is_not_allowed_says_what_is(folder: Path) -> None:
    history = History(folder)
    with pytest.raises(ConfigError, match=r"'deployed' cannot follow 'draft'; from here it goes to: draft, data check\."):
        history.move("deployed", who="vera")
    history.move("data check", who="vera")
    with pytest.raises(ConfigError, match="'draft' cannot follow 'data check'"):
        history.move("draft", who="vera")
    assert history.state == "data check"
    with pytest.raises(ConfigError, match="is a state"):
        history.note("training", who="vera")


def test_the_table() -> None:
    assert {to for after in TRANSITIONS.values() for to in after} | {"draft"} == set(TRANSITIONS)
    for state, after in TRANSITIONS.items():  # a new run may begin anywhere; nobody is deployed without an approval by both
        assert "data check" in after
        assert "deployed" not in after or state in ("approved", "rolled back")
        assert "approved" not in after or state == "client acceptance"
        assert "client acceptance" not in after or state in ("vendor gate", "inconclusive")
    reached: set[State] = {"rejected"}
    while more := {to for state in reached for to in TRANSITIONS[state]} - reached:
        reached |= more
    assert reached == set(TRANSITIONS) - {"draft"}  # there is a way on from everywhere


@given(st.lists(st.sampled_from([*TRANSITIONS]), max_size=15))
def test_whatever_is_tried_the_history_is_a_way_through_the_table(tmp_path_factory: pytest.TempPathFactory, steps: list[State]) -> None:
    folder = tmp_path_factory.mktemp("project")
    write_project(folder, Project(name="p", vendor=Party(site="acme", organisation="A"), clients=[Party(site="north", organisation="N")]))
    history, expected = History(folder), []
    for step in steps:
        here = expected[-1] if expected else "draft"
        if step in TRANSITIONS[here] or (step == "draft" and not expected):
            history.move(step, who="vera")
            expected.append(step)
        else:
            with pytest.raises(ConfigError):
                history.move(step, who="vera")
    assert [line["kind"] for line in history.lines] == expected
    if expected:
        assert history.verify() == len(expected)


def test_notes_change_no_state(folder: Path) -> None:
    history = History(folder)
    history.move("draft", who="vera")
    history.note("approve", who="vera", why="good", version=A)
    assert history.state == "draft"
    history.arrive(who="vera", version=A)
    assert (history.state, history.verify()) == ("client acceptance", 3)


def test_what_is_deployed(folder: Path) -> None:
    history = History(folder)
    assert history.deployed == []
    history.note("first version", who="vera", deployed=A)
    history.note("x", who="vera", deployed=B)
    history.note("x", who="vera", deployed=A)
    history.note("x", who="vera", deployed=C)
    assert history.deployed == [A, B, A, C]
    history.note("rollback", who="vera", deployed=A, back=True)
    assert history.deployed == [A, B, A]
    history.note("rollback", who="vera", deployed=B, back=True)
    assert history.deployed == [A, B]


def test_clients_are_apart(tmp_path: Path) -> None:
    clients = [Party(site="north", organisation="North"), Party(site="south", organisation="South")]
    write_project(tmp_path, Project(name="p", vendor=Party(site="acme", organisation="A"), clients=clients))
    History(tmp_path, "north").move("data check", who="vera")
    assert (History(tmp_path, "north").state, History(tmp_path, "south").state) == ("data check", "draft")
    History(tmp_path, "south").move("draft", who="vera")
    assert (History(tmp_path, "south").verify(), len(History(tmp_path, "north").lines)) == (2, 1)
    with pytest.raises(ConfigError, match="say which one"):
        History(tmp_path)
    with pytest.raises(ConfigError, match="none of north, south"):
        History(tmp_path, "west")


def test_an_altered_line_is_found(folder: Path) -> None:
    history = History(folder)
    for state in WAY[:4]:
        history.move(state, who="vera", why="because")
    whole = history.path.read_bytes()
    history.path.write_bytes(whole.replace(b"vera", b"eve!", 1))
    with pytest.raises(WireError, match="does not fit the line before"):
        history.verify()
    with pytest.raises(WireError):
        _ = history.state
    history.path.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    with pytest.raises(WireError, match="the last ones are gone"):
        history.verify()


def test_a_step_that_was_written_past_the_table_is_found(folder: Path) -> None:
    history = History(folder)
    history.move("draft", who="vera")
    with Ledger(history.path) as ledger:
        ledger.append("deployed", client="north", who="eve", why="")
    with pytest.raises(WireError, match="line 2: 'deployed' cannot follow 'draft'"):
        history.verify()


def test_a_line_that_was_cut_off_by_a_crash_is_as_if_it_never_was(folder: Path) -> None:
    history = History(folder)
    history.move("data check", who="vera")
    with history.path.open("ab") as file:
        file.write(msgspec.json.encode({"n": 1, "kind": "base evaluation"})[:-3])
    assert history.state == "data check"
    history.move("base evaluation", who="vera")
    assert [line["kind"] for line in history.lines] == ["data check", "base evaluation"]
    assert history.verify() == 3  # the cut is written down too
