"""Checks of a module before it is trained."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from callbacks.base import check_positive, refuse_second
from callbacks.held_out import eval_mode
from datamodules.errors import UserError, check_numbers
from lightning_modules.core.contracts import Figure, Gate, HasCounts, SupportsGates
from lightning_modules.core.reporting import keep_scalars, log_scalars, record_proportion


class Gates(Callback):
    """Runs the gates of a module before validation: whether models, prompt and data are worth an expensive training.

    The module's `gates(count, least_accuracy, steps)` runs them. Each prints a line with its figures, their bounds, and
    whether it passed; if it failed, also what that means. Loggers and `results.json` get `gates/<gate>_<figure>`, with
    the interval of a proportion, and `gates/<gate>_passed`, 1 or 0. The weights stay as they are.

    Example::

        trainer:
          callbacks+:
            - {class_path: Gates, init_args: {n_samples: 200, least_accuracy: 0.45}}

    Args:
        n_samples: Held-out samples of all ranks for the gates that measure accuracy.
        least_accuracy: Accuracy that the target has to reach on text.
        steps: Most steps of training in a gate, which ends sooner once it passes.

    Raises:
        UserError: A number is out of range; at `setup`, there are two of these callbacks, the command is not
            `validate`, or the module has no gates.
    """

    def __init__(self, n_samples: int = 200, least_accuracy: float = 0.45, steps: int = 300) -> None:
        check_positive(self, n_samples=n_samples, steps=steps)
        check_numbers("Gates", 0, 1, least_accuracy=least_accuracy)
        self.n_samples, self.least_accuracy, self.steps = n_samples, least_accuracy, steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse other commands than `validate`, and a module without gates."""
        refuse_second(trainer, self)
        if trainer.state.fn != TrainerFn.VALIDATING:
            raise UserError("Gates belong to the command validate: leave them out of the others.")
        if not isinstance(pl_module, SupportsGates):
            raise UserError(f"Gates needs `gates(...)`, which {type(pl_module).__name__} does not have.")
        if not trainer.limit_val_batches:
            rank_zero_warn("trainer.limit_val_batches is 0: without a validation the gates do not run")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the gates."""
        assert isinstance(pl_module, SupportsGates)  # see `setup`
        # Lightning validates in inference mode, whose tensors nothing can be trained with
        with torch.inference_mode(False), isolate_rng(), eval_mode(pl_module):
            for gate in pl_module.gates(self.n_samples, self.least_accuracy, self.steps):
                rank_zero_info(_line(gate))
                figures = {f"gates/{gate.name}_{figure.name}": figure for figure in gate.figures}
                values = {name: figure.value for name, figure in figures.items()}
                values[f"gates/{gate.name}_passed"] = float(gate.passed)
                log_scalars(trainer, values)
                keep_scalars(trainer, values)
                for name, figure in figures.items():
                    if figure.hits is not None and isinstance(pl_module, HasCounts):
                        record_proportion(pl_module, name, torch.tensor(sum(figure.hits)), len(figure.hits))


def _line(gate: Gate) -> str:
    figures = ", ".join(map(_figure, gate.figures))
    return f"gate {gate.name}: {figures}: {'passed' if gate.passed else f'FAILED, {gate.meaning}'}"


def _figure(figure: Figure) -> str:
    bound = f"at {'most' if figure.at_most else 'least'} {figure.bound:.3g}"
    count = "" if figure.hits is None else f" of {len(figure.hits)}"
    return f"{figure.name} {figure.value:.3g}{count} ({bound})"
