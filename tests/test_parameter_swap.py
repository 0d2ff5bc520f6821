"""A swap puts in exactly what it says, and takes it out again bit for bit."""

import copy

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.func import functional_call, vmap
from torch.utils.data import DataLoader, Dataset

from callbacks.parameter_swap import ParameterSwap, procrustes, swap_parameters

QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
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
    """No norm, so that turning the residual stream changes no output."""

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


def turned(module, rotation):
    """A model of the same function whose residual stream is that of `module` times the rotation."""
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


# The function


@pytest.mark.parametrize("members", [1, 3])
def test_copy_is_the_donors_inside_and_the_own_after(members):
    own, donor = Model(0, members), Model(1, members)
    before, donated = state_of(own), state_of(donor)
    with swap_parameters(own, donated, QK) as names:
        assert names == SWAPPED
        assert_equal(state_of(own), before | {name: donated[name] for name in names})
    assert_equal(state_of(own), before)


@pytest.mark.parametrize("members", [1, 3])
def test_self_swap_changes_no_bit(members):
    module = Model(0, members)
    before, logits = state_of(module), module(TOKENS)
    with swap_parameters(module, before, QK):
        assert_equal(state_of(module), before)
        assert torch.equal(module(TOKENS), logits)


def test_a_donor_without_members_is_given_to_all():
    own, donor = Model(0, 3), Model(1)
    with swap_parameters(own, donor.state_dict(), QK):
        for name in SWAPPED:
            assert all(torch.equal(member, donor.get_parameter(name)) for member in own.get_parameter(name))


def test_own_parameters_come_back_after_an_error():
    own = Model(0)
    before = state_of(own)

    def fail():
        with swap_parameters(own, Model(1).state_dict(), QK):
            raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        fail()
    assert_equal(state_of(own), before)


def test_the_rotation_is_found():
    donor_VD, rotation_DD = torch.randn(50, D), orthogonal(seed=3)
    found_DD = procrustes(donor_VD, donor_VD @ rotation_DD)
    torch.testing.assert_close(found_DD.float(), rotation_DD, rtol=0, atol=1e-5)
    # Of two unrelated sets of embeddings it is orthogonal, and no other rotation brings them closer.
    own_VD = torch.randn(50, D)
    found_DD = procrustes(donor_VD, own_VD).float()
    torch.testing.assert_close(found_DD @ found_DD.T, torch.eye(D), rtol=0, atol=1e-5)
    best = (donor_VD @ found_DD - own_VD).norm()
    assert all((donor_VD @ orthogonal(seed=seed) - own_VD).norm() > best for seed in range(20))


def test_directions_without_embeddings_stay():
    rows_VD = torch.randn(2, D - 2, D)
    torch.testing.assert_close(procrustes(rows_VD, rows_VD).float(), torch.eye(D).expand(2, D, D), rtol=0, atol=1e-5)
    rotation_DD = procrustes(rows_VD[0], rows_VD[1]).float()
    torch.testing.assert_close(rotation_DD @ rotation_DD.T, torch.eye(D), rtol=0, atol=1e-5)
    module = nn.Module()
    module.embedding, module.q = nn.Parameter(rows_VD[0]), nn.Parameter(torch.randn(K, D))
    swap = swap_parameters(module, module.state_dict(), "q", "procrustes", "embedding")
    with pytest.warns(UserWarning, match="'embedding' has 4 rows, which leave 2 directions of the stream unal"), swap:
        pass


@pytest.mark.parametrize("members", [1, 3])
def test_parameters_of_a_turned_copy_fit_after_procrustes(members):
    own = Model(0, members)
    rotation = orthogonal(*[members] * (members > 1))
    donor = turned(own, rotation)
    logits = own(TOKENS)
    torch.testing.assert_close(donor(TOKENS), logits, rtol=1e-4, atol=1e-4)  # it is the same function
    with swap_parameters(own, donor.state_dict(), QK):
        assert (own(TOKENS) - logits).abs().max() > 0.1
    with swap_parameters(own, donor.state_dict(), QK, "procrustes"):
        torch.testing.assert_close(own(TOKENS), logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state_of(own)[SWAPPED[1]], donor.state_dict()[SWAPPED[1]], rtol=0, atol=0)


def test_procrustes_of_one_donor_turns_it_into_the_basis_of_each_member():
    single, rotation = Model(0), orthogonal(3)
    own = Model(1, 3)
    with torch.no_grad():
        for name, p in own.named_parameters():
            p.copy_(turned(single, rotation[0]).get_parameter(name))
            for member in range(3):
                p[member] = turned(single, rotation[member]).get_parameter(name)
    with swap_parameters(own, single.state_dict(), QK, "procrustes"):
        torch.testing.assert_close(own(TOKENS), single(TOKENS).expand(3, -1, -1, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("members", [1, 2])
def test_random_has_mean_and_deviation_of_the_own(members):
    module = nn.Module()
    module.ensemble = members
    module.q = nn.Parameter(torch.randn(members, 100, 100) * 0.1 + 3 if members > 1 else torch.randn(100, 100) + 3)
    with torch.no_grad():
        module.q[-1] *= 5
    own = module.q.detach().clone()
    with swap_parameters(module, None, "q", "random"):
        first = module.q.detach().clone()
    with swap_parameters(module, None, "q", "random"):
        assert torch.equal(module.q, first)
    with swap_parameters(module, None, "q", "random", seed=1):
        assert not torch.equal(module.q, first)
    for drawn, kept in zip(first.view(members, -1), own.view(members, -1), strict=True):
        torch.testing.assert_close(drawn.std(), kept.std(), rtol=0.05, atol=0)
        torch.testing.assert_close(drawn.mean(), kept.mean(), rtol=0.05, atol=0)
        assert torch.corrcoef(torch.stack([drawn, kept]))[0, 1].abs() < 0.05
    assert torch.equal(module.q, own)


def test_what_does_not_fit_is_told_and_changes_nothing():
    own, donated = Model(0), state_of(Model(1))
    before = state_of(own)
    unfitting = {
        "has no parameter 'network.attn.k_proj.bias'; the nearest names are: 'network.attn.": {
            name: value for name, value in donated.items() if "k_proj.bias" not in name
        },
        r"'network.attn.q_proj.weight' does not fit: its shape is \(4, 5\), the model's \(4, 6\)": donated
        | {SWAPPED[0]: torch.zeros(K, D - 1)},
        r"its shape is \(6,\), the model's \(4, 6\)": donated | {SWAPPED[0]: torch.zeros(D)},
    }
    for message, state in unfitting.items():
        with pytest.raises(ValueError, match=message), swap_parameters(own, state, QK):
            pass
    with pytest.raises(ValueError, match="No parameter matches 'qq'"), swap_parameters(own, donated, "qq"):
        pass
    narrow = Model(0)
    narrow.network.attn.q_proj = nn.Linear(D + 1, K)
    swap = swap_parameters(narrow, state_of(narrow), QK, "procrustes")
    with pytest.raises(ValueError, match=r"of shape \(4, 7\) does not read from a residual stream of 6"), swap:
        pass
    for basis in ("*.attn.*.weight", "*.q_proj.bias"):
        swap = swap_parameters(own, donated, QK, "procrustes", basis)
        with pytest.raises(ValueError, match=r"`basis` must be one matrix of token embeddings \[V, D\]"), swap:
            pass
    assert_equal(state_of(own), before)


# The callback


def trainer_of(tmp_path, *callbacks, **flags):
    return Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=list(callbacks), **QUIET | flags)


def checkpoint(module, path):
    torch.save({"state_dict": module.state_dict(), "pytorch-lightning_version": "2.0.0"}, path)
    return str(path)


def loader():
    return DataLoader(Sequences(), batch_size=4)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("members", [1, 2])
def test_stages_evaluate_the_restored_model_with_the_donors_parameters(stage, members, tmp_path):
    own, donor = Model(0, members), Model(1, members)
    path, donor_path = checkpoint(own, tmp_path / "own.ckpt"), checkpoint(donor, tmp_path / "donor.ckpt")
    with swap_parameters(own, donor.state_dict(), QK):
        expected = own(TOKENS)
    restored = Model(7, members)  # Lightning gives it the parameters of `own`, after the callback's setup
    trainer = trainer_of(tmp_path, ParameterSwap(donor_path))
    quiet = {} if stage == "predict" else {"verbose": False}
    getattr(trainer, stage)(restored, loader(), ckpt_path=path, weights_only=True, **quiet)
    assert torch.equal(restored.outputs[0], expected)
    assert_equal(state_of(restored), state_of(own))


def test_self_swap_of_a_checkpoint_changes_no_bit(tmp_path):
    own, plain = Model(0), Model(0)
    path = checkpoint(own, tmp_path / "own.ckpt")
    trainer_of(tmp_path, ParameterSwap(path, parameters=["*"])).test(own, loader(), verbose=False)
    trainer_of(tmp_path).test(plain, loader(), verbose=False)
    assert torch.equal(own.outputs[0], plain.outputs[0])


def test_random_and_procrustes_reach_the_model(tmp_path):
    own, donor = Model(0), Model(1)
    path = checkpoint(donor, tmp_path / "donor.ckpt")
    swaps = {"random": ParameterSwap(mode="random", seed=4), "procrustes": ParameterSwap(path, mode="procrustes")}
    for mode, callback in swaps.items():
        with swap_parameters(own, donor.state_dict(), QK, mode, seed=4):
            expected = own(TOKENS)
        own.outputs = []
        trainer_of(tmp_path, callback).test(own, loader(), verbose=False)
        assert torch.equal(own.outputs[0], expected)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_own_parameters_come_back_when_the_evaluation_fails(stage, tmp_path):
    module = Failing(0)
    before = state_of(module)
    callback = ParameterSwap(checkpoint(Model(1), tmp_path / "donor.ckpt"))
    with pytest.raises(RuntimeError, match="lost"):
        getattr(trainer_of(tmp_path, callback), stage)(module, loader())
    assert_equal(state_of(module), before)


def test_mistakes_are_told(tmp_path):
    path = checkpoint(Model(1), tmp_path / "donor.ckpt")

    def run_test(*args, **options):
        trainer_of(tmp_path, ParameterSwap(*args, **options)).test(Model(0), loader(), verbose=False)

    with pytest.raises(ValueError, match="acts on validate, test and predict"):
        trainer_of(tmp_path, ParameterSwap(path)).fit(Model(0), loader())
    with pytest.raises(ValueError, match=r"\(mode='copy'\) needs `donor`"):
        ParameterSwap()
    with pytest.warns(UserWarning, match=r"\(mode='random'\) ignores `donor`"):
        ParameterSwap(path, mode="random")
    with pytest.raises(
        FileNotFoundError, match=r"^ParameterSwap's donor: there is no file .*did you mean .*donor.ckpt"
    ):
        run_test(str(tmp_path / "doner.ckpt"))
    with pytest.raises(ValueError, match="is not one checkpoint file"):
        run_test(str(tmp_path))
    with pytest.raises(ValueError, match="No parameter matches 'q_porj'; the nearest names are"):
        run_test(path, ["q_porj"])
    torch.save({"weights": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="is no checkpoint of a run, it has no 'state_dict'"):
        run_test(str(tmp_path / "other.ckpt"))
    (tmp_path / "damaged.ckpt").write_bytes((tmp_path / "donor.ckpt").read_bytes()[:2000])
    with pytest.raises(
        ValueError, match=r"^ParameterSwap's donor: .*damaged.ckpt is damaged .*; the newest intact one"
    ):
        run_test(str(tmp_path / "damaged.ckpt"))
