"""`hanse audit`: a site's audit log, checked and read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="audit", help="A site's audit log: check that it is whole, and read it.", no_args_is_help=True)

File = Annotated[Path, typer.Argument(help="The log, audit.jsonl in the site's state folder; audit.head lies beside it.")]


@app.command()
def verify(
    file: File,
    head: Annotated[str | None, typer.Option(help="A head that `hanse audit head` printed earlier, and that was kept elsewhere.")] = None,
) -> None:
    """Find any line that was altered, removed, added or moved."""
    from hanse.site.ledger import Head
    from hanse.site.ledger import verify as verify_ledger

    count = verify_ledger(file, None if head is None else Head.parse(head))
    typer.echo(f"{file}: {count:,} lines, all in place and unaltered")


@app.command()
def show(
    file: File,
    kind: Annotated[str | None, typer.Option(help="Only lines of this kind, such as sent.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the lines as they are: one JSON object a line.")] = False,
) -> None:
    """Print the lines, checking each; it ends with an error at the first that is not in place."""
    import msgspec

    from hanse.site.ledger import read

    encode = msgspec.json.Encoder().encode
    for line in read(file):
        if kind is not None and line["kind"] != kind:
            continue
        facts = {name: value for name, value in line.items() if name not in ("n", "time", "kind", "previous")}
        words = "  ".join(f"{name}={value if isinstance(value, str) else encode(value).decode()}" for name, value in facts.items())
        typer.echo(encode(line).decode() if json else f"{line['n']:>6}  {line['time']}  {line['kind']:<10}  {words}".rstrip())


@app.command()
def head(file: File) -> None:
    """Print where the log ends, to be kept where nobody at the site can change it."""
    from hanse.site.ledger import read_head

    typer.echo(read_head(file))
