from __future__ import annotations

import inspect

import pytest

from hanse import errors
from hanse.errors import ConfigError, Failure, HanseError, JobFailed, JobStopped, Refused, TooFewUpdates, WireError


def test_the_tree_is_the_one_drawn_at_the_top_of_the_file() -> None:
    drawn = [line for line in (errors.__doc__ or "").splitlines() if "──" in line]
    names = [line.split("── ")[1].split()[0] for line in drawn]
    classes = {name: value for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, HanseError)}
    assert {*names, "HanseError"} == classes.keys()
    bases = dict.fromkeys(names, HanseError) | {"JobStopped": JobFailed, "PolicyRefused": Refused}
    assert {name: classes[name].__base__ for name in names} == bases


def test_the_hint_is_part_of_the_printed_message() -> None:
    error = ConfigError("rounds is 0.", hint="Give 1 or more.")
    assert (str(error), error.message, error.hint) == ("rounds is 0. Give 1 or more.", "rounds is 0.", "Give 1 or more.")
    assert str(ConfigError("rounds is 0.")) == "rounds is 0."


def test_each_error_keeps_its_facts() -> None:
    wire = WireError("no header", offset=8)
    assert (str(wire), wire.offset) == ("at byte 8: no header", 8)
    stopped = JobStopped("stopped.", folder="runs/a-001", hint="Go on.")
    assert (str(stopped), stopped.folder) == ("stopped. Go on.", "runs/a-001")


def test_too_few_updates_lists_every_reason_above_the_hint() -> None:
    error = TooFewUpdates("1 of 3.", reasons={"b": "no data", "a": "late"}, hint="Mend them.")
    assert str(error) == "1 of 3.\n  b: no data\n  a: late\n  Mend them."
    assert error.reasons == {"b": "no data", "a": "late"}
    assert str(TooFewUpdates("0 of 0.", reasons={}, hint="Ask some.")) == "0 of 0. Ask some."


@pytest.mark.parametrize(
    ("error", "failure", "text"),
    [
        (WireError("cut", offset=3, hint="Send."), Failure("WireError", "at byte 3: cut", "Send."), "WireError: at byte 3: cut Send."),
        (ValueError("no data"), Failure("ValueError", "no data"), "ValueError: no data"),
        (KeyError(), Failure("KeyError", "no message"), "KeyError: no message"),
        (KeyboardInterrupt(), Failure("KeyboardInterrupt", "no message"), "KeyboardInterrupt: no message"),
    ],
)
def test_an_error_as_a_value(error: BaseException, failure: Failure, text: str) -> None:
    assert Failure.of(error) == failure
    assert str(failure) == text
