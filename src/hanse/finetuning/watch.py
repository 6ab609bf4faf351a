"""The drift watch at a client: scored inputs go in, and an alarm with its reason comes out when they are not what they were.

Inputs, scores, embeddings and labels stay here. What leaves, if anything does, is the alarm record: exactly the numbers in it.
"""

from __future__ import annotations

import math
import sqlite3
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import blake3
import msgspec
import numpy as np

from hanse.errors import ConfigError, StorageFull
from hanse.finetuning.reference import Reference, read_reference
from hanse.finetuning.reference import reference as reference
from hanse.finetuning.webhook import Webhook
from hanse.finetuning.windows import Figures, Moved, Sums, decode_arrays, encode_arrays, figures, moved, nothing, sums_of
from hanse.site.ledger import Ledger
from hanse.site.ledger import read as read_ledger
from hanse.statistics.intervals import wilson
from hanse.statistics.paired import holm
from hanse.statistics.sequential import PageHinkley, binomial_upper

Array = np.ndarray[Any, np.dtype[Any]]
Reason = Literal["devices", "label shift", "concept"]

__all__ = ["Alarm", "Figures", "Moved", "Reference", "Settings", "Watch", "read_reference", "reference"]

LEDGER = "alarms.jsonl"
_STATE = "state.sqlite"
_COUNT = "INSERT INTO seen VALUES (?, 1, 0) ON CONFLICT DO UPDATE SET counted = 1 WHERE NOT counted"
_LABEL = "INSERT INTO seen VALUES (?, 0, 1) ON CONFLICT DO UPDATE SET labelled = 1 WHERE NOT labelled"

_NEXT = {
    "devices": "Label about 50 inputs, drawn at random from the slices that moved, and start a fine-tuning run with them."
    " Until it is through, have decisions near the threshold looked at.",
    "label shift": "Confirm the new share with 50 labels of inputs drawn at random. The model need not be trained:"
    " ask the vendor for a threshold that fits the new share.",
    "concept": "Find what is missed: label inputs with scores in 0.01…0.3, look for similar ones around those confirmed,"
    " and start a fine-tuning run with them and a random part.",
}


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """When to raise an alarm.

    window: inputs in a window. in_a_row: so many windows must differ one after the other. level: the chance that a window differs by
    mistake, over all its tests. positives: the share of positives that is normal here; None: the holdout's.
    lot: labels in a spot check. delta, limit: of Page and Hinkley's test on labelled errors.
    name_slices: whether an alarm names the slices that moved; without, not even a device's name leaves.
    """

    window: int = 100
    in_a_row: int = 2
    level: float = 0.01
    positives: float | None = None
    lot: int = 50
    delta: float = 0.01
    limit: float = 5.0
    name_slices: bool = True

    def __post_init__(self) -> None:
        if min(self.window, self.in_a_row, self.lot) < 1:
            raise ConfigError("window, in_a_row and lot must be 1 or more")
        if not 0 < self.level < 0.5 or not 0 <= (self.positives or 0) <= 1:
            raise ConfigError("level must be above 0 and below 0.5, and positives a share")
        if not (self.delta >= 0 and self.limit > 0):
            raise ConfigError("delta must not be negative, and limit above 0")


DEFAULT = Settings()


class Alarm(msgspec.Struct, frozen=True, kw_only=True):
    """Exactly what leaves when an alarm is sent. reason: see docs/drift.md. numbers: all that it rests on. time: UTC, ISO 8601."""

    id: str
    time: str
    reason: Reason
    words: str
    next_step: str
    numbers: dict[str, float]
    slices: list[Moved]
    model: str
    reference: str
    project: str = ""
    site: str = ""


class _State(msgspec.Struct, kw_only=True):
    """filling: the window that is not full. streak, differing: how many windows differed one after the other, and their sums; quiet: how
    many did not. standing: the reason of the data alarm that was last raised, until windows are quiet again. errors: wrong and all, of the
    negatives and the positives in the spot check that is not full."""

    reference: str
    filling: Sums
    differing: Sums
    test: PageHinkley
    windows: int = 0
    inputs: int = 0
    labels: int = 0
    streak: int = 0
    quiet: int = 0
    standing: str = ""
    errors: list[list[int]] = msgspec.field(default_factory=lambda: [[0, 0], [0, 0]])


class Watch:
    """A watch over one stream of inputs. All that it knows is in the folder, so that it goes on where it was after a restart.

    folder: `watch/` of a project folder. project, site: for the alarms' records.
    Raises ConfigError if the reference is not calibrated for the settings.
    """

    def __init__(
        self,
        folder: Path,
        reference: Reference,
        settings: Settings = DEFAULT,
        *,
        project: str = "",
        site: str = "",
    ) -> None:
        if settings.window < reference.sizes[0]:
            raise ConfigError(
                f"window is {settings.window}: the reference is calibrated for windows of {reference.sizes[0]} inputs or more"
            )
        if settings.level < 2 * min(reference.levels):
            raise ConfigError(f"level is {settings.level}: with two tests the reference can tell {2 * min(reference.levels):g} or more")
        self.folder, self.reference, self.settings, self.project, self.site = folder, reference, settings, project, site
        folder.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(folder / _STATE, isolation_level=None, timeout=30)
        with self._transaction() as run:
            run("CREATE TABLE IF NOT EXISTS seen (name TEXT PRIMARY KEY, counted INTEGER, labelled INTEGER) WITHOUT ROWID")
            run("CREATE TABLE IF NOT EXISTS state (one INTEGER PRIMARY KEY CHECK (one = 1), state BLOB NOT NULL)")
            run("CREATE TABLE IF NOT EXISTS windows (number INTEGER PRIMARY KEY, figures BLOB NOT NULL)")
            run("CREATE TABLE IF NOT EXISTS alarms (number INTEGER PRIMARY KEY, alarm BLOB NOT NULL, noted INTEGER, sent INTEGER)")
        self._note()

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------------------------------- what came

    def windows(self, after: int = 0) -> list[Figures]:
        """The figures of all windows with a number above `after`, oldest first."""
        rows = self._database.execute("SELECT figures FROM windows WHERE number > ? ORDER BY number", (after,))
        return [msgspec.json.decode(encoded, type=Figures) for (encoded,) in rows]

    def alarms(self, *, unsent: bool = False) -> list[Alarm]:
        """All alarms, or those that were not sent, oldest first."""
        rows = self._database.execute(f"SELECT alarm FROM alarms {'WHERE NOT sent' if unsent else ''} ORDER BY number")
        return [msgspec.json.decode(encoded, type=Alarm) for (encoded,) in rows]

    def counts(self) -> dict[str, int]:
        """Inputs in full windows and in the one that is not, windows, and labels, so far."""
        state = self._state()
        return {"inputs": state.inputs, "waiting": state.filling.inputs, "windows": state.windows, "labels": state.labels}

    def unseen(self, names: Sequence[str]) -> list[str]:
        """Those that were not counted yet."""
        return [name for name in names if not self._database.execute("SELECT 1 FROM seen WHERE name = ? AND counted", (name,)).fetchone()]

    # -------------------------------------------------------------------------------------------------------------------------- feeding

    def feed(
        self,
        names: Sequence[str],
        scores: Array,
        embeddings: Array | None = None,
        columns: Mapping[str, Sequence[str]] | None = None,
        labels: Sequence[int | None] | None = None,
        *,
        labels_alone: bool = False,
    ) -> list[Alarm]:
        """Count the inputs, and return the alarms that they raise. A name counts once; its label may come later, with the score again.

        scores: shape (n,), in 0…1. embeddings: shape (n, d). columns: slices, such as device, n values each. labels: 0 or 1; None or -1
        where unknown; only of inputs drawn at random, as others say nothing about how often the model errs. labels_alone: these are labels
        of inputs that are, or will be, counted otherwise.
        Raises ConfigError, with nothing counted, if they do not fit; StorageFull.
        """
        scores = np.asarray(scores, np.float64)
        embeddings = None if embeddings is None else np.asarray(embeddings)
        columns = columns or {}
        self._check(names, scores, embeddings, columns, labels)
        alarms: list[Alarm] = []
        with self._transaction() as run:
            state = self._state()
            fresh = [i for i, name in enumerate(names) if not labels_alone and run(_COUNT, (name,)).rowcount]
            while fresh:
                room = max(1, self.settings.window - state.filling.inputs)
                part, fresh = fresh[:room], fresh[room:]
                parts = {column: [values[i] for i in part] for column, values in columns.items()}
                state.filling.add(sums_of(self.reference, scores[part], None if embeddings is None else embeddings[part], parts))
                if state.filling.inputs >= self.settings.window:
                    found, raised = self._window(state)
                    run("INSERT INTO windows VALUES (?, ?)", (found.window, msgspec.json.encode(found)))
                    alarms += raised
            for name, score, label in zip(names, scores.tolist(), () if labels is None else labels, strict=labels is not None):
                if label in (0, 1) and run(_LABEL, (name,)).rowcount:
                    alarms += self._label(state, score >= self.reference.threshold, label == 1)
            for alarm in alarms:
                run("INSERT INTO alarms (alarm, noted, sent) VALUES (?, 0, 0)", (msgspec.json.encode(alarm),))
            run("INSERT OR REPLACE INTO state VALUES (1, ?)", (msgspec.json.encode(state, enc_hook=encode_arrays),))
        self._note()
        return alarms

    def _check(
        self, names: Sequence[str], scores: Array, embeddings: Array | None, columns: Mapping[str, Sequence[str]], labels: Any
    ) -> None:
        given = {"scores": scores, "embeddings": embeddings, "labels": labels, **columns}
        if wrong := [what for what, values in given.items() if values is not None and len(values) != len(names)]:
            raise ConfigError(f"{len(names)} names, and not as many {wrong[0]}")
        if not ((scores >= 0) & (scores <= 1)).all():
            bad = int(np.flatnonzero(~((scores >= 0) & (scores <= 1)))[0])
            raise ConfigError(f"the score of {names[bad]!r} is {scores[bad]:g}: it must be in 0…1")
        if embeddings is not None and len(names):
            shape = np.shape(embeddings)
            if self.reference.dimension and shape[1:] != (self.reference.dimension,):
                raise ConfigError(f"embeddings of the shape {shape[1:]}: the reference has {self.reference.dimension} numbers in each")
            if not np.isfinite(embeddings).all():
                raise ConfigError("an embedding is not finite")

    # ------------------------------------------------------------------------------------------------------------------------ data drift

    def _window(self, state: _State) -> tuple[Figures, list[Alarm]]:
        """Close the window that is full, and raise an alarm if so many differ in a row and it does not stand already."""
        found = self._figures(state.filling, self.settings.positives, state.windows + 1)
        state.windows, state.inputs = state.windows + 1, state.inputs + state.filling.inputs
        alarms: list[Alarm] = []
        if found.differs:
            state.streak, state.quiet = state.streak + 1, 0
            state.differing.add(state.filling)
            if state.streak >= self.settings.in_a_row:
                alarm = self._data_alarm(state)
                alarms = [alarm] if alarm.reason != state.standing else []
                state.standing = alarm.reason
        else:
            state.streak, state.quiet, state.differing = 0, state.quiet + 1, nothing(self.reference)
            if state.quiet >= self.settings.in_a_row:
                state.standing = ""
        state.filling = nothing(self.reference)
        return found, alarms

    def _figures(self, sums: Sums, positives: float | None, window: int = 0) -> Figures:
        return figures(self.reference, sums, positives=positives, level=self.settings.level, window=window)

    def _data_alarm(self, state: _State) -> Alarm:
        """Of the windows that differ, together: label shift if the reference with the new share of positives explains them."""
        known, sums = self.reference, state.differing
        plain = self._figures(sums, self.settings.positives)
        shifted = self._figures(sums, plain.positives)
        normal = known.positives if self.settings.positives is None else self.settings.positives
        numbers: dict[str, float] = {
            "windows": state.streak,
            "inputs": sums.inputs,
            "ks": plain.ks,
            "ks_level": plain.ks_level,
            "ks_if_label_shift": shifted.ks,
            "positives_before": normal,
            "positives": plain.positives,
            "positives_error": plain.positives_error,
            "decided_positive": plain.decided_positive,
            "psi": plain.psi,
        }
        if plain.mmd2 is not None and plain.mmd2_level is not None and shifted.mmd2 is not None:
            numbers |= {"mmd2": plain.mmd2, "mmd2_level": plain.mmd2_level, "mmd2_if_label_shift": shifted.mmd2}
        last = f"The last {sums.inputs} inputs, {state.streak} windows in a row, are not what the reference knows"
        if not shifted.differs:
            share = f"about {plain.positives:.1%} of them are positive (± {2 * plain.positives_error:.1%}), where {normal:.1%} were"
            return self._alarm("label shift", f"{last}: {share}. Each class by itself looks as before.", numbers)
        slices = moved(known, sums, positives=self.settings.positives) if self.settings.name_slices else []
        where = ", ".join(f"{each.column} {each.value} ({each.inputs} inputs)" for each in slices)
        what = [f"Kolmogorov–Smirnov distance of the scores {plain.ks:.3f}"]
        what += [] if plain.mmd2 is None else [f"MMD² of the embeddings {plain.mmd2:.4f}"]
        words = f"{last}: {', '.join(what)}. New shares of the classes do not explain that: the inputs themselves look different."
        return self._alarm("devices", words + (f" Moved most: {where}." if where else ""), numbers, slices)

    # --------------------------------------------------------------------------------------------------------------------- concept drift

    def _label(self, state: _State, decided: bool, true: bool) -> list[Alarm]:
        """Count one label; the alarms of Page and Hinkley's test and of a spot check that is full."""
        wrong = decided != true
        state.labels += 1
        state.errors[true][0] += wrong
        state.errors[true][1] += 1
        state.test = state.test.after(float(wrong))
        alarms = []
        if state.test.rose:
            numbers: dict[str, float] = {
                "labels": state.test.count,
                "error": state.test.mean,
                "height": state.test.height,
                "limit": state.test.limit,
            }
            words = f"Errors became more frequent within the last {state.test.count} labels (Page–Hinkley {state.test.height:.1f})."
            alarms.append(self._concept(state, words, numbers))
            state.test = self._test()
        if sum(lot for _, lot in state.errors) >= self.settings.lot:
            alarms += self._spot_check(state)
            state.errors = [[0, 0], [0, 0]]
        return alarms

    def _spot_check(self, state: _State) -> list[Alarm]:
        """Exact binomial tests of false positives and of misses, each class by itself, so that new shares of the classes do not matter.

        The rate that is allowed is the upper end of Wilson's interval (one-sided 95 %) of the holdout's, which is known from a sample too.
        """
        lots = dict(zip(("false_positives", "misses"), state.errors, strict=True))
        rates = {kind: wilson(*each, level=0.9)[1] for kind, each in zip(lots, self.reference.errors, strict=True)}
        p_values = holm({kind: binomial_upper(wrong, lot, rates[kind]) for kind, (wrong, lot) in lots.items()})
        if min(p_values.values()) > self.settings.level:
            return []
        numbers: dict[str, float] = {}
        for kind, (wrong, lot) in lots.items():
            numbers |= {kind: wrong, f"{kind}_of": lot, f"{kind}_rate_allowed": rates[kind], f"{kind}_p": p_values[kind]}
        (wrong, negatives), (missed, positives) = state.errors
        words = f"Of the last {negatives + positives} labels, {wrong} of {negatives} negatives were taken for positive and {missed} of"
        words += f" {positives} positives were missed, more than on the vendor's holdout."
        return [self._concept(state, words, numbers)]

    def _concept(self, state: _State, words: str, numbers: dict[str, float]) -> Alarm:
        if state.standing:
            words += f" An alarm for {state.standing} stands: the errors may come of that."
        return self._alarm("concept", words, numbers)

    # --------------------------------------------------------------------------------------------------------------------------- leaving

    def send(self, hook: Webhook) -> list[Alarm]:
        """Send the alarms that were not sent yet, oldest first, and write down each that arrived: to which host, and its bytes' digest.

        Raises Refused or LinkBroken for the first that does not arrive; it and those after it stay to be sent. A crash in between sends one
        again, under the same id.
        """
        sent = []
        for number, encoded in self._database.execute("SELECT number, alarm FROM alarms WHERE NOT sent ORDER BY number").fetchall():
            alarm = msgspec.json.decode(encoded, type=Alarm)
            hook.post(encoded, id=alarm.id)
            with Ledger(self.folder / LEDGER, wait=True) as ledger:
                ledger.append("left", id=alarm.id, to=hook.host, bytes=len(encoded), digest=f"blake3:{blake3.blake3(encoded).hexdigest()}")
            with self._transaction() as run:
                run("UPDATE alarms SET sent = 1 WHERE number = ?", (number,))
            sent.append(alarm)
        return sent

    # --------------------------------------------------------------------------------------------------------------------------- keeping

    def _alarm(self, reason: Reason, words: str, numbers: dict[str, float], slices: Sequence[Moved] = ()) -> Alarm:
        return Alarm(
            id=uuid.uuid4().hex,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            reason=reason,
            words=words,
            next_step=_NEXT[reason],
            numbers=numbers,
            slices=list(slices),
            model=self.reference.model,
            reference=self.reference.digest,
            project=self.project,
            site=self.site,
        )

    def _test(self) -> PageHinkley:
        """Begun anew. delta and limit are for errors of 1 %; where the holdout has more, they grow with their standard deviation."""
        (wrong, negatives), (missed, positives) = self.reference.errors
        error = (wrong + missed) / (negatives + positives)
        scale = max(1.0, math.sqrt(error * (1 - error)) / 0.1)
        return PageHinkley(delta=self.settings.delta * scale, limit=self.settings.limit * scale)

    def _state(self) -> _State:
        """What was kept. Where the reference is another one, only the counts: the sums are on another grid."""
        new = _State(reference=self.reference.digest, filling=nothing(self.reference), differing=nothing(self.reference), test=self._test())
        found = self._database.execute("SELECT state FROM state").fetchone()
        if not found:
            return new
        old = msgspec.json.decode(found[0], type=_State, dec_hook=decode_arrays)
        if old.reference == new.reference:
            return old
        new.windows, new.inputs, new.labels = old.windows, old.inputs, old.labels
        return new

    def _note(self) -> None:
        """Write alarms that the ledger does not have yet into it. A crash in between repeats this, and the line is there once."""
        waiting = self._database.execute("SELECT number, alarm FROM alarms WHERE NOT noted ORDER BY number").fetchall()
        if not waiting:
            return
        with Ledger(self.folder / LEDGER, wait=True) as ledger:
            there = {line["alarm"]["id"] for line in read_ledger(ledger.path) if line["kind"] == "alarm"}
            for number, encoded in waiting:
                alarm = msgspec.json.decode(encoded)
                if alarm["id"] not in there:
                    ledger.append("alarm", alarm=alarm)
                    ledger.sync()
                with self._transaction() as run:
                    run("UPDATE alarms SET noted = 1 WHERE number = ?", (number,))

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        try:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database.execute
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")
        except sqlite3.OperationalError as error:
            raise StorageFull(f"{self.folder / _STATE} cannot be written: {error}", hint="Nothing of these inputs was counted.") from error
