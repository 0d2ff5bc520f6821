"""References record the statistics that clamps need."""

from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from toy_classifier import Classifier, loader, trainer, within_class_spread

from callbacks.activation_clamp import ActivationClamp
from callbacks.activation_reference import ActivationReference
from callbacks.moments import Moments
from datamodules.errors import UserError


def test_reference_records_the_last_pass_for_clamps(tmp_path):
    module = Classifier()
    trainer(tmp_path, ActivationReference("residual"), max_steps=4).fit(module, loader(), loader(batch_size=7))
    path = tmp_path / "reference.safetensors"
    passes = [x for stage, x in module.outputs if stage == "validate"]
    assert len(passes) == 8
    x = torch.cat(passes[4:])
    labels = torch.cat([batch["labels"] for batch in loader()])
    recorded = load_file(path)
    expected = {
        "residual.radius": x[labels != -100].double().norm(dim=-1).mean(),
        "residual.spread.target": within_class_spread(x, labels),
        "residual.spread.batch": within_class_spread(x, labels.clamp(max=0)),
    }
    assert recorded.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(recorded[key], value, rtol=1e-9, atol=0)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"site": "residual", "stage": "validate", "step": "4"}

    assert not module.residual._forward_hooks
    clamped = Classifier()
    trainer(tmp_path, ActivationClamp("residual", "naive", str(path))).test(clamped, loader(), verbose=False)
    torch.testing.assert_close(clamped.outputs[0][1].norm(dim=-1).mean().double(), expected["residual.radius"])


def test_reference_without_fitting_labels_takes_every_position(tmp_path):
    module = Classifier()
    path = tmp_path / "elsewhere" / "r.safetensors"
    trainer(tmp_path, ActivationReference("residual", str(path), labels="none")).test(module, loader(), verbose=False)
    recorded = load_file(path)
    assert recorded.keys() == {"residual.radius", "residual.spread.batch"}
    x = torch.cat([x for _, x in module.outputs])
    torch.testing.assert_close(recorded["residual.radius"], x.double().norm(dim=-1).mean())


def test_a_forward_between_steps_is_not_recorded(tmp_path):
    class Between(Classifier):
        def on_test_batch_end(self, *_):
            self(torch.zeros(2, 6, dtype=torch.long))

    paths = [tmp_path / "plain.safetensors", tmp_path / "between.safetensors"]
    for path, module in zip(paths, (Classifier(), Between()), strict=True):
        trainer(tmp_path, ActivationReference("residual", str(path))).test(module, loader(), verbose=False)
    plain, between = map(load_file, paths)
    assert plain.keys() == between.keys()
    assert all(torch.equal(plain[key], between[key]) for key in plain)


def test_one_batch_without_labels_leaves_no_spread_about_class_means():
    strategy = SimpleNamespace(reduce=lambda x, reduce_op: x)
    labelled = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])
    for batches in ([labelled, (torch.randn(4, 3), None)], [(torch.randn(4, 3), None), labelled]):
        moments = Moments(torch.device("cpu"))
        for batch in batches:
            moments.add(*batch)
        assert moments.compute(strategy).keys() == {"radius", "spread.batch"}


def test_reference_covers_both_processes(tmp_path):
    paths = [str(tmp_path / f"{n}.safetensors") for n in (1, 2)]
    strategy = "ddp_spawn" if torch.cuda.is_available() else "ddp_fork"
    for path, flags in zip(paths, [{}, {"devices": 2, "strategy": strategy}], strict=True):
        trainer(tmp_path, ActivationReference("residual", path), **flags).test(Classifier(), loader(4), verbose=False)
    one, two = map(load_file, paths)
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-6, atol=0)


def test_two_references_may_not_share_a_file(tmp_path):
    with pytest.raises(UserError, match="`path`"):
        trainer(tmp_path, ActivationReference("mix"), ActivationReference("residual")).test(Classifier(), loader())


def test_a_file_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    reference = ActivationReference("residual", str(tmp_path / "file" / "r.safetensors"))
    with pytest.raises(UserError, match=r"ActivationReference: `path` .* cannot be written"):
        trainer(tmp_path, reference).test(Classifier(), loader(), verbose=False)
