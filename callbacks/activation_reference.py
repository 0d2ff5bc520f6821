"""Statistics of an activation in a control run, to which `ActivationClamp` sets the activation of another run.

Shapes: N positions, C classes, D features, S ensemble members. The class of a position is its target label; a position
of label -100 has none.
"""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from callbacks.hooks import StageCallback, eager, first_tensor
from callbacks.moments import Moments
from datamodules.errors import UserError
from lightning_modules.core.contracts import connected
from lightning_modules.core.ensemble import observe
from lightning_modules.core.files import replacing
from lightning_modules.core.reporting import ensemble_size, run_folder
from lightning_modules.core.sites import match_modules


def labels_of(batch: object, key: str) -> Tensor | None:
    """Return the labels of the batch, or None if it has none under that key."""
    return batch.get(key) if isinstance(batch, Mapping) else None


def fitting_labels(labels: Tensor | None, x: Tensor) -> Tensor | None:
    """Return the labels if there is one for each position of x `[..., D]`, else None."""
    return labels if labels is not None and labels.shape == x.shape[:-1] else None


def read_reference(path: str, keys: list[str], members: int = 1) -> list[Tensor]:
    """Return statistics from a file of `ActivationReference`: scalars, or [S] if it recorded an ensemble.

    Args:
        path: The file.
        keys: Names of the statistics.
        members: S, of the model that uses them.

    Raises:
        UserError: The file does not exist, is damaged, lacks a name, or comes from an ensemble of another size.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise UserError(f"There is no reference {path!r}; a run with an ActivationReference writes one.")
    try:
        statistics = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"The reference {path!r} cannot be read as a safetensors file: {error}") from error
    for key in keys:
        if key not in statistics:
            nearest = ", ".join(map(repr, get_close_matches(key, statistics, n=5, cutoff=0.0)))
            raise UserError(f"The reference {path!r} has no {key!r}; the nearest names in it are {nearest}.")
        if statistics[key].dim() and len(statistics[key]) != members:
            raise UserError(f"The reference {path!r} has {len(statistics[key])} members, and the model {members}.")
    return [statistics[key] for key in keys]


class ActivationReference(StageCallback):
    """Records statistics of an activation over each validation and test, for `ActivationClamp` in another run.

    The file has for every module that matches, under `<module name>.`:

    - `radius`: the mean of |x| over positions;
    - `spread.target`: s, with s^2 = sum |x - mu_c|^2 / (N - C), the trace of the pooled within-class covariance;
    - `spread.batch`: the same with all positions as one class.

    The positions are those with a label, or all if the batch has no labels for this site; then there is no
    `spread.target`. For an ensemble each statistic has one value per member. Sums are in fp64 and over all ranks. Every
    validation and test overwrites the file, so `test` after `fit` records the test set.

    Example::

        trainer:
          callbacks+:
            - {class_path: ActivationReference, init_args: {site: final_residual}}

    Args:
        site: Name pattern of the modules, see `lightning_modules.core.sites`.
        path: The file to write; by default `reference.safetensors` in the run's folder.
        labels: Key of the target labels in the batch, one label per position of x.

    Raises:
        UserError: At `setup`, the site matches nothing, `path` cannot be a file, or two of these callbacks would write
            one file; after a validation or test, the file cannot be written.
    """

    def __init__(self, site: str, path: str | None = None, labels: str = "labels") -> None:
        super().__init__()
        self.site = site
        self.path = path
        self.labels = labels
        self._moments: dict[str, list[Moments]] = {}  # for each module, one per member
        self._labels: Tensor | None = None
        self._in_step = False

    @property
    def state_key(self) -> str:
        """Return a key that differs between two references of one trainer."""
        return self._generate_state_key(site=self.site, path=self.path)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second callback with the same file, a path for no file, and a site that matches nothing."""
        writers = [other for other in connected(trainer).callbacks if isinstance(other, ActivationReference)]
        if any(other is not self and other.path == self.path for other in writers):
            raise UserError("Two ActivationReference callbacks write one file; give each a different `path`.")
        match_modules(pl_module, self.site, "ActivationReference.site")
        if self.path is not None and (Path(self.path).is_dir() or any(up.is_file() for up in Path(self.path).parents)):
            raise UserError(
                f"ActivationReference: `path` {self.path!r} cannot be written: it is a folder, or lies beneath a file."
            )

    def _hook(self, name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            if self._in_step:
                observe(first_tensor(output, self.site).detach(), add)

        def add(x: Tensor) -> None:
            moments = self._moments[name]
            for member, x_member in enumerate(x if len(moments) > 1 else [x]):
                moments[member].add(x_member, fitting_labels(self._labels, x_member))

        return eager(hook)

    def _begin_pass(self, pl_module: LightningModule) -> None:
        modules, members = match_modules(pl_module, self.site), ensemble_size(pl_module)
        self._moments = {name: [Moments(pl_module.device) for _ in range(members)] for name in modules}
        # The hooks stay for this pass only, so that training steps run, and compile, as without the callback.
        self._handles = [module.register_forward_hook(self._hook(name)) for name, module in modules.items()]

    def on_stage_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the labels of the batch."""
        self._labels = labels_of(batch, self.labels)
        self._in_step = not trainer.sanity_checking

    def on_stage_batch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the labels of the batch."""
        self._labels = None
        self._in_step = False

    def _end_pass(self, trainer: Trainer) -> None:
        self._release()
        if trainer.sanity_checking:
            return
        # Both are collectives: every rank takes part before rank zero alone writes.
        statistics = {}
        for name, moments in self._moments.items():
            computed = [member.compute(trainer.strategy) for member in moments]
            for key in computed[0]:
                values_S = torch.stack([values[key] for values in computed])
                statistics[f"{name}.{key}"] = values_S if len(values_S) > 1 else values_S[0]
        path = Path(self.path) if self.path else run_folder(trainer) / "reference.safetensors"
        if trainer.is_global_zero and statistics:
            stage = trainer.state.stage.value if trainer.state.stage else ""
            self._write(path, statistics, {"site": self.site, "stage": stage, "step": str(trainer.global_step)})

    def _write(self, path: Path, statistics: dict[str, Tensor], metadata: dict[str, str]) -> None:
        from safetensors.torch import save

        try:
            with replacing(path) as draft:
                draft.write_bytes(save(statistics, metadata))
        except OSError as error:
            raise UserError(f"ActivationReference: `path` {str(path)!r} cannot be written: {error}") from error

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add hooks, and begin with empty sums."""
        self._begin_pass(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add hooks, and begin with empty sums."""
        self._begin_pass(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the hooks, and write the file."""
        self._end_pass(trainer)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the hooks, and write the file."""
        self._end_pass(trainer)
