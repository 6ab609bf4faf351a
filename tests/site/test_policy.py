from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import yaml

from hanse.errors import ConfigError, Failure, HanseError, PolicyRefused
from hanse.identity.certificates import Identity, Role
from hanse.jobs.archive import Content, Manifest, code_digest
from hanse.messages.flmodel import FLModel, ParamsType
from hanse.messages.task import Task, TaskId
from hanse.messages.update import Record, Update
from hanse.messages.wire import Resources
from hanse.site.policy import DEFAULT_POLICY, Caps, Meter, Policy, Spent, check_offer, check_update, read_policy

ADA = Identity("north", Role.RESEARCHER, "ada", "University")
MANIFEST = Manifest(
    format=1,
    name="digits",
    digests={"job.yaml": Content("1" * 64, 100), "code/train.py": Content("2" * 64, 10)},
    sites=[],
    site_config={},
    min_sites=1,
    resources=Resources(memory_bytes=2000),
    workflow="fedavg",
    rounds=20,
    created=datetime.now(UTC),
    submitter="ada",
)
REFERENCE = FLModel({"body.w": np.zeros(3), "head.w": np.zeros(2)})
UPDATE = Update(
    "site-1",
    TaskId("digits", 0, 0, "site-1"),
    FLModel(
        {"body.w": np.array([3.0, 0.0, 4.0]), "head.w": np.ones(2)},
        params_type=ParamsType.DIFF,
        metrics={"loss": 0.5, "patients": 12.0},
        meta={"examples": 10},
    ),
    records=(Record("loss", 0.5, 1), Record("patients", 3), Record("note", "text", kind="text"), Record("lr", 0.1, kind="param")),
)


def policy(**clauses: Any) -> Policy:
    return msgspec.convert(clauses, Policy)


def clause_of(clauses: Policy, **changes: Any) -> str | None:
    """The clause by which the offer is refused."""
    identity = {name: changes.pop(name) for name in ("name", "role", "organisation") if name in changes}
    try:
        check_offer(clauses, msgspec.structs.replace(MANIFEST, **changes), replace(ADA, **identity))
    except PolicyRefused as refused:
        return refused.clause
    return None


# -------------------------------------------------------------------------------------------------------------------------------- the file


def test_the_default_file_says_what_a_policy_without_clauses_does(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(DEFAULT_POLICY)
    assert read_policy(tmp_path / "policy.yaml") == Policy()
    written = yaml.safe_load(DEFAULT_POLICY)
    assert written == json.loads(msgspec.json.encode(Policy()))  # every clause and setting stands there


def test_the_examples_in_the_default_file_are_filters(tmp_path: Path) -> None:
    examples = [line.removeprefix("#   ") for line in DEFAULT_POLICY.splitlines() if line.startswith("#   - ")]
    (tmp_path / "policy.yaml").write_text("filters:\n" + "\n".join(examples))
    assert [type(part).__name__ for part in read_policy(tmp_path / "policy.yaml").site_filters()] == [
        "Exclude",
        "ClipNorm",
        "GaussianNoise",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds a NoneType"),
        ("sandbox: always", "always.*sandbox"),
        ("caps: {round: 3}", r"unknown field `round` - at `\$.caps`"),
        ("caps: {rounds: -1}", r"at `\$.caps.rounds`"),
        ("caps: {rounds: true}", r"at `\$.caps.rounds`"),
        ("caps: {cpu_seconds: 0}", r"at `\$.caps.cpu_seconds`"),
        ("submitters: {names: ada}", r"Expected `array`, got `str` - at `\$.submitters.names`"),
        ("submitters: {roles: [auditor]}", r"auditor.*at `\$.submitters.roles\[0\]`"),
        ("submitters:", r"at `\$.submitters`"),
        ("code: {digests: [5a1f]}", r"at `\$.code.digests\[0\]`"),
        ("tensors: {on_denied: ignore}", r"at `\$.tensors.on_denied`"),
        ("tensors: {deny: ['']}", r"at `\$.tensors.deny\[0\]`"),
        ("logs: 1", r"at `\$.logs`"),
        ("filters: [{kind: clip}]", "no 'clip' among the filters"),
        ("filters: [{kind: clip_norm, max_norm: 0}]", "max_norm is 0"),
        ("filters: [{kind: clip_norm}]", "max_norm"),
        ("statistics: {min_cuont: 20}", r"unknown field `min_cuont` - at `\$.statistics`"),
        ("statistics: {min_count: 0}", "min_count is 0: it must be a whole number from 1"),
        ("statistics: {min_count: 2.5}", r"at `\$.statistics.min_count`"),
        ("statistics: {count_noise: .inf}", "count_noise is inf"),
        ("statistics: {extremes: 1}", r"at `\$.statistics.extremes`"),
        ("logs: true\ncaps:\n  rounds: 1\nlogs: false", "line 4: 'logs' is there twice"),
        ("caps:\n  rounds: 1\n  rounds: 2", "line 3: 'rounds' is there twice"),
        ("logs: [", "line 1"),
        ("logs: !!python/object:os.system x", "python/object"),
        ("a: &a [*a]", "unknown field `a`"),
    ],
)
def test_a_policy_that_is_wrong_is_refused_with_the_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        read_policy(path)
    assert str(error.value).startswith(str(path))
    with pytest.raises(ConfigError, match="No such file"):
        read_policy(tmp_path / "none.yaml")


# --------------------------------------------------------------------------------------------------------------------------------- offers


def test_the_default_takes_jobs_of_everybody_who_may_submit() -> None:
    for role in (Role.PROJECT_ADMIN, Role.ORG_ADMIN, Role.RESEARCHER):
        assert clause_of(Policy(), role=role) is None
    for role in (Role.AUDITOR, Role.SITE, Role.SERVER, Role.JOINING):
        assert clause_of(Policy(), role=role) == "submitters.roles"


def test_name_organisation_and_role_must_all_fit() -> None:
    strict = policy(submitters={"names": ["ada", "b*"], "organisations": ["University", "Hospital *"], "roles": ["researcher"]})
    assert clause_of(strict) is None
    assert clause_of(strict, name="bob", organisation="Hospital North") is None
    assert clause_of(strict, name="eve") == "submitters.names"
    assert clause_of(strict, name="Ada") == "submitters.names"
    assert clause_of(strict, organisation="Company") == "submitters.organisations"
    assert clause_of(strict, role=Role.ORG_ADMIN) == "submitters.roles"
    assert clause_of(policy(submitters={"names": []})) == "submitters.names"


def test_kinds_of_workflows() -> None:
    assert clause_of(policy(workflows=["fedavg", "cyclic"])) is None
    assert clause_of(policy(workflows=["fed*"]), workflow="workflow") == "workflows"


def test_code_runs_if_its_signer_is_trusted_or_it_was_reviewed() -> None:
    reviewed = code_digest(MANIFEST)
    assert clause_of(policy(code={"signers": ["ada"]})) is None
    assert clause_of(policy(code={"signers": ["bob"]})) == "code.digests"
    assert clause_of(policy(code={"signers": [], "digests": [reviewed]})) is None
    changed = {**MANIFEST.digests, "code/train.py": Content("3" * 64, 10)}
    assert clause_of(policy(code={"signers": [], "digests": [reviewed]}), digests=changed) == "code.digests"
    with pytest.raises(PolicyRefused, match=rf"job 'digits' of .*not among what this site has reviewed: {reviewed} \[code\.digests\]"):
        check_offer(policy(code={"signers": []}), MANIFEST, ADA)


def test_what_a_job_says_it_takes_is_checked_at_once() -> None:
    assert clause_of(policy(caps={"rounds": 20, "memory_bytes": 2000})) is None
    assert clause_of(policy(caps={"rounds": 19})) == "caps.rounds"
    assert clause_of(policy(caps={"memory_bytes": 1999})) == "caps.memory_bytes"


# ------------------------------------------------------------------------------------------------------------------------------- updates


def refusal(clauses: Policy, update: Update = UPDATE) -> tuple[str, str]:
    with pytest.raises(PolicyRefused) as refused:
        check_update(clauses, update, task=Task("train", REFERENCE))
    assert refused.value.hint == "Leave it out, or have the site allow it in its policy."
    return refused.value.clause, refused.value.message


def leaves(clauses: Policy, update: Update = UPDATE) -> Update:
    return check_update(clauses, update, task=Task("train", REFERENCE))


def test_by_default_numbers_leave_and_texts_stay() -> None:
    out = leaves(Policy())
    assert out.model.params is UPDATE.model.params
    assert (out.model.metrics, out.model.meta) == (UPDATE.model.metrics, UPDATE.model.meta)
    assert [record.key for record in out.records] == ["loss", "patients"]
    assert leaves(policy(logs=True)) == UPDATE


def test_a_tensor_that_may_not_leave() -> None:
    for clauses, clause in (({"deny": ["head.*"]}, "tensors.deny"), ({"allow": ["body.*"]}, "tensors.allow")):
        assert refusal(policy(tensors=clauses)) == (clause, f"'head.w' may not leave this site [{clause}]")
        out = leaves(policy(tensors={**clauses, "on_denied": "drop"})).model
        assert list(out.params) == ["body.w"]
        assert out.params["body.w"] is UPDATE.model.params["body.w"]
        assert out.meta == {"examples": 10, "excluded": ["head.w"]}
    assert leaves(policy(tensors={"deny": ["HEAD.*"]})).model.params.keys() == {"body.w", "head.w"}
    assert refusal(policy(tensors={"allow": ["*"], "deny": ["*"]}))[0] == "tensors.deny"


def test_what_else_is_in_params_has_a_name_too() -> None:
    nested = replace(UPDATE, model=FLModel({"net": [np.ones(1), {"note": "text", "a/b": 3, "empty": {}}], "b": b"raw", "t": (None,)}))
    for name in ("net/0", "net/1/note", "net/1/a~1b", "net/1/empty", "b", "t/0"):
        assert refusal(policy(tensors={"deny": [name]}), nested) == ("tensors.deny", f"'{name}' may not leave this site [tensors.deny]")
    assert leaves(policy(tensors={"deny": ["net", "net/1", "t"]}), nested).model.params is nested.model.params
    out = leaves(policy(tensors={"allow": ["net/0"], "on_denied": "drop"}), nested).model
    assert {name: array.tolist() for name, array in out.params.items()} == {"net/0": [1.0]}
    assert out.meta["excluded"] == ["b", "net/1/a~1b", "net/1/empty", "net/1/note", "t/0"]
    assert refusal(policy(tensors={"allow": ["w"]}), replace(UPDATE, model=FLModel("text")))[0] == "tensors.allow"


def test_metrics_and_logged_numbers_that_may_not_leave() -> None:
    assert refusal(policy(metrics={"deny": ["patient*"]}))[0] == "metrics.deny"
    out = leaves(policy(metrics={"deny": ["patient*"], "on_denied": "drop"}, logs=True))
    assert out.model.metrics == {"loss": 0.5}
    assert [record.key for record in out.records] == ["loss", "note", "lr"]
    logged = replace(UPDATE, model=FLModel(metrics={"loss": 1.0}))
    assert refusal(policy(metrics={"deny": ["patient*"]}), logged)[0] == "metrics.deny"


def test_meta_that_the_mean_does_not_need_stays() -> None:
    told = replace(UPDATE, model=FLModel(metrics={"loss": 1.0}, meta={"examples": 3, "note": "text"}))
    assert refusal(Policy(), told) == ("meta.allow", "'note' may not leave this site [meta.allow]")
    assert leaves(policy(meta={"allow": ["examples"], "on_denied": "drop"}), told).model.meta == {"examples": 3}
    assert leaves(policy(meta={"allow": ["*"]}), told).model.meta == told.model.meta
    for value, free in (("text", True), ("other", False)):
        brought = FLModel(meta={"note": value})
        if free:
            assert check_update(Policy(), told, task=Task("train", brought)).model.meta == told.model.meta
        else:
            with pytest.raises(PolicyRefused, match="note"):
                check_update(Policy(), told, task=Task("train", brought))


def test_the_words_of_an_error_stay() -> None:
    failed = replace(
        UPDATE,
        model=FLModel(),
        failure=Failure("KeyError", "no patient 'Jane Doe'", "look"),
        records=(Record("traceback", "Jane", kind="log"),),
    )
    out = leaves(Policy(), failed)
    assert out.failure is not None
    assert out.failure.code == "SiteFailed"
    assert "[logs]" in str(out.failure)
    assert "Jane" not in repr(out)
    assert leaves(policy(logs=True), failed) == failed


def test_too_few_rows_are_named_by_the_clause_in_the_agents_own_words() -> None:
    """The site's rules for statistics are its own: who asks may know that they stood in the way, and nothing else that the code says."""
    clause = "statistics.min_count"
    failed = replace(UPDATE, model=FLModel(), failure=Failure("PolicyRefused", f"Jane Doe is one of few [{clause}]", "Jane"), records=())
    told = leaves(policy(statistics={"min_count": 30}), failed)
    assert told.failure == Failure("PolicyRefused", f"there are fewer than 30 rows to speak of [{clause}]")
    for clauses, code in ((Policy(), "PolicyRefused"), (policy(statistics={}), "ConfigError")):
        told = leaves(clauses, replace(failed, failure=Failure(code, f"Jane [{clause}]")))
        assert told.failure is not None
        assert told.failure.code == "SiteFailed"
        assert "Jane" not in repr(told)


def test_a_recipe_that_needs_exact_counts_is_refused_at_once_where_they_must_have_noise() -> None:
    for workflow, refused in (("kmeans", True), ("logistic-newton", True), ("statistics", False), ("fedavg", False)):
        assert clause_of(policy(statistics={"count_noise": 1}), workflow=workflow) == ("statistics.count_noise" if refused else None)
        assert clause_of(policy(statistics={}), workflow=workflow) is None


def test_a_policy_with_rules_for_statistics_leaves_other_tasks_alone() -> None:
    assert leaves(policy(statistics={"min_count": 50, "count_noise": 3}, logs=True)) == UPDATE


def test_optimizer_params_never_leave() -> None:
    sly = replace(UPDATE, model=replace(UPDATE.model, optimizer_params={"m": np.ones(3)}))
    assert leaves(Policy(), sly).model.optimizer_params == {}


def test_filters_always_apply_and_what_leaves_is_what_is_checked() -> None:
    out = leaves(
        policy(filters=[{"kind": "exclude", "patterns": ["head.*"]}, {"kind": "clip_norm", "max_norm": 1.0}], tensors={"deny": ["head.*"]})
    )
    np.testing.assert_allclose(out.model.params["body.w"], [0.6, 0.0, 0.8])
    assert out.model.params.keys() == {"body.w"}
    assert UPDATE.model.params["body.w"].tolist() == [3.0, 0.0, 4.0]


def test_filters_see_the_change_of_a_full_model() -> None:
    full = replace(UPDATE, model=FLModel({"body.w": np.array([4.0, 1.0, 1.0])}))
    clip = policy(filters=[{"kind": "clip_norm", "max_norm": 1.0}])
    out = check_update(clip, full, task=Task("train", FLModel({"body.w": np.ones(3)})))
    np.testing.assert_allclose(out.model.params["body.w"], [2.0, 1.0, 1.0])
    with pytest.raises(ConfigError, match=r"body\.w"):
        check_update(clip, full, task=Task("train", FLModel()))


def test_nobody_can_foretell_a_sites_noise() -> None:
    noise = policy(filters=[{"kind": "gaussian_noise", "stddev": 1.0}])
    draws = [leaves(noise).model.params["body.w"] - UPDATE.model.params["body.w"] for _ in range(3)]
    assert len({draw.tobytes() for draw in draws}) == 3
    many = leaves(noise, replace(UPDATE, model=FLModel({"w": np.zeros(100_000)}))).model.params["w"]
    assert abs(many.mean()) < 0.05
    assert abs(many.std() - 1) < 0.05


# --------------------------------------------------------------------------------------------------------------------------------- caps


@pytest.mark.parametrize("name", ["rounds", "upload_bytes", "download_bytes", "cpu_seconds"])
def test_a_meter_refuses_what_passes_a_cap(name: str) -> None:
    meter = Meter(msgspec.convert({name: 10}, Caps))
    for _ in range(2):
        meter.charge(**{name: 5})
    with pytest.raises(PolicyRefused, match=rf"takes 11(\.0)? .*gives a job 10.*\[caps.{name}\]") as refused:
        meter.charge(**{name: 1})
    assert refused.value.clause == f"caps.{name}"
    assert getattr(meter.spent, name) == 11
    others = {"rounds", "upload_bytes", "download_bytes", "cpu_seconds"} - {name}
    meter.charge(**dict.fromkeys(others, 100))
    with pytest.raises(PolicyRefused):
        meter.charge(**{name: 1})


def test_a_meter_goes_on_after_a_restart() -> None:
    meter = Meter(Caps(rounds=3))
    meter.charge(rounds=2, cpu_seconds=1.5)
    kept = msgspec.json.encode(meter.spent)
    again = Meter(Caps(rounds=3), msgspec.json.decode(kept, type=Spent))
    assert again.spent == Spent(rounds=2, cpu_seconds=1.5)
    again.charge(rounds=1)
    with pytest.raises(PolicyRefused):
        again.charge(rounds=1)


def test_without_caps_everything_is_only_counted() -> None:
    meter = Meter(Caps())
    meter.charge(rounds=10**6, upload_bytes=10**18, cpu_seconds=1e9)
    assert meter.spent.upload_bytes == 10**18


def test_a_cap_of_nothing() -> None:
    with pytest.raises(HanseError, match=r"caps\.upload_bytes"):
        Meter(Caps(upload_bytes=0)).charge(upload_bytes=1)
    Meter(Caps(upload_bytes=0)).charge(download_bytes=1)


def test_a_bare_off_means_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("sandbox: off\n")
    assert read_policy(path).sandbox == "off"
