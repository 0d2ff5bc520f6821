"""A classifier of the positions of fixed sequences, with sites to clamp and to record."""

import torch
from conftest import QUIET
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

N_CLASSES = 5


class Sequences(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        tokens = torch.randint(7, (6,), generator=generator)
        return {"tokens": tokens, "labels": (tokens % N_CLASSES).where(torch.arange(6) > 1, -100)}


class Pair(nn.Module):
    """Returns a tuple, like attention with a cache."""

    def forward(self, x):
        return x, "cache"


class Classifier(LightningModule):
    def __init__(self, checkpointed=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 8)
        self.mix = nn.Linear(8, 8)
        self.residual = nn.Identity()
        self.pair = Pair()
        self.final_norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, N_CLASSES)
        self.checkpointed = checkpointed
        self.outputs = []  # (stage, output of the sites after all hooks)
        self.inputs = []  # the same without hooks

    def body(self, x):
        return self.residual(self.mix(x))

    def forward(self, tokens):
        x = self.embed(tokens)
        x = checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)
        self.inputs.append(self.mix(self.embed(tokens)).detach())
        x, _ = self.pair(x)
        self.outputs.append((self.trainer.state.stage.value, x.detach()))
        return self.head(self.final_norm(x))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch["tokens"]).flatten(0, 1), batch["labels"].flatten())

    validation_step = test_step = training_step

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def loader(batch_size=12):
    return DataLoader(Sequences(), batch_size=batch_size)


def trainer(tmp_path, *callbacks, **flags):
    flags = {"max_steps": 3, "num_sanity_val_steps": 0, "strategy": "auto", "devices": 1} | flags
    return Trainer(accelerator="cpu", callbacks=list(callbacks), default_root_dir=tmp_path, **QUIET | flags)


def within_class_spread(x, labels):
    """Return s of the formula in `clamp_spread`, by a loop over the classes in fp64."""
    x, labels = x[labels != -100].double(), labels[labels != -100]
    squares = sum(((x[labels == c] - x[labels == c].mean(0)) ** 2).sum() for c in labels.unique())
    return (squares / (len(labels) - len(labels.unique()))).sqrt()
