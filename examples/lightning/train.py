"""Handwritten digits with Lightning: an ordinary script, and four lines that make it speak for a site."""

import logging
import warnings

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hanse.adapters.lightning as flare


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch, _):
        x, y = batch
        return nn.functional.cross_entropy(self.layers(x), y)

    def validation_step(self, batch, _):
        x, y = batch
        self.log("accuracy", (self.layers(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def loaders(rank, count):
    """A site's own pictures: four fifths to learn from, the others to validate."""
    x, y = load_digits(return_X_y=True)
    own = TensorDataset(torch.tensor(x[rank::count] / 16, dtype=torch.float32), torch.tensor(y[rank::count]))
    seen, unseen = torch.utils.data.random_split(own, [0.8, 0.2], torch.Generator().manual_seed(0))
    return DataLoader(seen, batch_size=32, shuffle=True), DataLoader(unseen, batch_size=1000)


def main():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    model = Digits()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", devices=1, **quiet)

    flare.patch(trainer)
    info = flare.system_info()
    train, validation = loaders(info["rank"], info["count"])
    while flare.is_running():
        trainer.validate(model, validation, verbose=False)
        trainer.fit(model, train)


if __name__ == "__main__":
    main()
