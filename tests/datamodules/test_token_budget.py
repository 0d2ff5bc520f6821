"""Batches within a number of tokens: their bounds on every rank, their order, user errors, and runs that resume."""

from itertools import chain, pairwise
from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import WordProblems
from datamodules.batches import POOL, FiniteBatches
from datamodules.loader import BatchLoader
from datamodules.token_budget import Budget, BudgetedBatches, BudgetedStream

BUDGET = Budget(tokens=1000, rows=40)


def length(sample: int) -> int:
    """Return 8 to 199, most of them below 60, as lengths of texts are."""
    spread = sample * 2654435761 % 2**32 / 2**32
    return int(8 + 191 * spread**3)


def lengths(samples: list[int]) -> list[int]:
    return [length(sample) for sample in samples]


def finite(count: int, world: int = 1, budget: Budget = BUDGET, seed: int = 0) -> BudgetedBatches[int]:
    return BudgetedBatches(range(count), lengths, budget, world, seed)


def stream(epoch: int = 2000, world: int = 1, budget: Budget = BUDGET) -> BudgetedStream[int]:
    return BudgetedStream(lambda index: index, epoch, lengths, budget, world)


def check_shares(batch: list[int], world: int, budget: Budget) -> None:
    shares = [batch[rank::world] for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    for share in shares:
        assert 0 < len(share) <= budget.rows
        assert len(share) * max(lengths(share)) <= budget.tokens


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [8, 100, 1001])
@pytest.mark.parametrize("budget", [BUDGET, Budget(199, 1000), Budget(5000, 3), Budget(10**6, 10**6)])
def test_a_fixed_set_within_the_budget(count, world, budget):
    batches = finite(count, world, budget)
    epochs = [[batches.batch(epoch, number) for number in range(len(batches))] for epoch in range(3)]
    for epoch in epochs:
        seen = list(chain(*epoch))
        assert len(set(seen)) == len(seen) == count // world * world
        for batch in epoch:
            check_shares(batch, world, budget)
        assert min(map(len, epoch)) == batches.smallest
    again, other = finite(count, world, budget), finite(count, world, budget, seed=1)
    assert epochs[2] == [again.batch(2, number) for number in range(len(batches))]
    if count > 8 and len(batches) > 1:
        assert epochs[0] != epochs[1]
        assert epochs[0] != [other.batch(0, number) for number in range(len(batches))]


def test_samples_meet_other_samples_in_each_epoch():
    batches = finite(1000)
    partners = [{} for _ in range(2)]
    for epoch, met in enumerate(partners):
        for number in range(len(batches)):
            batch = batches.batch(epoch, number)
            met.update({sample: {*batch} for sample in batch})
    # Of 20 to 40 partners in one epoch, few are those of the other
    shared = [len(partners[0][i] & partners[1][i]) / len(partners[0][i]) for i in range(1000)]
    assert sum(shared) / 1000 < 0.5


def test_no_small_batch_is_left_over():
    for count in range(300, 340):
        batches = finite(count)
        shares = [batches.batch(0, number) for number in range(len(batches))]
        filled = [max(len(batch) / BUDGET.rows, len(batch) * max(lengths(batch)) / 1000) for batch in shares]
        assert min(filled) > 0.6, count


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("budget", [BUDGET, Budget(199, 1000), Budget(5000, 3)])
def test_a_stream_within_the_budget(world, budget):
    batches = stream(world=world, budget=budget)
    seen = []
    for number in range(2 * POOL * 8):  # two blocks of lanes
        batch = batches.batch(0, number)
        check_shares(batch, world, budget)
        seen += batch
    assert len(set(seen)) == len(seen)
    assert [batches.batch(3, 5), batches.batch(0, 1)] == [
        stream(world=world, budget=budget).batch(*key) for key in ((3, 5), (0, 1))
    ]


def test_an_epoch_of_a_stream_has_about_its_samples():
    batches = stream(20_000)
    sizes = [len(batches.batch(0, number)) for number in range(len(batches))]
    assert sum(sizes) == pytest.approx(20_000, rel=0.05)
    assert len(stream(20_000, world=2)) == pytest.approx(len(batches) / 2, rel=0.05)
    following = {sample for number in range(50) for sample in batches.batch(1, number)}
    assert not following & {sample for number in range(len(batches)) for sample in batches.batch(0, number)}


def test_batches_are_full_and_hold_little_padding():
    def padded(batches) -> tuple[list[int], float]:
        rows = [lengths(batches.batch(0, number)) for number in range(len(batches))]
        positions = [len(row) * max(row) for row in rows]
        return positions, 1 - sum(map(sum, rows)) / sum(positions)

    budget = Budget(1000, 10**6)
    for batches in (finite(5000, budget=budget), stream(5000, budget=budget)):
        positions, padding = padded(batches)
        assert padding < 0.1
        assert sum(positions) / len(positions) > 0.87 * 1000
        assert max(positions) / min(positions) < 2
    # With as many rows in each batch, its size is that of its lengths
    positions, _ = padded(FiniteBatches(range(5000), 18, length, seed=0, drop_last=True))
    assert max(positions) / min(positions) > 10


def test_bounds_of_batches():
    assert Budget(10, 4).cut([1, 1, 1, 1, 2, 5, 5, 10]) == [0, 1, 5, 7, 8]
    assert Budget(10, 4).cut([]) == [0]
    assert Budget(100, 4).cut_evenly([5] * 9) == [0, 3, 6, 9]
    assert Budget(35, 100).cut_evenly([10] * 4) == [0, 2, 4]
    for budget in (Budget(60, 9), Budget(500, 7)):
        for count in range(1, 60):
            rows = sorted(length(i) // 4 for i in range(count))
            bounds = budget.cut_evenly(rows)
            assert len(bounds) == len(budget.cut(rows))
            assert all(0 < end - start <= budget.rows for start, end in pairwise(bounds))
            assert all((end - start) * rows[end - 1] <= budget.tokens for start, end in pairwise(bounds))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_gives_exactly_the_remaining_batches(workers):
    def make(num_workers: int) -> BatchLoader:
        options = {"num_workers": num_workers} | ({"multiprocessing_context": "fork"} if num_workers else {})
        return BatchLoader(stream(900), list, **options)

    whole = list(make(0))
    first = make(workers)
    iterator = iter(first)
    head = [next(iterator) for _ in range(11)]
    second = make(workers)
    second.load_state_dict(first.state_dict())
    assert head + list(second) == whole


class Tiny(LightningModule):
    """Predicts a sum of bytes, and records its losses and the sizes of its batches."""

    def __init__(self):
        super().__init__()
        self.layer, self.losses, self.sizes = torch.nn.Linear(8, 1), [], []

    def lengths(self, problems):
        return [len(problem.question) for problem in problems]

    def collate(self, problems, training):
        features = torch.tensor([[*problem.question.encode()[:8].ljust(8)] for problem in problems]) / 128
        return {"features": features, "lengths": self.lengths(problems)}

    def training_step(self, batch, batch_idx):
        loss = (self.layer(batch["features"]) - batch["features"].sum(1, keepdim=True)).square().mean()
        self.losses.append(loss.item())
        self.sizes.append(batch["lengths"])
        return loss

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def file_of(path, count: int) -> str:
    rows = [f'{{"question": "{"Very " * (i % 7)}small {i}?", "answer": "It is {i}.\\n#### {i}"}}' for i in range(count)]
    path.write_text("\n".join(rows))
    return str(path)


def trainer(path, **options) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    return Trainer(accelerator="cpu", default_root_dir=path, use_distributed_sampler=False, **quiet, **options)


@pytest.mark.parametrize(("source", "workers", "stop"), [("generated", 0, 5), ("generated", 2, 9), ("file", 0, 11)])
def test_a_resumed_run_has_the_losses_of_the_whole_one(tmp_path, source, workers, stop):
    path = file_of(tmp_path / "train.jsonl", 60)

    def make() -> WordProblems:
        common = {"batch_size": 16, "num_workers": workers, "seed": 3, "validation_size": 4, "test_sets": {"test": 2}}
        if source == "generated":
            return WordProblems(max_tokens=1200, epoch_size=60, **common)
        return WordProblems("file", path, max_tokens=200, **common)

    whole, resumed = Tiny(), Tiny()
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path, max_steps=20, callbacks=[keep]).fit(whole, make())
    saved = tmp_path / f"step={stop}.ckpt"
    trainer(tmp_path, max_steps=20, enable_checkpointing=False).fit(resumed, make(), ckpt_path=saved, weights_only=True)
    assert len(whole.losses) == 20
    assert resumed.losses == whole.losses[stop:]
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
    assert len({len(sizes) for sizes in whole.sizes}) > 2
    most = 1200 if source == "generated" else 200
    assert 0.7 * most < max(len(sizes) * max(sizes) for sizes in whole.sizes) <= most


def on_rank(rank: int, world: int, module: object, **options) -> WordProblems:
    data = WordProblems(**{"validation_size": 2, "test_sets": {"test": 2}} | options)
    data.trainer = SimpleNamespace(
        overfit_batches=0, limit_train_batches=1.0, global_rank=rank, world_size=world, lightning_module=module
    )
    data.setup("fit")
    return data


@pytest.mark.parametrize("source", ["generated", "file"])
def test_ranks_have_as_many_rows_and_batches(tmp_path, source):
    given = {"epoch_size": 300, "max_tokens": 1500}
    if source == "file":
        given = {"source": "file", "path": file_of(tmp_path / "train.jsonl", 101), "max_tokens": 150}
    shares = [[batch["lengths"] for batch in on_rank(rank, 3, Tiny(), **given).train_dataloader()] for rank in range(3)]
    assert len(set(map(len, shares))) == 1
    for batches in zip(*shares, strict=True):
        assert len(set(map(len, batches))) == 1
        assert max(map(max, batches)) - min(map(max, batches)) <= 20
        assert all(len(rows) * max(rows) <= given["max_tokens"] for rows in batches)


def test_user_errors(tmp_path):
    with pytest.raises(ValueError, match=r"data.max_tokens must be at least 1, not 0"):
        WordProblems(max_tokens=0)
    path = file_of(tmp_path / "train.jsonl", 60)
    data = on_rank(0, 1, Tiny(), source="file", path=path, max_tokens=38)
    with pytest.raises(
        ValueError, match=r"^data.max_tokens must be at least 39, not 38: the row of 'Very Very .* is so"
    ):
        data.train_dataloader()
    with pytest.raises(ValueError, match=r"data.max_tokens must be at least \d+, not 20: the row of "):
        on_rank(0, 1, Tiny(), max_tokens=20).train_dataloader()
    with pytest.raises(ValueError, match=r"data.max_tokens: SimpleNamespace does not know the lengths of its rows"):
        on_rank(0, 1, SimpleNamespace(collate=list), max_tokens=100).train_dataloader()
    data = on_rank(0, 64, Tiny(), source="file", path=path, max_tokens=100)
    with pytest.raises(ValueError, match="52 training problems in 0 batches leave some of 64 devices without any"):
        data.train_dataloader()
    data = on_rank(0, 8, Tiny(), max_tokens=2000, epoch_size=64)
    with pytest.raises(ValueError, match=r"data.epoch_size \(64\) is smaller than a batch of all devices \(1\d\d\)"):
        data.train_dataloader()
