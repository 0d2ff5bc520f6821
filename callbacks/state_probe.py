"""What the recurrent state of gated delta mixers holds, and how their gates and keys treat needles.

Shapes: S ensemble members, B rows, T positions.
"""

from typing import Protocol, cast, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.probe import Probe, batch_on
from datamodules.batch import Integers
from datamodules.sequence_task import Split
from lightning_modules.core.ensemble_module import EnsembleModule
from lightning_modules.core.reporting import (
    add_figure,
    add_text,
    is_dry_run,
    logged_step,
    record_proportion,
    report_members,
)
from lightning_modules.groundthink.probes import state_report
from lightning_modules.groundthink.probes.silence import delta_mixers
from lightning_modules.groundthink.probes.state import StateMeasures, measure_state
from lightning_modules.groundthink.probes.writes import SITES


@runtime_checkable
class HasNeedles(Protocol):
    """A task whose rows have keys with their values behind them.

    Attributes:
        values: The tokens that are values; they stand nowhere else.
    """

    values: range

    def fixed(self, split: Split, count: int) -> Integers:
        """Return held-out rows, tokens and labels."""
        ...


class StateProbe(Probe):
    """Measures the gates, keys and state of each gated delta mixer on held-out rows with needles.

    It runs at the end of `validate` and `test`, and at some validations of a fit; `<stage>` is `validation` or `test`,
    and `<i>` the number of the mixer's block. The numbers are those of one head, the one whose queries are most like
    the keys of their needles:

    - `<stage>/block<i>_head`, `_write_lag`, `_query_match`: that head, the positions from a needle's key to the write
      that queries find (the convolutions carry key and value on), and the mean cosine of query and key;
    - `_decay_<role>`, `_beta_<role>`: the gates at the tokens of each role, `key` and `value` of a needle, `query` and
      `filler`, and at the needle's `write`;
    - `_key_cosine`, `_key_cosine_needles`, `_key_cosine_filler`: mean absolute cosine of the keys of two positions of a
      row, of the writes of two needles, of a needle and filler;
    - `_effective_rank`, `_top_singular_value`: of the state before the first query;
    - `_self_retrieval`: share of needles whose value is, among the values of the row, the nearest to what its key reads
      before the first query. `_self_retrieval_cosine`: the cosine of the two. `_query_retrieval`: the share for what
      the query reads;
    - `_cosine_after_<r>`: the same cosine right after r later needles, which shows the interference of their writes;
    - `_overwrite_left`, `_orthogonal_loss`, `_neighbour_loss`: whether a write under the same key replaces a value, and
      how much a write under a key at right angles, or under the key of another needle, changes it;
    - `_capacity`: the most writes one behind the other, without filler, of which 95 % are found: 1, 2, 4, ...

    `lightning_modules.groundthink.probes.state` has the definitions. Pictures of the gates along a row and of all
    measures by head, and a table, go to loggers that take them, for the first ensemble member. Every rank measures all
    rows, so the numbers do not depend on the number of ranks. A model without a gated delta mixer, such as a control,
    is left alone with a warning.

    Example::

        trainer:
          callbacks+:
            - {class_path: StateProbe, init_args: {every_n_steps: 1000}}

    Args:
        rows: Rows of the data.
        every_n_steps: In a fit, measure at the first validation after each n optimizer steps; 0 for never.

    Raises:
        UserError: A number is too small; at `setup`, the data has no needles, or there are two of these callbacks.
    """

    def __init__(self, rows: int = 32, every_n_steps: int = 0) -> None:
        super().__init__(rows, every_n_steps)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse data without needles."""
        super().setup(trainer, pl_module, stage)
        self._needles(trainer)
        if not delta_mixers(cast(EnsembleModule, pl_module).network):
            rank_zero_warn("StateProbe has nothing to measure: model.pattern has no G, which is a gated delta mixer")

    def _needles(self, trainer: Trainer) -> HasNeedles:
        # mypy lets no Protocol stand for a class, but `isinstance` takes it
        return self.task(trainer, HasNeedles, "a task with needles, such as NeedleGym,")  # type: ignore[type-abstract]

    def measure(self, trainer: Trainer, module: EnsembleModule, split: Split) -> None:
        """Measure and report every mixer."""
        if not (mixers := delta_mixers(module.network)):
            return
        task = self._needles(trainer)
        batch = batch_on(module, task.fixed(split, self.count(trainer)))
        _, seen = module.activations(batch["tokens"], [f"network.{mixer}.{site}" for mixer in mixers for site in SITES])
        for name, mixer in mixers.items():
            sites = {site: seen[f"network.{name}.{site}"] for site in SITES}
            members = [
                measure_state(batch, {site: x[s] for site, x in sites.items()}, mixer.shifted_value, task.values)
                for s in range(module.ensemble)
            ]
            block = name.split(".")[1]
            self._report(trainer, module, f"{split}/block{block}_", members)
            if trainer.is_global_zero and not is_dry_run(trainer):
                self._show(trainer, f"{split}/block{block}_", name, members[0], mixer.key_width)

    def _show(self, trainer: Trainer, prefix: str, name: str, measures: StateMeasures, key_width: int) -> None:
        step = logged_step(trainer)
        add_text(trainer, f"{prefix}state", state_report.markdown(measures), step)
        if measures.spectrum_HR.isfinite().all():  # a model that has diverged has nothing to draw
            add_figure(trainer, f"{prefix}state", state_report.picture(measures, name, key_width), step)
            trace = state_report.trace_picture(measures.trace, name, measures.head)
            add_figure(trainer, f"{prefix}gates", trace, step)

    def _report(self, trainer: Trainer, module: EnsembleModule, prefix: str, members: list[StateMeasures]) -> None:
        measures = {name: torch.tensor([own.values[name] for own in members]) for name in members[0].values}
        report_members(trainer, module, {prefix + name: value_S for name, value_S in measures.items()})
        for name, count in members[0].counts.items():
            record_proportion(module, prefix + name, measures[name] * count, count)
