from __future__ import annotations

import json

import numpy as np

from hanse.errors import ConfigError, SiteFailed
from hanse.site.failure import failure_of


def caught(code: object) -> BaseException:
    try:
        code()  # type: ignore[operator]
    except BaseException as error:
        return error
    raise AssertionError


def test_the_users_own_line_is_named_not_the_librarys() -> None:
    failure, record = failure_of(caught(lambda: json.loads("{")))
    assert failure.code == "JSONDecodeError"
    assert failure.message.startswith("test_failure.py:20: Expecting property name")
    assert (record.kind, record.key) == ("log", "traceback")
    assert "json/decoder.py" in record.value


def test_our_own_errors_keep_their_hint() -> None:
    def code() -> None:
        raise ConfigError("wrong.", hint="Do this.")

    failure, _ = failure_of(caught(code))
    assert (failure.code, failure.hint) == ("ConfigError", "Do this.")


def test_an_error_in_the_received_parameters_memory_has_a_hint() -> None:
    array = np.ones(1)
    array.flags.writeable = False

    def code() -> None:
        array[0] = 2

    assert "model.params['w'].copy()" in failure_of(caught(code))[0].hint


def test_an_exit_names_its_status() -> None:
    def code() -> None:
        raise SystemExit(2)

    assert "exited with status 2" in failure_of(caught(code))[0].message


def test_where_it_came_from_is_the_causes_line() -> None:
    def code() -> None:
        try:
            json.loads("{")
        except ValueError as error:
            raise SiteFailed("the script raised") from error

    failure, record = failure_of(caught(code))
    assert failure.message == "test_failure.py:55: the script raised"
    assert "Expecting property name" in record.value


def test_a_syntax_error_names_the_line_in_the_script() -> None:
    failure, _ = failure_of(caught(lambda: compile("x = 1\ny = = 2\n", "/some/where/train.py", "exec")))
    assert failure.message.startswith("train.py:2: ")
