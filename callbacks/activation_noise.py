"""Noise added to an activation: how much of it can be drowned before the answers go."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from callbacks.base import StagedCallback, Stages, replace_first
from datamodules.errors import UserError
from lightning_modules.core.sites import match_modules


def add_noise(x: Tensor, strength: float, relative: bool, generator: torch.Generator) -> Tensor:
    """x + sigma u / sqrt(D), u standard normal: a displacement of root mean square length sigma at each position.

    sigma is `strength`, or `strength` |x| of the position where `relative`; |x| is taken as a constant, so the gradient
    passes unchanged. Inside `torch.func.vmap` with `randomness="different"` every member draws its own u.

    Args:
        x: `[..., D]`.
        strength: In units of x, or of |x| where `relative`.
        relative: Whether to scale with |x|.
        generator: On the device of x.
    """
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    sigma = strength * x.detach().norm(dim=-1, keepdim=True) if relative else strength
    return x + sigma * x.shape[-1] ** -0.5 * noise


class ActivationNoise(StagedCallback):
    """Adds Gaussian noise to the output x of every module that matches `site`, in at least fp32.

    x + sigma u / sqrt(D), u standard normal in each of D elements, so that the noise has a length of about sigma; sigma
    is `strength` |x| at each position, or `strength` itself. Where the module returns a tuple, its first element gets
    the noise. It acts on every forward of its stages, generation included.

    Args:
        site: Name pattern of the modules, see `lightning_modules.core.sites`.
        strength: Length of the noise; 0 leaves x as it is, bit for bit.
        relative: Whether `strength` is a share of the position's own |x|, rather than in the units of x.
        during: The stages in which the noise is added; validation inside fit is `validate`. By default all but fit.
        seed: Of the noise, which also depends on module, rank, step and batch; the same in a repeated or resumed run.

    Raises:
        UserError: At once, if `strength` is negative or `during` empty; at `setup`, if the site matches nothing; in a
            step, if the module returns no tensor.
    """

    def __init__(
        self,
        site: str,
        strength: float,
        relative: bool = True,
        during: Stages | None = None,
        seed: int = 0,
    ) -> None:
        if strength < 0:
            raise UserError(f"ActivationNoise: `strength` must not be negative, got {strength}.")
        super().__init__(during, ["validate", "test", "predict"], seed)
        self.site = site
        self.strength = strength
        self.relative = relative

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the site and hooks on."""
        for index, module in enumerate(match_modules(pl_module, self.site).values()):
            self._handles.append(module.register_forward_hook(self._hook(trainer, index)))

    def _hook(self, trainer: Trainer, index: int) -> Any:
        # Compiled modules leave their graph here: the hook depends on the stage and on the step.
        @torch.compiler.disable
        def hook(module: nn.Module, args: Any, output: Tensor | tuple) -> Tensor | tuple:
            if self.strength == 0 or not self._acts(trainer):
                return output
            return replace_first(output, self.site, noisy)

        def noisy(x: Tensor) -> Tensor:
            return add_noise(x, self.strength, self.relative, self._generator(x, index))

        return hook
