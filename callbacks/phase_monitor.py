"""How far back the memories of a phase model reach, and how much of what they hold adds up.

Shapes: S ensemble members.
"""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.probe import Probe, batch_on
from datamodules.sequence_task import SequenceTask, Split
from lightning_modules.core.ensemble_module import EnsembleModule
from lightning_modules.core.reporting import report_members
from lightning_modules.phase.measures import SITES, memory_measures, phase_mixers


class PhaseMonitor(Probe):
    """Measures the effective window and the phase coherence of every phase mixer on held-out rows.

    It runs at the end of `validate` and `test`, and at some validations of a fit; `<stage>` is `validation` or `test`,
    and `<i>` the number of the mixer's block:

    - `<stage>/effective_window`, `<stage>/block<i>_effective_window`: positions that the decay leaves in the memory,
      the mean over blocks and that of each block;
    - `<stage>/coherence`, `<stage>/block<i>_coherence`: the share of the memory's content that adds up instead of
      cancelling, between 0 and 1.

    `lightning_modules.phase.measures` has the definitions. Every rank measures all rows. A model without a phase mixer,
    such as a control, is left alone with a warning.

    Example::

        trainer:
          callbacks+:
            - {class_path: PhaseMonitor, init_args: {every_n_steps: 500}}

    Args:
        rows: Rows of the data.
        every_n_steps: In a fit, measure at the first validation after each n optimizer steps; 0 for never.

    Raises:
        UserError: A number is too small; at `setup`, there are two of these callbacks, or the data has no rows of
            tokens.
    """

    def __init__(self, rows: int = 16, every_n_steps: int = 500) -> None:
        super().__init__(rows, every_n_steps)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse data of another kind."""
        super().setup(trainer, pl_module, stage)
        self._rows(trainer)
        if not phase_mixers(pl_module):
            rank_zero_warn("PhaseMonitor has nothing to measure: model.pattern has no P, which is a phase mixer")

    def _rows(self, trainer: Trainer) -> SequenceTask:
        return self.task(trainer, SequenceTask, "rows of tokens, such as TextCorpus,")  # type: ignore[type-abstract]

    def measure(self, trainer: Trainer, module: EnsembleModule, split: Split) -> None:
        """Measure and report every mixer."""
        mixers = phase_mixers(module)
        if not mixers:
            return
        tokens = batch_on(module, self._rows(trainer).fixed(split, self.count(trainer)))["tokens"]
        _, seen = module.activations(tokens, [f"{mixer}.{site}" for mixer in mixers for site in SITES])
        measures = {}
        for name, mixer in mixers.items():
            own = {site: seen[f"{name}.{site}"] for site in SITES if f"{name}.{site}" in seen}
            block = next(part for part in name.split(".") if part.isdecimal())
            for measure, value_S in memory_measures(own, mixer.window).items():
                measures[f"{split}/block{block}_{measure}"] = value_S
        for measure in ("effective_window", "coherence"):
            blocks = [value_S for name, value_S in measures.items() if name.endswith(f"_{measure}")]
            measures[f"{split}/{measure}"] = torch.stack(blocks).mean(0)
        report_members(trainer, module, measures)
