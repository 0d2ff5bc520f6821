"""The memory of the gated delta rule alone: what do its reads return after some writes?

Shapes: S ensemble members, B rows, N items, T = 1 or more writes, K and V widths of keys and values.
"""

import math
from functools import partial
from itertools import pairwise
from typing import NoReturn, cast

import torch
from lightning import LightningModule
from torch import Tensor

from datamodules.errors import POSITIVE, SIZE, UserError, check_numbers
from datamodules.memory_items import MemoryBatch, MemoryItems
from kernels.gated_delta import chunk_gated_delta_rule, recurrent_gated_delta_rule
from kernels.gated_delta.options import Rule
from lightning_modules.core.contracts import connected
from lightning_modules.core.precision import check_precision
from lightning_modules.core.reporting import record_proportion, report_members
from lightning_modules.groundthink.mechanism.item_keys import (
    OF_CONTEXT,
    OF_POSITION,
    WITH_STRENGTH,
    ItemKeys,
    make_keys,
)
from lightning_modules.groundthink.mechanism.memory_measures import GradientError, MemoryMeasures, gradients

MOST_MEMBERS = 4096
STEP = 0.5  # of a correction, as in the notes


class DeltaMemory(LightningModule):
    """Writes items into one head's state by the gated delta rule and reads each of them; nothing is trained.

    S <- exp(g) S + beta k (v - exp(g) S^T k)^T for each item in turn, from S = 0; then S^T q for the query q of each
    item written so far. Keys and queries are unit vectors; q is the key, unless `query_noise` is set. Kinds of keys:

    - `token`: a random vector for each item, as for tokens that are all different;
    - `marker`: one random vector for all items, as for items that stand behind one marker token;
    - `orthogonal`: K orthonormal vectors in turn (a key bank);
    - `alike`: (1 - strength) times an orthonormal vector, plus `strength` times a common one;
    - `hashed`: the pseudorandom vector of the item's position, `model.keys: position` of `GroundThink`;
    - `sinusoidal`: the marker plus `strength` times sines and cosines of the position;
    - `rotary`: the marker, turned by the position (RoPE);
    - `context`: a random convolution over the item's W tokens;
    - `marker_context`: the same, where the last of the W tokens is the marker;
    - `short_convolution`: the same with SiLU, as in the mixer `gated_delta`.

    After n writes, for each n in `read_after`, the test measures over the n items:

    - `error_at_n`, `first_error_at_n`, `last_error_at_n`: |read - v| / |v| of all items, the first and the last one;
    - `similarity_at_n`, likewise: cosine of the read with v;
    - `recall_at_n`, `first_recall_at_n`: share of items whose read has a larger cosine with the item's own value than
      with every other value; chance is 1 / n, and with `repeat`, where all values are equal, it means nothing;
    - `key_similarity_at_n`: mean |cosine| of the keys of two items; `state_norm_at_n`: |S|;
    - `soft_error_at_n`, `soft_recall_at_n`: error of a read that blends what lies under all keys, with the weights
      softmax(keys q), and the share of items whose own key has a larger weight than every other key.

    `gradient_error`, if `check_gradients` is set: the relative error of the gradients of the chunked form in fp32,
    against those of the recurrence in fp64; the largest of those by queries, keys, values, log-decays and betas.

    Each ensemble member reads items of its own (see `MemoryItems`), so that a study takes members as seeds.

    Args:
        keys: The kind of keys.
        strength: Of the kinds `alike` and `sinusoidal`.
        spacing: Positions from one item to the next, of the kinds `hashed`, `sinusoidal` and `rotary`.
        beta: Writing strength, 0 to 2.
        decay: exp(g), above 0 and at most 1.
        rule: `seed` takes the notes' rule, whose error is that of the state before the decay.
        read_after: Numbers of writes after which all items are read; None for all items of the data.
        query_noise: Strength of the second draw that is added to a query's context.
        repeat: Write the first item again and again.
        corrections: Passes over all items; each writes the values plus half of the errors of the pass before.
        check_gradients: Measure `gradient_error`.
        ensemble: S.

    Raises:
        UserError: A number does not fit, or an option does not belong to the kind of keys; at `setup`, the data has
            fewer items than `read_after` asks for, or is no `MemoryItems`.
    """

    def __init__(
        self,
        keys: ItemKeys = "token",
        strength: float = 0.0,
        spacing: int = 1,
        beta: float = 1.0,
        decay: float = 1.0,
        rule: Rule = "standard",
        read_after: list[int] | None = None,
        query_noise: float = 0.0,
        repeat: bool = False,
        corrections: int = 0,
        check_gradients: bool = False,
        ensemble: int = 1,
    ):
        super().__init__()
        check_numbers("model", 0, 2, beta=beta)
        check_numbers("model", POSITIVE, 1, decay=decay)
        check_numbers("model", 0, 1 if keys == "alike" else SIZE, strength=strength)
        check_numbers("model", 0, query_noise=query_noise)
        check_numbers("model", 0, SIZE, corrections=corrections, spacing=spacing)
        check_numbers("model", 1, MOST_MEMBERS, ensemble=ensemble)
        for name, given, kinds in (
            ("strength", strength != 0, WITH_STRENGTH),
            ("query_noise", query_noise != 0, OF_CONTEXT),
            ("spacing", spacing != 1, OF_POSITION),
        ):
            if given and keys not in kinds:
                raise UserError(f"model.{name} is for the keys {', '.join(kinds)}, not for '{keys}'")
        for number, count in enumerate(read_after or []):
            check_numbers("model", 1, SIZE, **{f"read_after[{number}]": count})
        self.read_after = sorted(set(read_after or []))
        self.make_keys = partial(make_keys, keys, strength=strength, spacing=spacing)
        self.beta, self.log_decay, self.rule = beta, math.log(decay), rule
        self.query_noise, self.repeat, self.corrections = query_noise, repeat, corrections
        self.check_gradients, self.ensemble = check_gradients, ensemble
        self.members: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.hits: dict[str, list[int]] = {}
        self.intervals: dict[str, tuple[float, float]] = {}

    def setup(self, stage: str) -> None:
        """Check that there are enough items, and make the measures."""
        if stage != "test":
            self.training_step()
        check_precision(self.trainer)
        data = connected(self.trainer).datamodule
        if not isinstance(data, MemoryItems):
            raise UserError(f"data: DeltaMemory reads MemoryItems, not {type(data).__name__}")
        self.read_after = self.read_after or [data.items]
        if self.read_after[-1] > data.items:
            raise UserError(f"model.read_after has {self.read_after[-1]}, and data.items is {data.items}")
        self.measures = MemoryMeasures(self.ensemble, self.read_after)
        self.gradient_error = GradientError(self.ensemble, 5)

    def training_step(self) -> NoReturn:
        """Raise UserError."""
        raise UserError("model: DeltaMemory has nothing to train: run `python main.py test`")

    # Lightning asks for all of these before it calls `setup`
    configure_optimizers = validation_step = forward = training_step

    def test_step(self, batch: MemoryBatch, batch_idx: int) -> None:
        """Write and read some rows."""
        context_SBNWK, v = batch["context_SBNWK"], batch["value_SBNV"]
        key_SBNK = self.make_keys(batch, context_SBNWK)
        query_SBNK = self.make_keys(batch, context_SBNWK + self.query_noise * batch["noise_SBNWK"])
        if self.repeat:
            key_SBNK, query_SBNK, v = (x[:, :, :1].expand_as(x) for x in (key_SBNK, query_SBNK, v))
        written = v
        for _ in range(self.corrections):
            written = written + STEP * (v - key_SBNK @ self.states(key_SBNK, written)[-1])
        states = self.states(key_SBNK, written)
        reads = [
            (state_SBKV, query_SBNK[:, :, :count] @ state_SBKV)
            for count, state_SBKV in zip(self.read_after, states, strict=True)
        ]
        self.measures.update(reads, query_SBNK, key_SBNK, v)
        if self.check_gradients:
            self.gradient_error.update(*self._gradients(key_SBNK, v))

    def states(self, key_SBNK: Tensor, v: Tensor) -> list[Tensor]:
        """Return the state_SBKV after each number of writes in `read_after`."""
        rows, states = key_SBNK.shape[:2], []
        state: Tensor | None = None
        for start, end in pairwise([0, *self.read_after]):
            k_LT1K, v_LT1V, gate_LT1 = _as_head(key_SBNK[:, :, start:end], v[:, :, start:end])
            gates = self.log_decay * gate_LT1, self.beta * gate_LT1
            _, state = chunk_gated_delta_rule(
                k_LT1K, k_LT1K, v_LT1V, *gates, initial_state=state, output_final_state=True, rule=self.rule
            )
            state = cast(Tensor, state)
            states.append(state.view(*rows, *state.shape[2:]))
        return states

    def _gradients(self, key_SBNK: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the gradients by queries, keys, values, log-decays and betas, [S, B, ...], computed and exact."""
        k_LT1K, v_LT1V, gate_LT1 = _as_head(key_SBNK, v)
        # Each position reads the item before: at beta 1 a key reads what it has just written, whatever the gates are
        inputs = k_LT1K.roll(1, 1), k_LT1K, v_LT1V, self.log_decay * gate_LT1, self.beta * gate_LT1
        forms = (chunk_gated_delta_rule, torch.float32), (recurrent_gated_delta_rule, torch.float64)
        found = []
        for form, dtype in forms:
            of_inputs = gradients(partial(form, rule=self.rule), inputs, v_LT1V, dtype)
            found.append([x.view(*key_SBNK.shape[:2], *x.shape[1:]) for x in of_inputs])
        return found[0], found[1]

    def on_test_epoch_end(self) -> None:
        """Log the measures, and the samples behind the shares."""
        means, shares = self.measures.compute()
        values = means | {name: hits_S / count for name, (hits_S, count) in shares.items()}
        if self.check_gradients:
            values["gradient_error"] = self.gradient_error.compute()
        report_members(self.trainer, self, {f"test/{name}": values_S for name, values_S in values.items()})
        for name, (hits_S, count) in shares.items():
            record_proportion(self, f"test/{name}", hits_S, count)


def _as_head(key_SBNK: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys [L, T, 1, K] and values [L, T, 1, V] of L = S B rows with one head, and gates of one [L, T, 1]."""
    k_LT1K, v_LT1V = (x.flatten(0, 1)[:, :, None] for x in (key_SBNK, v))
    return k_LT1K, v_LT1V, torch.ones_like(v_LT1V[..., 0])
