"""Events as single values."""

from __future__ import annotations

from hanse.server.values import Value, params, values_of


def test_values() -> None:
    round = {"event": "round", "round": 3, "metrics": {"loss": 0.5}, "best": True}
    assert list(values_of(round, time=9.0)) == [Value("", "loss", 0.5, 3, time=9.0)]
    update = {"event": "update", "round": 3, "task": "train", "site": "a", "metrics": {"loss": 1, "n": 2}}
    assert list(values_of(update)) == [Value("a", "train/loss", 1.0, 3), Value("a", "train/n", 2.0, 3)]
    record = {"event": "record", "round": 3, "site": "a", "key": "k", "value": 7, "step": None, "kind": "scalar"}
    assert list(values_of(record)) == [Value("a", "k", 7.0, 3)]
    assert list(values_of({**record, "step": 40})) == [Value("a", "k", 7.0, 40)]
    assert list(values_of({**record, "value": "x"})) == [Value("a", "k", "x", 3, "text")]
    assert list(values_of({**record, "kind": "param"})) == [Value("a", "k", "7", 3, "param")]
    for event in (update, record):
        assert list(values_of(event, sites=False)) == []
    assert list(values_of({"event": "message", "text": "", "level": "info"})) == []


def test_a_values_name_has_its_site() -> None:
    assert (Value("a", "k", 1.0, 0).name, Value("", "k", 1.0, 0).name) == ("a/k", "k")


def test_params() -> None:
    facts = {"seed": 7, "job": {"name": "x", "recipe": "fedavg", "arguments": {"rounds": 2}}}
    assert params(facts) == {"recipe": "fedavg", "seed": "7", "rounds": "2"}
