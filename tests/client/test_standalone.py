"""`python script.py` alone, in a real process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hanse.messages import codec
from hanse.messages.flmodel import FLModel

TORCH = """
import torch
import hanse.client as flare
from hanse.client.tracking import SummaryWriter

def main():
    net = torch.nn.Linear(2, 1, bias=False)
    loss = torch.nn.MSELoss()
    torch.nn.init.constant_(net.weight, 1.0)
    flare.init()
    writer = SummaryWriter()
    while flare.is_running():
        model = flare.receive()
        assert flare.is_train() and flare.get_site_name() == "site-1"
        net.load_state_dict(model.params)
        with torch.no_grad():
            net.weight += 1
        writer.add_scalar("x", 1.0)
        print("weight", net.weight.tolist(), model.current_round, model.total_rounds)
        flare.send(flare.FLModel(params=net.state_dict(), metrics={"loss": 0.25}))
    print("after")

main()
"""

DIFF = """
import numpy as np
import hanse.client as flare
flare.init()
while (model := flare.receive()) is not None:
    print("w", model.params["w"].tolist(), model.params["n"].dtype)
    flare.send(flare.FLModel(params={"w": np.ones(2)}, params_type="DIFF", metrics={"a": 1.0}))
"""


def alone(tmp_path: Path, source: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "script.py"
    path.write_text(source)
    return subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)


def test_a_torch_script_starts_from_its_own_network(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    done = alone(tmp_path, TORCH)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "hanse: one site, 2 rounds; the first model is that of variable 'net'"
    assert lines[1] == "weight [[2.0, 2.0]] 0 2"
    assert lines[2].startswith("hanse: round 1 of 2: loss 0.25, 1 logged values (")
    assert lines[3] == "weight [[3.0, 3.0]] 1 2"
    assert lines[-1] == "after"
    assert "Warning" not in done.stderr


def test_a_file_gives_the_first_model_and_differences_are_added(tmp_path: Path) -> None:
    codec.write(tmp_path / "m.safetensors", FLModel({"w": np.array([5.0, 7.0], np.float32), "n": np.array(3)}))
    done = alone(tmp_path, DIFF, HANSE_MODEL=str(tmp_path / "m.safetensors"), HANSE_ROUNDS="3")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("w")] == [
        "w [5.0, 7.0] int64",
        "w [6.0, 8.0] int64",
        "w [7.0, 9.0] int64",
    ]


def test_without_a_model_the_first_has_no_parameters(tmp_path: Path) -> None:
    source = "import hanse.client as f\nf.init()\nm = f.receive()\nprint(m.params)\nf.send(f.FLModel(metrics={'a': 1}))\n"
    done = alone(tmp_path, source)
    assert done.stdout.splitlines()[1:2] == ["None"]
    assert "no variable is a model" in done.stdout


def test_of_two_models_none_is_taken(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    source = "import torch, hanse.client as f\na, b = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)\nf.init()\nprint(f.receive().params)\n"
    done = alone(tmp_path, source)
    assert "the variables a, b all are models" in done.stdout
    assert done.stdout.splitlines()[-1] == "None"


def test_a_fitted_estimator_is_a_model(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    source = """
import numpy as np
from sklearn.linear_model import LinearRegression
import hanse.client as flare
line = LinearRegression().fit(np.array([[0.0], [1.0]]), np.array([1.0, 3.0]))
flare.init()
print({name: value.round(6).tolist() for name, value in flare.receive().params.items() if name in ("coef_", "intercept_")})
"""
    done = alone(tmp_path, source)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "{'coef_': [2.0], 'intercept_': 1.0}"


@pytest.mark.parametrize("rounds", ["0", "two", "-1", ""])
def test_a_wrong_number_of_rounds(tmp_path: Path, rounds: str) -> None:
    done = alone(tmp_path, "import hanse.client as f\nf.init()\n", HANSE_ROUNDS=rounds)
    assert done.returncode != 0
    assert "HANSE_ROUNDS is" in done.stderr
