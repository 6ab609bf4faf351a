"""What a patched Hugging Face trainer receives, does and sends. Models are small and begin at random: nothing is downloaded."""

from __future__ import annotations

import importlib
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hanse.environments import PocEnv, SimEnv
from hanse.errors import ConfigError
from hanse.jobs.evaluate import FedEvalRecipe
from hanse.jobs.fedavg import FedAvgRecipe
from hanse.messages.params import flatten
from hanse.server.run import Run

torch = pytest.importorskip("torch")
for package in ("transformers", "peft", "trl"):
    pytest.importorskip(package)
EXAMPLE = Path(__file__).parents[2] / "examples" / "huggingface"

COMMON = """
import tempfile
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

transformers.utils.logging.set_verbosity_error()
quiet = dict(output_dir=tempfile.gettempdir(), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
             logging_strategy="no", dataloader_pin_memory=False, per_device_train_batch_size=4, max_steps=3, learning_rate=0.05)


def tiny():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0))
"""
WHOLE = (
    COMMON
    + """
import hanse.adapters.transformers as flare
from transformers import Trainer, TrainingArguments

rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)} for _ in range(16)]
trainer = Trainer(model=tiny(), args=TrainingArguments(eval_strategy="steps", eval_steps=2, **quiet), train_dataset=rows, eval_dataset=rows)
flare.patch(trainer)
while flare.is_running():
    trainer.evaluate()
    if flare.is_train():
        trainer.train()
"""
)
TUNED = (
    COMMON
    + """
import hanse.adapters.transformers as flare
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(30)} | {"<pad>": 30, "<eos>": 31}, unk_token="w0"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="w0")
rows = Dataset.from_list([{"text": " ".join(f"w{n}" for n in range(8))}] * 16)
trainer = SFTTrainer(model=tiny(), args=SFTConfig(max_length=16, bf16=False, **quiet), train_dataset=rows, eval_dataset=rows,
                     processing_class=tokenizer,
                     peft_config=LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True))
flare.patch(trainer)
while flare.is_running():
    trainer.evaluate()
    trainer.train()
"""
)


def execute(recipe: Any, folder: Path) -> Run:
    run: Run = recipe.execute(SimEnv(num_clients=2, workers=2, runs=folder / "runs", console="quiet"))
    return run


def test_all_of_a_model_without_adapters_travels(tmp_path: Path) -> None:
    """The trainer evaluates while it trains, too: that is not the global model's."""
    (tmp_path / "whole.py").write_text(WHOLE)
    tiny = runpy.run_path(str(_written(tmp_path, COMMON)))["tiny"]
    recipe = FedAvgRecipe(name="whole", script=tmp_path / "whole.py", model=tiny(), rounds=3, best="min eval_loss")
    run = execute(recipe, tmp_path)
    losses = [metrics["eval_loss"] for metrics in run.metrics]
    assert losses[0] == pytest.approx(np.log(32) * 7 / 8, rel=0.05)  # a guess among 32; the first of 8 tokens is counted, not guessed
    assert losses[2] < losses[1] < losses[0]
    assert run.get_result().params.keys() == tiny().state_dict().keys()
    assert {event["weight"] for event in run.events("update")} == {3}
    assert all(event["metrics"].keys() == {"eval_loss"} for event in run.events("update"))
    scored = execute(FedEvalRecipe(name="scored", script=tmp_path / "whole.py", model=run.get_result()), tmp_path)
    assert scored.metrics[0]["eval_loss"] < losses[2]


def test_of_a_peft_model_in_an_sft_trainer_only_adapters_travel(tmp_path: Path) -> None:
    (tmp_path / "tuned.py").write_text(TUNED)
    recipe = FedAvgRecipe(name="tuned", script=tmp_path / "tuned.py", rounds=3, best="min eval_loss")
    run = execute(recipe, tmp_path)
    params = run.get_result().params
    assert len(params) == 2
    assert all("lora_" in name for name in params)
    assert sum(array.size for array in params.values()) == 2 * 8 + 2 * 24
    losses = [metrics["eval_loss"] for metrics in run.metrics]
    assert losses[2] < losses[1] < losses[0]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The example's `job` module."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in ("train", "job"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("job")
    for name in ("train", "job"):
        sys.modules.pop(name, None)


def test_the_example_has_the_same_bits_in_processes_of_its_own(example: Any, tmp_path: Path, data_folder: Path) -> None:
    from dataclasses import replace

    recipe = replace(example.make_recipe(data_folder / "sms_spam.tsv"), rounds=2)
    envs = (
        SimEnv(num_clients=2, workers=1, runs=tmp_path / "sim", console="quiet"),
        PocEnv(num_clients=2, runs=tmp_path / "poc", console="quiet"),
    )
    runs = [recipe.execute(env) for env in envs]
    first, second = (flatten(run.get_result().params)[0] for run in runs)
    assert {name: array.tobytes() for name, array in first.items()} == {name: array.tobytes() for name, array in second.items()}
    assert runs[0].metrics == runs[1].metrics


def test_params_go_out_and_in_again() -> None:
    from hanse.adapters.transformers import load_params, params_of

    one, other = (torch.nn.Linear(2, 3) for _ in range(2))
    load_params(other, params_of(one))
    assert torch.equal(one.weight, other.weight)
    with pytest.raises(ConfigError, match=r"2 of 2 tensors, such as 'bias', are not the same"):
        load_params(torch.nn.Linear(2, 4), params_of(one))
    with pytest.raises(ConfigError, match="a dict is no model"):
        params_of({})


@pytest.mark.parametrize(
    ("trainer", "says"),
    [
        (object(), "patch got a object: it takes a transformers.Trainer"),
        (SimpleNamespace(train=1, evaluate=1, model=1, args=1, state=1), "patched already"),
    ],
    ids=["other", "twice"],
)
def test_what_cannot_be_patched(trainer: Any, says: str) -> None:
    from hanse.adapters.transformers import patch

    with pytest.raises(ConfigError, match=says):
        patch(trainer)


def _written(folder: Path, code: str) -> Path:
    path = folder / "common.py"
    path.write_text(code)
    return path
