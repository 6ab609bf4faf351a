"""Four sites learn together which text messages are spam, and send only the adapters of their transformer.

The messages are sms_spam.tsv, looked for in $HANSE_DATA, or else in ../shared/data beside the repository. The first of them are the
server's own: it makes the tokenizer from these, and sends it with the job.
"""

import os
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from train import OWN, WORDS, make_model, messages

from hanse import FedAvgRecipe, SimEnv
from hanse.adapters.transformers import params_of


def make_tokenizer(texts):
    """The most frequent words of some texts, and digits one by one."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)])
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=WORDS, special_tokens=["[PAD]", "[UNK]", "[CLS]"]))
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    return tokenizer


def make_recipe(data):
    return FedAvgRecipe(
        name="spam",
        script=Path(__file__).parent / "train.py",
        argv=[str(data)],
        config={"tokenizer": make_tokenizer([text for _, text in messages(data)[:OWN]]).to_str()},
        model=params_of(make_model()),
        rounds=4,
        best="max eval_accuracy",
    )


if __name__ == "__main__":
    folder = os.environ.get("HANSE_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data"
    data = Path(folder, "sms_spam.tsv").resolve()
    if not data.is_file():
        sys.exit(f"There is no {data}; HANSE_DATA names another folder.")
    travels, whole = (
        sum(tensor.numel() for tensor in tensors) for tensors in (params_of(make_model()).values(), make_model().parameters())
    )
    print(f"{travels:,} of {whole:,} parameters travel.\n")
    make_recipe(data).execute(SimEnv(num_clients=4))
