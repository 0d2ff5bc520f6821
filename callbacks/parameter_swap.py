"""Evaluation of a model with the parameters of another run."""

from contextlib import ExitStack

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from callbacks.base import ReleasingCallback, refuse_shared
from datamodules.errors import UserError
from lightning_modules.core.checkpoints import check_finite, read_checkpoint
from lightning_modules.core.contracts import connected
from lightning_modules.core.reporting import ensemble_size
from lightning_modules.core.seeding import check_seed
from lightning_modules.core.sites import match_parameters
from lightning_modules.core.swapping import SwapMode, swap_parameters

DONOR = "ParameterSwap's donor"
PATTERNS = "ParameterSwap.parameters"


class ParameterSwap(ReleasingCallback):
    """Runs validate, test and predict with parameters of a donor run in place of the model's parameters.

    The values are those of `lightning_modules.core.swapping.swap_parameters`. They are in place from the start of an
    evaluation to its end, whatever the order of the callbacks: probes that measure at the end of a test measure them
    too. Then the model has its own parameters again, also if the evaluation fails. The default is to swap the routing:
    queries and keys of all heads. A trainer may have several swaps, of different parameters.

    Example::

        # python main.py test --config configs/X.yaml --config swap.yaml --ckpt_path runs/X/.../checkpoints/last.ckpt
        trainer:
          callbacks+:
            - class_path: ParameterSwap
              init_args: {donor: runs/Y/checkpoints/last.ckpt, mode: procrustes}

    Args:
        donor: Checkpoint of a run with the same architecture; required for `copy` and `procrustes`.
        parameters: Name patterns of the parameters, see `lightning_modules.core.sites`.
        mode: `copy` the donor's parameters, rotate them into the model's basis of the residual stream first
            (`procrustes`), or draw `random` values.
        basis: For `procrustes`, the name pattern of the token embeddings.
        seed: Seed of `random`.

    Raises:
        UserError: The mode lacks its donor, or the seed is negative; at `setup`, the stage is fit, a pattern matches
            nothing, two swaps share a parameter, or the donor does not exist, is damaged or is not finite; at the start
            of the evaluation, the donor does not fit.
    """

    def __init__(
        self,
        donor: str | None = None,
        parameters: list[str] = ["*.attn.q_proj.*", "*.attn.k_proj.*"],  # noqa: B006, the command line shows it
        mode: SwapMode = "copy",
        basis: str = "*.token_embedding.weight",
        seed: int = 0,
    ) -> None:
        if mode == "random" and donor is not None:
            rank_zero_warn("ParameterSwap(mode='random') ignores `donor`.")
        if mode != "random" and donor is None:
            raise UserError(f"ParameterSwap(mode={mode!r}) needs `donor`, the checkpoint of another run.")
        check_seed(seed, "ParameterSwap: `seed`")
        self.donor = donor if mode != "random" else None
        self.parameters = list(parameters)
        self.mode = mode
        self.basis = basis
        self.seed = seed
        self._donor_state: dict[str, Tensor] | None = None
        self._swap = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse training, patterns that match nothing, and a donor that cannot be read; become the last callback."""
        if stage == "fit":
            raise UserError("ParameterSwap acts on validate, test and predict; take it out of the callbacks of fit.")
        match_parameters(pl_module, self.parameters, PATTERNS)
        refuse_shared(trainer, self, lambda swap: match_parameters(pl_module, swap.parameters, PATTERNS), "replace")
        # Behind those that put other parameters in place at the start, or that measure at the end
        others = [callback for callback in connected(trainer).callbacks if callback is not self]
        connected(trainer).callbacks = [*others, self]
        # The donor is read early to find mistakes, and used later: Lightning restores `--ckpt_path` after `setup`.
        if self.donor is not None:
            content = read_checkpoint(self.donor, DONOR)
            check_finite(content, DONOR, self.donor, ensemble_size(pl_module))
            self._donor_state = content["state_dict"]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the values in place."""
        self._begin(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the values in place."""
        self._begin(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the values in place."""
        self._begin(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the model's parameters."""
        self._release()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the model's parameters."""
        self._release()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the model's parameters."""
        self._release()

    def _begin(self, pl_module: LightningModule) -> None:
        swap = swap_parameters(pl_module, self._donor_state, self.parameters, self.mode, self.basis, self.seed)
        self._swap.enter_context(swap)

    def _release(self) -> None:
        self._swap.close()
