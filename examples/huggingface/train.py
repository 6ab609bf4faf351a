"""Which text messages are spam? A small transformer with LoRA adapters; only the adapters and the classifier travel.

Nothing is downloaded: the tokenizer comes with the job, and the model begins at random, the same at every site.
"""

import sys
import tempfile
import warnings

import torch
from peft import LoraConfig, TaskType, get_peft_model
from tokenizers import Tokenizer
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.utils import logging

import hanse.adapters.transformers as flare

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # of one of these libraries to another

OWN = 800  # so many messages are the server's
WORDS = 1000
LENGTH = 48  # tokens of a message that are read


def messages(path):
    """Label and text of each."""
    with open(path, encoding="utf-8") as file:
        return [line.rstrip("\n").split("\t", 1) for line in file.readlines()[1:]]


def make_model():
    """The same numbers at every call: what is not trained must be equal at all sites."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        config = BertConfig(vocab_size=WORDS, max_position_embeddings=LENGTH, initializer_range=0.1, **sizes)
        lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=16, lora_alpha=32, target_modules=["word_embeddings", "query", "value", "dense"])
        return get_peft_model(BertForSequenceClassification(config), lora)


class Messages(Dataset):
    def __init__(self, rows, tokenizer):
        texts = [text for _, text in rows]
        self.inputs = tokenizer(texts, truncation=True, max_length=LENGTH, padding="max_length", return_tensors="pt")
        self.labels = torch.tensor([label == "spam" for label, _ in rows], dtype=torch.long)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"labels": self.labels[index], **{name: self.inputs[name][index] for name in ("input_ids", "attention_mask")}}


def accuracy(predicted):
    return {"accuracy": (predicted.predictions.argmax(axis=1) == predicted.label_ids).mean()}


def main(path):
    logging.set_verbosity_error()
    flare.init()
    info = flare.system_info()
    rows = messages(path)[OWN:][info["rank"] :: info["count"]]
    words = Tokenizer.from_str(flare.get_config()["tokenizer"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]")
    args = TrainingArguments(
        output_dir=tempfile.gettempdir(), max_steps=15, per_device_train_batch_size=32, per_device_eval_batch_size=256, learning_rate=4e-3,
        use_cpu=True, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    held_out = len(rows) // 5
    trainer = Trainer(
        model=make_model(),
        args=args,
        train_dataset=Messages(rows[held_out:], tokenizer),
        eval_dataset=Messages(rows[:held_out], tokenizer),
        compute_metrics=accuracy,
    )

    flare.patch(trainer)
    while flare.is_running():
        trainer.evaluate()
        trainer.train()


if __name__ == "__main__":
    main(sys.argv[1])
