"""What the commands of admins share: whose kit is used, one question to the server, and how answers are printed."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from hanse.identity.kit import Kit
    from hanse.transport.grpc import Client

T = TypeVar("T")
Row = Mapping[str, Any]
MAX_CELL = 200  # characters

KitFolder = Annotated[Path, typer.Option("--kit", envvar="HANSE_KIT", help="The folder of your startup kit.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def with_server(kit: Path, work: Callable[[Client, Kit], Awaitable[T]]) -> T:
    """What `work` returns, given a connection to the kit's server."""
    import asyncio

    from hanse.environments.federation import connected, kit_in

    async def main() -> T:
        opened = kit_in(kit)
        async with connected(opened) as client:
            return await work(client, opened)

    return asyncio.run(main())


def ask(kit: Path, name: str, /, **arguments: Any) -> Any:
    """What the server answers to one call."""
    return with_server(kit, lambda client, _: client.call(name, **arguments))


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value))


def print_answer(answer: Any, text: str, *, as_json: bool) -> None:
    """The server's answer as JSON, or what it comes to in words."""
    if as_json:
        print_json(answer)
    else:
        typer.echo(text)


def print_table(rows: Sequence[Row], columns: Mapping[str, Callable[[Row], str]], *, empty: str) -> None:
    """A table with these headings, or the sentence `empty`. What others wrote is printed without anything that could steer a terminal."""
    import sys

    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from hanse.server.wording import one_line

    if not rows:
        typer.echo(empty)
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(*(Text(one_line(cell(row), MAX_CELL)) for cell in columns.values()))
    width = None if sys.stdout.isatty() else len(columns) * MAX_CELL  # nothing is cut for a file or another program
    Console(highlight=False, markup=False, width=width).print(table)


def print_facts(facts: Mapping[str, str]) -> None:
    """One fact a line; empty ones are left out."""
    from hanse.server.wording import printable

    width = max(len(name) for name in facts)
    for name, value in facts.items():
        if value:
            typer.echo(f"{name:<{width}}  {printable(value)}")


def moment(unix: Any) -> str:
    """A Unix time as this machine's date and time."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(float(unix))) if isinstance(unix, int | float) and unix else ""


def text_of(name: str) -> Callable[[Row], str]:
    """A column that shows a value as it is."""
    return lambda row: "" if row.get(name) is None else str(row[name])


def moment_of(name: str) -> Callable[[Row], str]:
    """A column that shows a Unix time."""
    return lambda row: moment(row.get(name))
