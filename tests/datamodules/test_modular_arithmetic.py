"""ModularArithmetic: answers, the split of the pairs, full batch, epochs, inputs, user errors."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from datamodules import ModularArithmetic
from datamodules.batch import IGNORE
from datamodules.sequence_task import collate

RIGHT = {
    "add": lambda a, b, c, p: (a + b - c) % p == 0,
    "sub": lambda a, b, c, p: (a - b - c) % p == 0,
    "mul": lambda a, b, c, p: (a * b - c) % p == 0,
    "div": lambda a, b, c, p: b > 0 and (c * b - a) % p == 0,
    "square_sum": lambda a, b, c, p: (a**2 + b**2 - c) % p == 0,
}


def attach(data, rank=0, world=1, **module):
    trainer = {"global_rank": rank, "world_size": world, "lightning_module": SimpleNamespace(**module)}
    data.trainer = SimpleNamespace(**trainer, overfit_batches=0, limit_train_batches=1.0)
    data.setup("fit")
    return data


def pairs(rows):
    return {(a, b) for a, b, _ in rows[:, 0].tolist()}


@pytest.mark.parametrize("op", RIGHT)
@pytest.mark.parametrize("p", [2, 13])
def test_every_pair_is_on_one_side_with_its_answer(op, p):
    data = ModularArithmetic(p=p, op=op, train_fraction=0.4)
    train, held_out = pairs(data.train_rows_P2T), pairs(data.held_out_rows_P2T)
    assert not train & held_out
    assert len(train) + len(held_out) == len(train | held_out) == (p * (p - 1) if op == "div" else p * p)
    assert len(train) == round(0.4 * len(train | held_out))
    for rows in (data.train_rows_P2T, data.held_out_rows_P2T):
        assert (rows[:, 1, :2] == IGNORE).all()
        for (a, b, equals), (_, _, c) in rows.tolist():
            assert equals == p
            assert 0 <= c < p
            assert RIGHT[op](a, b, c, p)
    assert (data.vocab_size, data.seq_len, data.ceiling) == (p + 1, 3, 1.0)
    answers = Counter(row[1, 2].item() for part in (data.train_rows_P2T, data.held_out_rows_P2T) for row in part)
    assert data.chance == max(answers.values()) / answers.total()
    assert data.chance == 1 / p or op in ("mul", "square_sum")


def test_the_split_belongs_to_the_task_and_not_to_the_seed():
    one, same, other = (ModularArithmetic(seed=seed, task_seed=task) for seed, task in ((0, 0), (1, 0), (0, 1)))
    assert len(one.train_rows_P2T) == 3831
    assert (one.train_rows_P2T == same.train_rows_P2T).all()
    assert pairs(one.train_rows_P2T) != pairs(other.train_rows_P2T)


@pytest.mark.parametrize("ensemble", [1, 3])
def test_in_full_batch_every_step_is_all_pairs_made_once_and_shared(ensemble):
    loader = attach(ModularArithmetic(p=13), ensemble=ensemble).train_dataloader()
    assert len(loader) == 1000
    first, second, *_ = loader
    assert first["tokens"].shape == first["labels"].shape == (51, 3)
    for key in ("tokens", "labels"):
        assert first[key].data_ptr() == second[key].data_ptr()
        assert first[key].is_contiguous()
    shares = [attach(ModularArithmetic(p=13), rank, 2).train_dataloader() for rank in range(2)]
    tokens = torch.cat([next(iter(share))["tokens"] for share in shares])
    assert sorted(tokens.tolist()) == sorted(first["tokens"].tolist())


def test_mini_batches_pass_over_the_pairs_in_orders_of_their_own():
    data = attach(ModularArithmetic(p=13, batch_size=25, seed=2), ensemble=2)  # 51 pairs: two batches a pass
    batches = data.train_dataloader().dataset.batches
    assert len(batches) == 1000
    orders = []
    for epoch, first in ((0, 0), (0, 2), (0, 998), (1, 0)):
        tokens = torch.cat([collate(batches.batch(epoch, first + i))["tokens"] for i in range(2)], dim=1)
        orders += tokens.tolist()
    for order in orders:
        assert len(order) == len({tuple(row) for row in order}) == 50
        assert {tuple(row[:2]) for row in order} <= pairs(data.train_rows_P2T)
    assert all(orders[i] != orders[j] for i in range(len(orders)) for j in range(i))


def test_held_out_sets():
    data = attach(ModularArithmetic(p=13, validation_size=20, eval_batch_size=50))
    tests = [tuple(row) for batch in data.test_dataloader() for row in batch["tokens"].tolist()]
    assert {row[:2] for row in tests} == pairs(data.held_out_rows_P2T)
    assert [tuple(row) for batch in data.val_dataloader() for row in batch["tokens"].tolist()] == tests[:20]
    everything = attach(ModularArithmetic(p=13))
    assert sum(len(batch["tokens"]) for batch in everything.val_dataloader()) == len(tests)


def test_inputs():
    data = attach(ModularArithmetic(op="sub", inputs=["3 - 5", "3 5", " 5-3 ="]))
    (batch,) = data.predict_dataloader()
    assert batch["tokens"].tolist() == [[3, 5, 113], [3, 5, 113], [5, 3, 113]]
    assert batch["labels"][:, 2].tolist() == [111, 111, 2]
    assert data.decode([3, 5, 113, 111]) == "3 5 = 111"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("35", "is not of the form '3 / 5'"),
        ("3 + 5", "is not of the form"),
        ("-3 / 5", "is not of the form"),
        ("113 / 5", r"not below data.p \(113\)"),
        (5000 * "1" + " / 5", r"not below data.p \(113\)"),
        ("3 / 0", "divides by zero"),
    ],
)
def test_inputs_that_do_not_fit_the_task(text, reason):
    with pytest.raises(ValueError, match=rf"data.inputs: '{text.replace('+', '[+]')}' .*{reason}"):
        attach(ModularArithmetic(op="div", inputs=[text])).predict_dataloader()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"p": 1}, "data.p must be at least 2"),
        ({"p": 12, "op": "div"}, "data.p must be prime for data.op 'div', and 12 is not"),
        ({"train_fraction": 0.0}, "data.train_fraction 0.0 leaves no pair"),
        ({"train_fraction": 1.0}, "data.train_fraction 1.0 leaves no pair"),
        ({"batch_size": 0}, "data.batch_size must be at least 1"),
        ({"batch_size": 3832}, r"data.batch_size \(3832\) is more than the 3831 training pairs"),
        ({"validation_size": 8939}, r"data.validation_size \(8939\) is more than the 8938 held-out pairs"),
        ({"num_workers": 5}, "data.num_workers"),
    ],
)
def test_user_errors(options, reason):
    with pytest.raises(ValueError, match=reason):
        ModularArithmetic(**options)


def test_a_composite_modulus_is_fine_where_nothing_is_divided():
    assert ModularArithmetic(p=12, op="mul").vocab_size == 13


def test_a_batch_of_all_devices_that_is_too_large():
    with pytest.raises(ValueError, match=r"a batch of all devices \(60\) is more than the 51 training pairs"):
        attach(ModularArithmetic(p=13, batch_size=30), 0, 2).train_dataloader()


def test_a_warning_for_workers_without_work():
    with pytest.warns(UserWarning, match="data.num_workers is ignored in full batch"):
        assert ModularArithmetic(num_workers=2).num_workers == 0


def test_overfitting_repeats_the_first_batches():
    data = attach(ModularArithmetic(p=13, batch_size=12, seed=0), ensemble=1)
    data.trainer.overfit_batches = 2
    share = data.train_dataloader().numbers.share
    assert all(torch.equal(collate(share[(0, n)])["tokens"], collate(share[(5, n)])["tokens"]) for n in (0, 1))
    assert not torch.equal(collate(share[(0, 0)])["tokens"], collate(share[(0, 1)])["tokens"])
