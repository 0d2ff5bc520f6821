"""Another run's parameters in the place of a model's own, while it is evaluated.

Shapes: S members of an ensemble, absent in an ordinary module; V vocabulary, D width of the residual stream, K outputs.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from datamodules.errors import UserError
from lightning_modules.core.checkpoints import read_state
from lightning_modules.core.ensemble import fit_value
from lightning_modules.core.reporting import ensemble_size
from lightning_modules.core.sites import match_parameters

SwapMode = Literal["copy", "procrustes", "random"]
DONOR = "ParameterSwap's donor"


def procrustes(donor_VD: Tensor, own_VD: Tensor) -> Tensor:
    """The orthogonal R_DD that minimises |donor R - own|_F: R = U W^T, where U s W^T = donor^T own is the SVD.

    Directions that the rows leave open, as fewer than D rows do, are turned as little as possible. Both may have
    leading axes in common. Computed in fp64.
    """
    cross_DD = donor_VD.double().mT @ own_VD.double()
    # U W^T maximises <R, cross>; a trace of the identity, far above rounding, decides only between equal maxima.
    identity_DD = torch.eye(cross_DD.shape[-1], dtype=cross_DD.dtype, device=cross_DD.device)
    cross_DD = cross_DD + 1e-10 * cross_DD.norm(dim=(-2, -1), keepdim=True) * identity_DD
    left_DD, _, right_DD = torch.linalg.svd(cross_DD)
    return left_DD @ right_DD


@contextmanager
def swap_parameters(
    module: nn.Module,
    donor_state: Mapping[str, Tensor] | None,
    patterns: str | list[str],
    mode: SwapMode = "copy",
    basis: str = "*.token_embedding.weight",
    seed: int = 0,
) -> Iterator[list[str]]:
    """Gives parameters other values inside the `with`, and their own ones back after it, bit for bit.

    - `copy`: the donor's values, under the same names.
    - `procrustes`: the donor's, turned into the model's residual basis. R is the rotation that brings the donor's token
      embeddings closest to the model's. Where the donor's stream is x, the model's is x R, and what W [..., D] reads
      from the former, W R reads from the latter: x W^T = (x R) (W R)^T. Vectors (biases), which are in no residual
      basis, are copied. This is exact for what reads the stream itself; a norm's gain or centring in between does not
      turn with it.
    - `random`: Gaussian, with the mean and the standard deviation of the model's own parameter; needs no donor.

    In an ensemble each member has its own rotation, mean and deviation; a donor without a member axis is given to all.

    Args:
        module: The model.
        donor_state: The donor's state dict, on any device; may be None for `random`.
        patterns: Name patterns of whole parameters, see `lightning_modules.core.sites`. For `procrustes`, of what reads from
            the residual stream.
        mode: As above.
        basis: For `procrustes`, name pattern of the token embeddings [V, D].
        seed: Of the random values.

    Yields:
        The names of the swapped parameters.

    Raises:
        UserError: If a pattern matches nothing, the donor lacks a parameter or has another shape, `basis` is not one
            matrix, or a matrix to be turned does not end in D. Nothing has changed then.
    """
    matched = match_parameters(module, patterns)
    members = ensemble_size(module)
    match mode:
        case "copy":
            values = {name: _donated(donor_state, name, own, members) for name, own in matched.items()}
        case "procrustes":
            rotation = _rotation(module, donor_state, basis, members)
            values = {
                name: _rotated(name, _donated(donor_state, name, own, members), rotation, members)
                for name, own in matched.items()
            }
        case "random":
            values = {
                name: _gaussian(own, members, torch.Generator().manual_seed(hash((seed, index)) % 2**63))
                for index, (name, own) in enumerate(matched.items())
            }
    kept = {name: parameter.detach().clone() for name, parameter in matched.items()}
    try:
        _assign(matched, values)
        yield list(matched)
    finally:
        _assign(matched, kept)


@torch.no_grad()
def _assign(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _donated(donor_state: Mapping[str, Tensor], name: str, own: Tensor, members: int) -> Tensor:
    if name not in donor_state:
        nearest = ", ".join(map(repr, get_close_matches(name, donor_state, n=5, cutoff=0.0)))
        raise UserError(f"The donor has no parameter {name!r}; the nearest names are: {nearest or 'none at all'}.")
    donated = fit_value(donor_state[name].detach(), own, members)
    if donated is None:
        shapes = f"{tuple(donor_state[name].shape)}, the model's {tuple(own.shape)}"
        raise UserError(f"The donor's parameter {name!r} does not fit: its shape is {shapes}.")
    return donated


def _rotation(module: nn.Module, donor_state: Mapping[str, Tensor], basis: str, members: int) -> Tensor:
    (name, own), *others = match_parameters(module, basis).items()
    if others or own.ndim - (members > 1) != 2:
        raise UserError(f"ParameterSwap: `basis` must be one matrix of token embeddings [V, D], unlike {basis!r}.")
    own_VD = own.detach().cpu()
    rows, width = own_VD.shape[-2:]
    if rows < width:
        rank_zero_warn(f"{name!r} has {rows} rows, which leave {width - rows} directions of the stream unaligned.")
    return procrustes(_donated(donor_state, name, own_VD, members).cpu(), own_VD)


def _rotated(name: str, donated: Tensor, rotation: Tensor, members: int) -> Tensor:
    if donated.ndim - (members > 1) < 2:
        return donated
    if donated.shape[-1] != rotation.shape[-1]:
        width, shape = rotation.shape[-1], tuple(donated.shape)
        raise UserError(f"ParameterSwap: {name!r} of shape {shape} does not read from a residual stream of {width}.")
    if members > 1:  # [S, ..., K, D] @ [S, ..., D, D]
        rotation = rotation.view(members, *[1] * (donated.ndim - 3), *rotation.shape[-2:])
    return (donated.cpu().double() @ rotation).to(donated.dtype)


def _gaussian(own: Tensor, members: int, generator: torch.Generator) -> Tensor:
    own = own.detach().cpu()
    deviation, mean = torch.std_mean(own.reshape(members, -1), dim=1, correction=0)
    shape = (members, *[1] * (own.ndim - 1)) if members > 1 else ()
    return mean.view(shape) + deviation.view(shape) * torch.randn(own.shape, generator=generator, dtype=own.dtype)


class ParameterSwap(Callback):
    """Evaluates the model with a donor run's parameters in the place of its own: validate, test and predict.

    The values that `swap_parameters` describes are in place from the start of the evaluation to its end; then, also if
    it fails, the model has its own again. By default the routing: queries and keys of whole heads. Two swaps of one
    trainer must not share a parameter.

    Args:
        donor: Checkpoint of a run of the same architecture; `copy` and `procrustes` need it.
        parameters: Name patterns, see `lightning_modules.core.sites`.
        mode: `copy` the donor's, `procrustes` turn them into the model's residual basis first, or `random`.
        basis: For `procrustes`, name pattern of the token embeddings.
        seed: Of `random`.

    Raises:
        UserError: At `setup`, if the donor does not exist.
        UserError: At once, if the mode lacks its donor; at `setup`, for fit, and if a pattern matches nothing or the
            donor is damaged; at the start of the evaluation, if the donor does not fit.
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
        self.donor = donor if mode != "random" else None
        self.parameters = list(parameters)
        self.mode = mode
        self.basis = basis
        self.seed = seed
        self._donor_state: dict[str, Tensor] | None = None
        self._swapped = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses training, names that match nothing, and a donor that cannot be read."""
        if stage == "fit":
            raise UserError("ParameterSwap acts on validate, test and predict; take it out of the callbacks of fit.")
        match_parameters(pl_module, self.parameters)
        # Read before anything runs, though used only later: Lightning restores `--ckpt_path` after `setup`
        self._donor_state = None if self.donor is None else read_state(self.donor, DONOR)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        swap = swap_parameters(pl_module, self._donor_state, self.parameters, self.mode, self.basis, self.seed)
        self._swapped.enter_context(swap)

    def _end(self, *_: Any) -> None:
        self._swapped.close()

    on_validation_start = on_test_start = on_predict_start = _begin
    on_validation_end = on_test_end = on_predict_end = on_exception = _end
