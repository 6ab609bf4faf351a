"""`hanse finetune`: a vendor's model made better on a client's data."""

from __future__ import annotations

import typer

from hanse.cli.finetune import bundle, data, gate, label, project, run, serve, versions, watch

app = typer.Typer(
    help="Vendor and client: improve a model on data that never leaves the client, and prove that it got no worse.", no_args_is_help=True
)

for group in (project.app, data.app, run.app, gate.app, versions.app, label.app, serve.app, watch.app, bundle.app):
    app.add_typer(group)
