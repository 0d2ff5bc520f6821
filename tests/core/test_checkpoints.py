"""Checkpoints are read once for their checksums, in place for their values, and refused where these are not finite."""

import os
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from datamodules.errors import UserError
from lightning_modules.core import archive
from lightning_modules.core.archive import is_intact
from lightning_modules.core.checkpoints import check_finite, read_checkpoint, read_state
from lightning_modules.core.ensemble import fit_state
from lightning_modules.separability import Orthogonality, Separability

SIZES = {"vocab_size": 11, "seq_len": 6, "width": 8, "heads": 2}


@pytest.fixture
def path(tmp_path) -> str:
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"a": torch.arange(4.0), "b": torch.ones(2, 3)}}, file)
    return str(file)


def test_the_values_are_those_that_were_saved(path):
    state = read_state(path, "model.start")
    assert torch.equal(state["a"], torch.arange(4.0))
    assert torch.equal(state["b"], torch.ones(2, 3))


def test_the_checksums_of_a_file_are_compared_once_until_it_changes(path, monkeypatch):
    compared = []
    real = zipfile.ZipFile.testzip
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda self: compared.append(1) or real(self))
    for _ in range(3):
        read_checkpoint(path, "model.start")
    assert len(compared) == 1
    content = bytearray(Path(path).read_bytes())
    content[content.index(torch.ones(2, 3).numpy().tobytes())] ^= 1
    Path(path).write_bytes(content)
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match=r"^model.start: .*model.ckpt is damaged"):
        read_checkpoint(path, "model.start")


def test_every_truncation_is_seen(path):
    content = Path(path).read_bytes()
    assert is_intact(Path(path))
    for length in range(0, len(content), 7):
        Path(path).write_bytes(content[:length])
        assert not is_intact(Path(path)), length


def test_every_flipped_byte_of_a_value_or_of_the_pickle_is_seen(path):
    content = Path(path).read_bytes()
    with zipfile.ZipFile(path) as whole:
        members = [member for member in whole.infolist() if "/data" in member.filename]
        starts = {content.index(whole.read(member)): member.file_size for member in members}
    assert len(starts) == 3
    for start, size in starts.items():
        for place in range(start, start + size, 5):
            Path(path).write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
            assert not is_intact(Path(path)), place


def test_a_damaged_file_names_the_newest_intact_one_beside_it(path):
    folder = Path(path).parent
    for age, name in enumerate(["old", "new", "damaged"]):
        file = folder / f"{name}.ckpt"
        file.write_bytes(Path(path).read_bytes() if name != "damaged" else b"PK")
        os.utime(file, (1000 + age, 1000 + age))
    Path(path).write_bytes(Path(path).read_bytes()[:-30])
    os.mkfifo(folder / "pipe.ckpt")
    with pytest.raises(UserError, match=r"not written to its end; the newest intact one beside it is .*new\.ckpt"):
        read_checkpoint(path, "--ckpt_path")


def test_pipes_and_folders_are_not_intact(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert not is_intact(tmp_path / "pipe")
    assert not is_intact(tmp_path)
    assert not is_intact(tmp_path / "nothing")


def finite(state: dict, ensemble: int | None = None, key: str = "state_dict") -> bool:
    config = {} if ensemble is None else {"config": {"model": {"init_args": {"ensemble": ensemble}}}}
    try:
        check_finite({"state_dict": {}, key: state} | config, "--ckpt_path", "x.ckpt")
    except UserError:
        return False
    return True


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_one_value_that_is_not_finite_is_found(bad, dtype, monkeypatch):
    import lightning_modules.core.checkpoints as module

    monkeypatch.setattr(module, "CHUNK", 4)
    good = torch.linspace(0.5, 1, 11)
    assert finite({"w": good.to(dtype)})
    for place in range(11):
        value = good.clone()
        value[place] = bad
        assert not finite({"w": value.to(dtype)}), place
        assert not finite({"w": value.to(dtype)}, key="current_model_state"), place


def test_masks_and_whole_numbers_are_no_weights():
    mask = torch.full((3, 3), -torch.inf).triu(1)
    assert finite({"mask": mask, "count": torch.tensor(3), "extra_state": torch.tensor(True)})


def test_a_value_that_is_expanded_to_a_huge_shape_takes_no_memory():
    assert finite({"w": torch.ones(1).expand(2**50)})
    assert not finite({"w": torch.full((1,), torch.nan).expand(2**50)})


def test_an_ensemble_is_refused_when_every_member_has_diverged():
    first, second = torch.ones(2, 3), torch.ones(2, 3)
    first[0, 1] = torch.nan
    assert finite({"a": first, "b": second}, ensemble=2)
    assert not finite({"a": first, "b": second})
    second[1, 2] = torch.inf
    assert not finite({"a": first, "b": second}, ensemble=2)


def test_an_anchor_that_is_not_finite_is_refused(tmp_path):
    network = Separability(**SIZES).network
    state = {f"network.{name}": value for name, value in network.state_dict().items()}
    state["network.unembed.weight"] = state["network.unembed.weight"] / 0
    torch.save({"state_dict": state}, tmp_path / "anchor.ckpt")
    with pytest.raises(UserError, match=r"^model.orthogonality.anchor: the weights in .*anchor.ckpt have diverged"):
        Orthogonality(str(tmp_path / "anchor.ckpt")).load(network, 1)


def test_code_is_not_run(tmp_path):
    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": {"a": Runs()}}, tmp_path / "code.ckpt")
    for option, advice in (("--ckpt_path", "add --weights_only false"), ("model.start", "may run code")):
        with pytest.raises(UserError, match=f"^{option}: .*{advice}$"):
            archive.read_archive(str(tmp_path / "code.ckpt"), option)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_values_of_one_tied_parameter_must_agree(tied: bool):
    embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    target = nn.ModuleDict({"embedding": embedding, "head": head}).state_dict()
    state = {"embedding.weight": torch.ones(5, 3), "head.weight": torch.ones(5, 3) if tied else torch.zeros(5, 3)}
    if tied:
        state["embedding.weight"][0] = state["head.weight"][0] = torch.nan  # of a member that diverged
        assert fit_state(state, target, 1, "file").keys() == state.keys()
    else:
        with pytest.raises(UserError, match=r"embedding.weight and head.weight are one parameter in the model"):
            fit_state(state, target, 1, "file")
