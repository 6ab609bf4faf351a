"""`hanse finetune gate-…`: read the evidence of a decision, and make it again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hanse.cli.admin import Json, print_facts, print_json, print_table, text_of

if TYPE_CHECKING:
    from hanse.finetuning.evidence import Evidence

app = typer.Typer()

EvidenceFile = Annotated[Path, typer.Argument(help="The JSON that the gate wrote.")]


@app.command()
def gate_show(
    evidence: EvidenceFile,
    sector: Annotated[str, typer.Option(help="Whose names of the rates to print: presentation attacks, access or medicine.")] = "",
    json: Json = False,
) -> None:
    """Say what the gate decided and why: in words, test by test, and the rates of the versions."""
    from hanse.finetuning.evidence import read_evidence
    from hanse.finetuning.metrics import table

    found = read_evidence(evidence)
    if json:
        typer.echo(found.json, nl=False)
        return
    typer.echo(f"{found.words}\n")
    print_facts(_facts(found))
    typer.echo()
    print_facts({f"{finding.verdict:<6}  {finding.test}": finding.words for finding in found.findings})
    for name, evaluation in (("old", found.old), ("new", found.new), ("first", found.first)):
        if evaluation:
            lines = table(evaluation, sector=sector)
            typer.echo(f"\n{name} version, threshold {evaluation.threshold:.4g}, intervals at {100 * evaluation.level:g} %")
            print_table(lines, {heading: text_of(heading) for heading in lines[0]}, empty="no rows")


@app.command()
def gate_reproduce(
    evidence: EvidenceFile,
    scores: Annotated[Path, typer.Option(help="The folder of the stored scores.")] = Path("scores"),
    json: Json = False,
) -> None:
    """Make a decision again from the stored scores. Ends with status 1 if it is not the same, byte for byte."""
    import numpy as np

    from hanse.finetuning.evidence import read_evidence
    from hanse.finetuning.gate import reproduce, stored_scores

    found = read_evidence(evidence)
    again = reproduce(found, stored_scores(found, scores))
    same = again.json == evidence.read_bytes()
    if json:
        print_json({"same": same, "outcome": again.outcome, "digest": again.digest})
    elif same:
        typer.echo(f"the same: {again.outcome}, {again.digest}")
    else:
        drawn = "" if found.numpy == np.__version__ else f" It was made with NumPy {found.numpy}, and here is {np.__version__}."
        typer.echo(f"not the same: the scores give {again.outcome}, the evidence says {found.outcome}.{drawn}", err=True)
    raise typer.Exit(0 if same else 1)


def _facts(found: Evidence) -> dict[str, str]:
    human = found.human
    return {
        "attempt": f"{found.attempt} of {found.gate.max_tries}",
        "holdout": found.rows,
        **{f"about {name}": value for name, value in found.about.items()},
        **{f"scores, {name}": digest for name, digest in found.scores.items()},
        "gate version": f"{found.gate_version}, seed {found.seed}, NumPy {found.numpy}",
        "a person": f"{'accepted' if human.accepted else 'refused'}: {human.by} of {human.organisation}, {human.when}" if human else "",
        "their reason": human.why if human else "",
        "passes": "yes" if found.passes else "no",
    }
