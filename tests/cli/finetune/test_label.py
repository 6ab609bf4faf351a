from __future__ import annotations

import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from hanse.cli.finetune.label import app
from hanse.errors import ConfigError
from hanse.finetuning.labelling.labels import Labels

RUN = "import sys; from hanse.cli.finetune.label import app; app(sys.argv[1:])"


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_label_serves_until_it_is_stopped_and_prints_the_counts(tmp_path: Path, end: signal.Signals) -> None:
    np.savez(tmp_path / "day.npz", scores=np.array([0.1, 0.2]), images=np.zeros((2, 4, 4), np.uint8))
    with Labels(tmp_path, by="ada") as labels:
        labels.give("day/000001", 1, how="band", score=0.2)
    command = [sys.executable, "-c", RUN, "label", str(tmp_path / "day.npz"), "--project", str(tmp_path), "--no-open", "--band", "0", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("2 images; label them at http://127.0.0.1:")
        url = next(word for word in line.split() if word.startswith("http"))
        with urllib.request.urlopen(url, timeout=20) as answer:
            assert b"<title>Labelling</title>" in answer.read()
        process.send_signal(end)
        rest = process.stdout.read()
    assert "1 labels in " in rest
    assert "1 anomalies in 1 images searched" in rest
    assert process.returncode == 0


def test_training_set_writes_what_data_reads(tmp_path: Path) -> None:
    with Labels(tmp_path, by="ada") as labels:
        for i in range(6):
            labels.give(f"{i}.png", i % 2, how="band", score=0.1)
    result = CliRunner().invoke(app, ["training-set", "--project", str(tmp_path), "--n", "4"], catch_exceptions=False)
    assert "4 images, 2 of them anomalies" in result.output.replace("\n", "")
    assert (tmp_path / "labels" / "training.csv").read_text().splitlines()[0] == "file,label,by,when,how,score"
    with pytest.raises(ConfigError, match="no labels to train on"):
        CliRunner().invoke(app, ["training-set", "--project", str(tmp_path / "none")], catch_exceptions=False)
