"""How much work one batch is, told by the module that does it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """The size of one batch on one rank, from host-side shapes alone (no device synchronisation).

    A LightningModule may implement `workload(batch) -> Workload`; the `Throughput` callback then reports its rates.

    Attributes:
        samples: Sequences, problems or images in the batch.
        tokens: Positions that the trained network processes; 0 where the word has no meaning.
        flops: Model floating-point operations of forward and backward together (a multiply-add counts two), without
            recomputation; None where the module does not know.
    """

    samples: int
    tokens: int = 0
    flops: int | None = None
