"""Noise added to an activation, to measure how much noise the answers survive."""

from collections.abc import Callable

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from callbacks.hooks import InterveningCallback, Stages, eager, replace_first
from datamodules.errors import check_numbers
from lightning_modules.core.sites import match_modules


def add_noise(x: Tensor, strength: float, relative: bool, generator: torch.Generator) -> Tensor:
    """Return x + sigma u / sqrt(D), u standard normal: a displacement of root mean square length sigma per position.

    sigma is `strength`, or `strength` |x| of the position where `relative` is set. |x| counts as a constant, so the
    gradient passes unchanged. Inside `torch.func.vmap` with `randomness="different"` each member draws another u.

    Args:
        x: Activations, `[..., D]`.
        strength: Length of the noise, in units of x or as a fraction of |x|.
        relative: Whether the length scales with |x|.
        generator: A random generator on the device of x.
    """
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    sigma = strength * torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True) if relative else strength
    noisy: Tensor = x + sigma * x.shape[-1] ** -0.5 * noise
    return noisy


class ActivationNoise(InterveningCallback):
    """Adds Gaussian noise to the output x of every module that matches `site`, in at least fp32.

    The output becomes x + sigma u / sqrt(D), with u standard normal in each of D elements, so the length of the noise
    is about sigma: `strength` |x| at each position, or `strength` itself. Where the module returns a tuple, the noise
    goes to the first element. It acts on every forward of its stages, generation included. The noise depends on the
    module, the rank, the step and the batch; it is the same in a repeated or resumed run.

    Example::

        trainer:
          callbacks+:
            - {class_path: ActivationNoise, init_args: {site: final_residual, strength: 0.5}}

    Args:
        site: Name pattern of the modules, see `lightning_modules.core.sites`.
        strength: Length of the noise; 0 leaves x unchanged, bit for bit.
        relative: Whether `strength` is a fraction of |x| at each position, rather than in units of x.
        during: The stages in which the noise is added: `fit`, `validate`, `test`, `predict`. Validation during fit is
            `validate`. By default all stages but fit.
        seed: Seed of the noise.

    Raises:
        UserError: `strength` is negative or not finite, `during` is empty, or the seed is negative; at `setup`, the
            site matches nothing; in a step, the module returns no tensor.
    """

    def __init__(
        self,
        site: str,
        strength: float,
        relative: bool = True,
        during: Stages | None = None,
        seed: int = 0,
    ) -> None:
        check_numbers("ActivationNoise", 0, strength=strength)
        super().__init__(during, ["validate", "test", "predict"], seed)
        self.site = site
        self.strength = strength
        self.relative = relative

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Add hooks to the modules that match the site."""
        # The number among all modules, so that two callbacks at different sites add different noise
        numbers = {module: number for number, module in enumerate(pl_module.modules())}
        for module in match_modules(pl_module, self.site, "ActivationNoise.site").values():
            self._handles.append(module.register_forward_hook(self._hook(trainer, numbers[module])))

    def _hook(self, trainer: Trainer, index: int) -> Callable[[nn.Module, object, object], object]:
        def noisy(x: Tensor) -> Tensor:
            return add_noise(x, self.strength, self.relative, self._generator(x, index))

        def hook(module: nn.Module, args: object, output: object) -> object:
            acts = self.strength > 0 and self._acts(trainer)
            return replace_first(output, self.site, noisy) if acts else output

        return eager(hook, lambda: not self._acts(trainer))
