"""The same run with bundles on a stick."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
from numpy.testing import assert_array_equal

from hanse.finetuning.air_gap import Away, begin, import_bundle
from hanse.identity.kit import Kit
from hanse.messages.params import flatten
from hanse.sandbox import Sandbox

Pair = Any  # of conftest.py


@pytest.mark.parametrize(
    "learning", [{"mode": "rehearsed", "round_trips": 2, "client_steps": 4}, {"mode": "one-shot"}], ids=["rehearsed", "one-shot"]
)
def test_a_run_without_a_connection_gives_the_same_bits(pair: Pair, kits: dict[str, Kit], tmp_path: Path, learning: dict[str, Any]) -> None:
    if problem := Sandbox().problem():
        pytest.skip(problem)
    apart = dataclasses.replace(pair, vendor=tmp_path / "apart" / "vendor", client=tmp_path / "apart" / "client")
    recipe = pair.recipe(**learning)
    shutil.copytree(pair.vendor, apart.vendor)
    shutil.copytree(pair.client, apart.client)
    expected = recipe.execute(pair.env()).get_result()

    vera, clara = (kits[name].signer() for name in ("vera", "clara"))
    roots = kits["vera"].credentials().roots
    run, site = tmp_path / "vendor.air-gap", tmp_path / "client.air-gap"
    standing = begin(
        recipe,
        here={"acme": {"finetuning": str(apart.vendor)}},
        away={"north": Away("North Clinic")},
        folder=run,
        signer=vera,
        roots=roots,
        console="quiet",
    )
    trips = 0
    while standing.status == "waiting":
        ((bundle, to),) = standing.carry
        assert to == "north"
        config = {"finetuning": str(apart.client)}
        ((answer, _),) = import_bundle(bundle, folder=site, signer=clara, roots=roots, config=config, keep=[str(apart.client)]).carry
        standing = import_bundle(answer, folder=run, signer=vera, roots=roots, console="quiet")
        trips += 1
    assert 1 <= trips <= 7
    assert standing.run is not None
    result = standing.run.get_result()
    for name, array in flatten(expected.params)[0].items():
        assert_array_equal(flatten(result.params)[0][name], array)
    assert (apart.client / "exchange" / "left.jsonl").read_bytes()
