from __future__ import annotations

import contextvars
import enum
from collections.abc import Callable

import numpy as np
import pytest

import hanse.client as flare
from hanse.client.session import SiteInfo, enter
from hanse.client.tracking import MLflowWriter, SummaryWriter, WandBWriter
from hanse.errors import ConfigError
from hanse.messages.flmodel import FLModel
from hanse.messages.update import Record


class Recorder:
    """A session without tasks that keeps what is logged."""

    def __init__(self) -> None:
        self.info = SiteInfo("site-1")
        self.task_name = ""
        self.records: list[Record] = []

    def is_running(self) -> bool:
        return False

    def receive(self, within_s: float | None = None) -> FLModel | None:
        return None

    def send(self, model: FLModel) -> None:
        raise AssertionError

    def record(self, record: Record) -> None:
        self.records.append(record)


def logged(code: Callable[[], None]) -> list[Record]:
    session = Recorder()

    def run() -> None:
        enter(session)
        flare.init()
        code()

    contextvars.Context().run(run)
    return session.records


def test_tensorboard() -> None:
    def script() -> None:
        with SummaryWriter("runs", flush_secs=5) as writer:
            writer.add_scalar(tag="loss", scalar=0.5, global_step=3)
            writer.add_scalar("accuracy", np.float32(0.25))
            writer.add_scalars("by_class", {"cat": 1, "dog": np.int64(2)}, global_step=np.int64(4))
            writer.add_text("note", "hello")
            writer.flush()

    assert logged(script) == [
        Record("loss", 0.5, 3),
        Record("accuracy", 0.25),
        Record("by_class/cat", 1.0, 4),
        Record("by_class/dog", 2.0, 4),
        Record("note", "hello", kind="text"),
    ]


def test_mlflow() -> None:
    def script() -> None:
        writer = MLflowWriter()
        writer.log_param("lr", 0.1)
        writer.log_params({"layers": (1, 2), "batch": 32})
        writer.log_metric("loss", 1, step=2)
        writer.log_metrics({"a": 1.0, "b": 2.0}, step=5)
        writer.log_text("some text", "notes.txt")
        writer.set_tag("who", "me")
        writer.set_tags({"x": True})
        writer.close()

    assert logged(script) == [
        Record("lr", 0.1, kind="param"),
        Record("layers", "(1, 2)", kind="param"),
        Record("batch", 32, kind="param"),
        Record("loss", 1.0, 2),
        Record("a", 1.0, 5),
        Record("b", 2.0, 5),
        Record("notes.txt", "some text", kind="text"),
        Record("who", "me", kind="tag"),
        Record("x", True, kind="tag"),
    ]


def test_wandb_and_a_torch_scalar() -> None:
    torch = pytest.importorskip("torch")
    assert logged(lambda: WandBWriter().log({"loss": torch.tensor(0.5, requires_grad=True)}, step=1)) == [Record("loss", 0.5, 1)]


def test_log_takes_flares_enumeration() -> None:
    kind = enum.Enum("AnalyticsDataType", {"SCALAR": "SCALAR", "TEXT": "TEXT"})
    records = logged(lambda: flare.log("loss", 0.5, kind.SCALAR, global_step=1, writer="TORCH_TB"))
    assert records == [Record("loss", 0.5, 1)]


@pytest.mark.parametrize(("value", "kind"), [("high", "SCALAR"), (np.ones(3), "SCALAR"), (1.0, "IMAGE"), (1.0, "METRICS")])
def test_log_refuses_what_it_cannot_send(value: object, kind: str) -> None:
    with pytest.raises(ConfigError, match="log"):
        logged(lambda: flare.log("x", value, kind))
