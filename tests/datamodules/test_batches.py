"""Numbered batches: each sample once, divided among ranks, the same from workers and after a resume."""

from collections import Counter
from itertools import chain

import pytest
import torch

from datamodules.batches import LANES, POOL, FiniteBatches, StreamBatches
from datamodules.loader import SMALL, BatchLoader
from datamodules.problems import generate


def length(sample: int) -> int:
    return sample * 2654435761 % 97


def sample_of(index: int) -> int:
    return index


def as_is(samples: list[int]) -> list[int]:
    return samples


def loader(batches, rank=0, world=1, **options) -> BatchLoader:
    if options.get("num_workers"):
        options["multiprocessing_context"] = "fork"
    return BatchLoader(batches, as_is, rank, world, **options)


@pytest.mark.parametrize("count", [1, 5, 64, 65, 1000, POOL * 7, POOL * 7 + 1])
def test_finite_batches_hold_every_sample_once_an_epoch(count):
    batches = FiniteBatches(range(count), 7, length, seed=0, drop_last=False)
    epochs = [[batches.batch(epoch, i) for i in range(len(batches))] for epoch in (0, 1)]
    for epoch in epochs:
        assert sorted(chain(*epoch)) == list(range(count))
        sizes = [len(batch) for batch in epoch]
        assert max(sizes) <= 7
        assert min(sizes) >= batches.smallest == count // len(batches)
    assert len(batches) == -(-count // 7)
    if count > 7:
        assert epochs[0] != epochs[1]
        other = FiniteBatches(range(count), 7, length, seed=1, drop_last=False)
        assert epochs[0] != [other.batch(0, i) for i in range(len(other))]


def test_drop_last_leaves_out_less_than_a_batch():
    batches = FiniteBatches(range(100), 7, length, seed=0, drop_last=True)
    seen = list(chain(*(batches.batch(0, i) for i in range(len(batches)))))
    assert len(batches) == 14
    assert len(set(seen)) == len(seen) == 98
    small = FiniteBatches(range(5), 7, length, seed=0, drop_last=True)
    assert len(small) == 1
    assert sorted(small.batch(0, 0)) == list(range(5))


def test_ranks_train_on_as_many_rows_where_the_samples_are_fewer_than_a_batch():
    batches = FiniteBatches(range(13), 64, length, seed=0, drop_last=True, world=4)
    (shares,) = zip(*(list(loader(batches, rank, 4)) for rank in range(4)), strict=True)
    assert [len(share) for share in shares] == [3] * 4
    assert batches.smallest == 12
    assert len(FiniteBatches(range(13), 64, length, seed=0, drop_last=False, world=4).batch(0, 0)) == 13
    assert len(FiniteBatches(range(3), 64, length, seed=0, drop_last=True, world=4)) == 0


@pytest.mark.parametrize("count", [LANES * POOL, 3, 100, LANES * POOL + 5])
def test_stream_batches_never_repeat_a_sample(count):
    batches = StreamBatches(sample_of, count * 4 + 3, 4, length)
    assert len(batches) == count
    seen = [s for epoch in range(4) for i in range(len(batches)) for s in batches.batch(epoch, i)]
    assert len(seen) == 4 * 4 * count
    assert len(set(seen)) == len(seen)


def test_stream_batches_make_each_sample_once_in_one_process():
    made = Counter()

    def make(index: int) -> int:
        made[index] += 1
        return index

    batches = StreamBatches(make, 4 * 50, 4, length)
    for epoch in range(6):
        for number in range(len(batches)):
            batches.batch(epoch, number)
    assert set(made.values()) == {1}


def test_workers_make_pools_of_their_own():
    pools = {}
    for worker in range(4):
        batches = StreamBatches(sample_of, 4 * LANES * POOL, 4, length)
        pools[worker] = set()
        batches._pool = lambda pool, worker=worker: pools[worker].add(pool) or [[]] * POOL
        for number in range(worker, len(batches), 4):
            batches.batch(0, number)
    assert sum(map(len, pools.values())) == len(set.union(*pools.values())) == LANES


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", ["finite", "stream"])
def test_ranks_partition_the_global_batch(kind, world):
    def make():
        if kind == "stream":
            return StreamBatches(sample_of, 240, 24, length)
        return FiniteBatches(range(250), 24, length, seed=3, drop_last=False)

    whole = list(loader(make()))
    shares = [list(loader(make(), rank, world)) for rank in range(world)]
    assert len(whole) == len(shares[0])
    for number, batch in enumerate(whole):
        assert sorted(chain(*(share[number] for share in shares))) == sorted(batch)
        sizes = [len(share[number]) for share in shares]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_takes_no_random_number_from_the_training(workers):
    before = torch.get_rng_state()
    list(loader(StreamBatches(sample_of, 40, 4, length), num_workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_gives_exactly_the_remaining_batches(workers):
    def make(num_workers):
        return loader(StreamBatches(sample_of, 4 * 30, 4, length), num_workers=num_workers)

    whole = list(make(0))
    assert list(make(workers)) == whole
    first = make(workers)
    iterator = iter(first)
    head = [next(iterator) for _ in range(11)]
    state = first.state_dict()  # workers have prefetched more by now
    second = make(workers)
    second.load_state_dict(state)
    assert len(second) == len(whole)
    assert head + list(second) == whole
    assert second.state_dict() == {"done": 30}
    second.sampler.set_epoch(1)
    following = list(second)
    assert len(following) == 30
    assert not set(chain(*following)) & set(chain(*whole))


def test_a_loader_saved_at_the_end_of_an_epoch_starts_the_next_one():
    first = loader(FiniteBatches(range(20), 4, length, seed=0, drop_last=False))
    whole = list(first)
    second = loader(FiniteBatches(range(20), 4, length, seed=0, drop_last=False))
    second.load_state_dict(first.state_dict())
    assert list(second) == whole


def test_bucketing_leaves_little_padding():
    problems = [generate(0, "train", i) for i in range(4096)]
    lengths = [len(p.question) + len(p.answer) for p in problems]

    def padding(batches: list[list[int]]) -> float:
        return 1 - sum(map(sum, batches)) / sum(max(batch) * len(batch) for batch in batches)

    finite, stream = (
        FiniteBatches(lengths, 64, int, 0, drop_last=True),
        StreamBatches(lengths.__getitem__, 2048, 32, int),
    )
    assert padding([lengths[i : i + 64] for i in range(0, len(lengths), 64)]) > 0.25
    for batches in (finite, stream):
        assert padding([batches.batch(0, i) for i in range(len(batches))]) < 0.06


def tensors(samples: list[int]) -> dict[str, torch.Tensor]:
    x = torch.tensor(samples)
    many = torch.arange(SMALL)  # of 8 bytes each
    kinds = {"empty": x[:0], "single": x.sum(), "mask": x > 3, "transposed": x.expand(2, -1).T, "half": x.half()}
    return {**kinds, "bfloat16": x.bfloat16(), "large": many, "part": many[1::2]}


def test_workers_send_tensors_of_all_kinds_unchanged():
    batches = FiniteBatches(range(20), 4, length, seed=0, drop_last=False)
    made = list(BatchLoader(batches, tensors, num_workers=2, multiprocessing_context="fork"))
    expected = list(BatchLoader(batches, tensors))
    assert len(made) == len(expected) == 5
    for one, other in zip(made, expected, strict=True):
        assert one.keys() == other.keys()
        for name, x in one.items():
            torch.testing.assert_close(x, other[name], rtol=0, atol=0)
        for x in one.values():
            x.zero_()  # the run may write into a batch
