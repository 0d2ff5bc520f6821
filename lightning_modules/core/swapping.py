"""Swapping parameters of a model for those of another model, or for random ones, and back.

Shapes: S ensemble members, absent in an ordinary module; V vocabulary, D width of the residual stream, K outputs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from datamodules.errors import UserError
from lightning_modules.core.ensemble import fit_value
from lightning_modules.core.reporting import ensemble_size
from lightning_modules.core.seeding import seeded_generator
from lightning_modules.core.sites import match_parameters

SwapMode = Literal["copy", "procrustes", "random"]


def procrustes(donor_VD: Tensor, target_VD: Tensor) -> Tensor:
    """Return the orthogonal R_DD that minimises |donor R - target|_F (Schönemann 1966).

    R = U W^T, where U s W^T is the singular value decomposition of donor^T target. Fewer than D rows leave some
    directions open; R turns these as little as possible. Both arguments may have the same leading axes. Computed in
    fp64.
    """
    cross_DD = donor_VD.double().mT @ target_VD.double()
    # U W^T maximises <R, cross>. A multiple of the identity, far above rounding, decides between equal maxima only.
    identity_DD = torch.eye(cross_DD.shape[-1], dtype=cross_DD.dtype, device=cross_DD.device)
    norm = torch.linalg.matrix_norm(cross_DD, keepdim=True)
    left_DD, _, right_DD = torch.linalg.svd(cross_DD + 1e-10 * norm * identity_DD)
    rotation_DD: Tensor = left_DD @ right_DD
    return rotation_DD


@contextmanager
def swap_parameters(
    module: nn.Module,
    donor_state: Mapping[str, Tensor] | None,
    patterns: str | list[str],
    mode: SwapMode = "copy",
    basis: str = "*.token_embedding.weight",
    seed: int = 0,
) -> Iterator[list[str]]:
    """Replace parameters inside the `with` block and restore them after it, bit for bit.

    - `copy`: the donor's parameters of the same names.
    - `procrustes`: the donor's parameters, rotated into the model's basis of the residual stream. R is the rotation
      that brings the donor's token embeddings closest to the model's. Where the donor's stream is x, the model's is
      x R, and W R [..., D] reads from the model's stream what W reads from the donor's: x W^T = (x R) (W R)^T. Vectors
      (biases) have no axis in the stream and are copied. The rotation is exact for modules that read the stream
      itself; the gain or the centring of a norm in between does not rotate with it.
    - `random`: Gaussian values with the mean and the standard deviation of the model's parameter. Needs no donor.

    In an ensemble each member has its own rotation, mean and deviation. All members get the parameters of a donor
    without a member axis.

    Args:
        module: The model.
        donor_state: State dict of the donor, on any device; None is allowed for `random`.
        patterns: Name patterns of parameters, see `lightning_modules.core.sites`. For `procrustes`, matrices that read
            from the residual stream, and their biases.
        mode: The kind of swap.
        basis: For `procrustes`, the name pattern of the token embeddings [V, D].
        seed: Seed of the random values.

    Yields:
        The names of the swapped parameters.

    Raises:
        UserError: A pattern matches nothing, the donor lacks a parameter or has another shape, `basis` is not one
            matrix, or a matrix to rotate does not end in D. The model is unchanged then.
    """
    parameters = match_parameters(module, patterns)
    members = ensemble_size(module)
    if mode == "random":
        values = {
            name: _gaussian(parameter, members, seeded_generator(seed, index))
            for index, (name, parameter) in enumerate(parameters.items())
        }
    elif donor_state is None:
        raise UserError(f"Mode {mode!r} needs the parameters of a donor.")
    else:
        values = {name: _donated(donor_state, name, parameter, members) for name, parameter in parameters.items()}
        if mode == "procrustes":
            rotation = _rotation(module, donor_state, basis, members)
            values = {name: _rotated(name, value, rotation, members) for name, value in values.items()}
    originals = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        _assign(parameters, values)
        yield list(parameters)
    finally:
        _assign(parameters, originals)


@torch.no_grad()
def _assign(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _donated(donor_state: Mapping[str, Tensor], name: str, target: Tensor, members: int) -> Tensor:
    if name not in donor_state:
        nearest = ", ".join(map(repr, get_close_matches(name, donor_state, n=5, cutoff=0.0)))
        raise UserError(f"The donor has no parameter {name!r}; the nearest names are: {nearest or 'none at all'}.")
    value = fit_value(donor_state[name].detach(), target, members)
    if value is None:
        shapes = f"{tuple(donor_state[name].shape)}, the model's {tuple(target.shape)}"
        raise UserError(f"The donor's parameter {name!r} does not fit: its shape is {shapes}.")
    return value


def _rotation(module: nn.Module, donor_state: Mapping[str, Tensor], basis: str, members: int) -> Tensor:
    (name, embedding), *others = match_parameters(module, basis).items()
    if others or embedding.ndim - (members > 1) != 2:
        raise UserError(f"`basis` must be one matrix of token embeddings [V, D], and {basis!r} is not.")
    target_VD = embedding.detach().cpu()
    rows, width = target_VD.shape[-2:]
    if rows < width:
        rank_zero_warn(f"{name!r} has {rows} rows, which leave {width - rows} directions of the stream unaligned.")
    return procrustes(_donated(donor_state, name, target_VD, members).cpu(), target_VD)


def _rotated(name: str, value: Tensor, rotation: Tensor, members: int) -> Tensor:
    if value.ndim - (members > 1) < 2:
        return value
    if value.shape[-1] != rotation.shape[-1]:
        width, shape = rotation.shape[-1], tuple(value.shape)
        raise UserError(f"{name!r} of shape {shape} does not read from a residual stream of {width}.")
    if members > 1:  # [S, ..., K, D] @ [S, ..., D, D]
        rotation = rotation.view(members, *[1] * (value.ndim - 3), *rotation.shape[-2:])
    return (value.cpu().double() @ rotation).to(value.dtype)


def _gaussian(parameter: Tensor, members: int, generator: torch.Generator) -> Tensor:
    value = parameter.detach().cpu()
    deviation, mean = torch.std_mean(value.reshape(members, -1), dim=1, correction=0)
    shape = (members, *[1] * (value.ndim - 1)) if members > 1 else ()
    noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
    return mean.view(shape) + deviation.view(shape) * noise
