"""The statistics of an activation in a control run, for clamps to hold another run to.

Positions N, classes C, features D. A class is the target label at a position; a position of label -100 has none.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from callbacks.base import HookedCallback, first_tensor
from datamodules.batch import IGNORE
from datamodules.errors import UserError
from lightning_modules.core.ensemble import observe
from lightning_modules.core.reporting import ensemble_size
from lightning_modules.core.sites import match_modules


def labels_of(batch: Any, key: str) -> Tensor | None:
    """The batch's labels, or None where it has none under that key."""
    return batch.get(key) if isinstance(batch, Mapping) else None


def fitting_labels(labels: Tensor | None, x: Tensor) -> Tensor | None:
    """The labels if there is one a position of x `[..., D]`, else None."""
    return labels if labels is not None and labels.shape == x.shape[:-1] else None


def read_reference(path: str, keys: list[str], members: int = 1) -> list[Tensor]:
    """The statistics of those names, from a file that `ActivationReference` wrote: scalars, or [S] of an ensemble.

    Raises:
        UserError: There is no such file.
        UserError: It lacks one of the names, or is of an ensemble of another size than `members`.
    """
    if not Path(path).is_file():
        raise UserError(f"There is no reference {path!r}; a run with an ActivationReference writes one.")
    statistics = load_file(path)
    for key in keys:
        if key not in statistics:
            nearest = ", ".join(map(repr, get_close_matches(key, statistics, n=5, cutoff=0.0)))
            raise UserError(f"The reference {path!r} has no {key!r}; the nearest that it has are {nearest}.")
    for key in keys:
        if statistics[key].dim() and len(statistics[key]) != members:
            raise UserError(f"The reference {path!r} has {len(statistics[key])} members, and the model {members}.")
    return [statistics[key] for key in keys]


class ActivationReference(HookedCallback):
    """Records an activation over each validation and test pass, and writes what `ActivationClamp` holds a run to.

    The file has, for every module that matches, under `<module name>.`:

    - `radius`: the mean over positions of |x|;
    - `spread.target`: s, with s^2 = sum |x - mu_c|^2 / (N - C), the trace of the pooled within-class covariance;
    - `spread.batch`: the same with all positions as one class.

    Positions are those with a label; where the batch has no labels for this site, all of them, and `spread.target` is
    left out. Of an ensemble, each is one value a member. Sums are in fp64 and over all ranks. Every pass overwrites the
    file: the last one counts, so `test` after `fit` records the test set.

    Args:
        site: Name pattern of the modules, see `lightning_modules.core.sites`.
        path: Where to write; by default `reference.safetensors` in the run's folder.
        labels: The batch's key of the target labels, one a position of x.

    Raises:
        UserError: At `setup`, if the site matches nothing, or if two of these callbacks would write one file.
    """

    def __init__(self, site: str, path: str | None = None, labels: str = "labels") -> None:
        self.site = site
        self.path = path
        self.labels = labels
        self._handles: list[RemovableHandle] = []
        self._moments: dict[str, list[_Moments]] = {}  # one a member
        self._labels: Tensor | None = None
        self._in_step = False

    @property
    def state_key(self) -> str:
        """Distinct for two references in one trainer."""
        return self._generate_state_key(site=self.site, path=self.path)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the site."""
        writers = [callback for callback in trainer.callbacks if isinstance(callback, ActivationReference)]
        if any(other is not self and other.path == self.path for other in writers):
            raise UserError("Two ActivationReference callbacks write one file; give each a `path` of its own.")
        match_modules(pl_module, self.site)

    def _hook(self, name: str) -> Any:
        # Compiled modules leave their graph here: the sums must not be traced into it.
        @torch.compiler.disable
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._in_step:
                observe(first_tensor(output, self.site).detach(), note)

        def note(x: Tensor) -> None:
            moments = self._moments[name]
            for member, own in enumerate(x if len(moments) > 1 else [x]):
                moments[member].add(own, fitting_labels(self._labels, own))

        return hook

    def _begin_pass(self, trainer: Trainer, pl_module: LightningModule) -> None:
        modules, members = match_modules(pl_module, self.site), ensemble_size(pl_module)
        self._moments = {name: [_Moments(pl_module.device) for _ in range(members)] for name in modules}
        # For this pass alone, so that training steps run, and compile, as if there were no such callback
        self._handles = [module.register_forward_hook(self._hook(name)) for name, module in modules.items()]

    def _begin_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
        self._labels = labels_of(batch, self.labels)
        self._in_step = not trainer.sanity_checking

    def _end_step(self, *_: Any) -> None:
        self._labels = None
        self._in_step = False

    def _end_pass(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release()
        if trainer.sanity_checking:
            return
        # Both are collective: every rank takes part before rank zero alone writes.
        statistics = {}
        for name, moments in self._moments.items():
            computed = [own.compute(trainer.strategy) for own in moments]
            for key in computed[0]:
                values_S = torch.stack([own[key] for own in computed])
                statistics[f"{name}.{key}"] = values_S if len(values_S) > 1 else values_S[0]
        path = Path(self.path or Path(trainer.log_dir or trainer.default_root_dir) / "reference.safetensors")
        if trainer.is_global_zero and statistics:
            path.parent.mkdir(parents=True, exist_ok=True)
            metadata = {"site": self.site, "stage": trainer.state.stage.value, "step": str(trainer.global_step)}
            save_file(statistics, path, metadata)

    on_validation_start = on_test_start = _begin_pass
    on_validation_batch_start = on_test_batch_start = _begin_step
    on_validation_batch_end = on_test_batch_end = _end_step
    on_validation_epoch_end = on_test_epoch_end = _end_pass


class _Moments:
    """Sums over one pass, in fp64: a difference of large sums follows. The table of classes grows with the labels."""

    def __init__(self, device: torch.device) -> None:
        self.totals = torch.zeros(2, dtype=torch.float64, device=device)  # of |x|, and of |x|^2
        self.counts_C = torch.zeros(0, dtype=torch.float64, device=device)
        self.sums_CD = torch.zeros(0, 0, dtype=torch.float64, device=device)
        self.unlabelled = False

    def add(self, x: Tensor, labels: Tensor | None) -> None:
        self.unlabelled |= labels is None
        labels = x.new_zeros(x.shape[:-1], dtype=torch.long) if labels is None else labels
        x_ND, labels_N = x[labels != IGNORE].double(), labels[labels != IGNORE]
        if not len(labels_N):
            return
        self._grow(int(labels_N.max()) + 1, x_ND.shape[1])
        self.totals += torch.stack([x_ND.norm(dim=1).sum(), x_ND.square().sum()])
        self.counts_C.index_add_(0, labels_N, torch.ones_like(x_ND[:, 0]))
        self.sums_CD.index_add_(0, labels_N, x_ND)

    def _grow(self, n_classes: int, n_features: int) -> None:
        more = max(n_classes - len(self.counts_C), 0)
        self.counts_C = nn.functional.pad(self.counts_C, (0, more))
        self.sums_CD = nn.functional.pad(self.sums_CD, (0, n_features - self.sums_CD.shape[1], 0, more))

    def compute(self, strategy: Strategy) -> dict[str, Tensor]:
        """The statistics over all ranks; collective. Empty where no rank saw a position."""
        shape = torch.tensor([*self.sums_CD.shape, self.unlabelled], device=self.totals.device)
        n_classes, n_features, unlabelled = strategy.reduce(shape, reduce_op="max").tolist()
        self._grow(n_classes, n_features)
        norms, squares = strategy.reduce(self.totals, reduce_op="sum")
        counts_C = strategy.reduce(self.counts_C, reduce_op="sum")
        sums_CD = strategy.reduce(self.sums_CD, reduce_op="sum")
        n, seen = counts_C.sum(), counts_C > 0

        statistics = {}
        if n > 0:
            statistics["radius"] = norms / n
        if n > 1:
            statistics["spread.batch"] = ((squares - sums_CD.sum(0).square().sum() / n) / (n - 1)).clamp(min=0).sqrt()
        if n > seen.sum() and not unlabelled:
            between = (sums_CD[seen].square().sum(1) / counts_C[seen]).sum()
            statistics["spread.target"] = ((squares - between) / (n - seen.sum())).clamp(min=0).sqrt()
        return {key: value.cpu() for key, value in statistics.items()}
