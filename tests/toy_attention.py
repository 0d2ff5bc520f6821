"""A network with queries, keys and token embeddings to swap, for one ensemble member or several."""

import copy

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.func import functional_call, vmap
from torch.utils.data import Dataset

V, D, K = 11, 6, 4
QK = ["*.attn.q_proj.*", "*.attn.k_proj.*"]
SWAPPED = [f"network.attn.{which}.{leaf}" for which in ("q_proj", "k_proj") for leaf in ("weight", "bias")]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(D, K), nn.Linear(D, K), nn.Linear(D, D)

    def forward(self, x):
        return ((self.q_proj(x) @ self.k_proj(x).mT) * 2).softmax(-1) @ self.v_proj(x)


class Network(nn.Module):
    """Has no norm, so a rotation of the residual stream changes no output."""

    def __init__(self):
        super().__init__()
        self.token_embedding = nn.Embedding(V, D)
        self.attn = Attention()
        self.unembed = nn.Linear(D, V, bias=False)

    def forward(self, tokens):
        x = self.token_embedding(tokens)
        return self.unembed(x + self.attn(x))


class Model(LightningModule):
    def __init__(self, seed=0, members=1):
        super().__init__()
        torch.manual_seed(seed)
        self.ensemble = members
        self.network = Network()
        if members > 1:
            for name, p in list(self.network.named_parameters()):
                owner, _, leaf = name.rpartition(".")
                setattr(self.network.get_submodule(owner), leaf, nn.Parameter(torch.randn(members, *p.shape)))
        self.outputs = []

    def forward(self, tokens):
        if self.ensemble == 1:
            return self.network(tokens)
        return vmap(lambda p: functional_call(self.network, p, (tokens,)))(dict(self.network.named_parameters()))

    def test_step(self, batch, batch_idx):
        self.outputs.append(self(batch["tokens"]).detach())

    validation_step = predict_step = training_step = test_step

    def configure_optimizers(self):
        return None


class Failing(Model):
    def test_step(self, batch, batch_idx):
        raise RuntimeError("lost")

    validation_step = predict_step = test_step


class Sequences(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return {"tokens": torch.randint(V, (5,), generator=torch.Generator().manual_seed(i))}


TOKENS = torch.stack([Sequences()[i]["tokens"] for i in range(4)])


def state_of(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_equal(state, other):
    assert state.keys() == other.keys()
    for name in state:
        assert torch.equal(state[name], other[name]), name


def orthogonal(*shape, seed=0):
    return torch.linalg.qr(torch.randn(*shape, D, D, generator=torch.Generator().manual_seed(seed)))[0]


def rotated(module, rotation):
    """Return a model of the same function whose residual stream is that of `module` times the rotation."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if name.endswith("v_proj.weight"):
                p.copy_(rotation.mT @ p @ rotation)
            elif name.endswith("v_proj.bias"):
                p.copy_((p[..., None, :] @ rotation).squeeze(-2))
            elif p.ndim - (module.ensemble > 1) == 2:
                p.copy_(p @ rotation)
    return other
