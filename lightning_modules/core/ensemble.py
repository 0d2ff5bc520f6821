"""Several seeds of one network trained as one program: parameters are stacked and the forward is vmapped.

All members share the launches, so a small network costs little more for S seeds than for one. Parameters keep their
names and gain a first axis. AdamW treats each element alone, so the stacked update equals the updates of S runs.

Hooks on submodules run inside the vmap, once for all members, on tensors without a member axis. A hook asks
`member_call` for the index and the labels of its member, and hands tensors that it only reads to `observe`.

Shapes: S members; other axes as in a single network.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from datamodules.errors import UserError


@dataclass
class MemberCall:
    """The forward that a hook runs in, seen from one member.

    Attributes:
        index: Index of the member, a scalar tensor.
        labels: Labels of the member, or None.
        observed: Tensors that hooks handed to `observe`, with their receivers.
    """

    index: Tensor
    labels: Tensor | None
    observed: list[tuple[Callable[[Tensor], None], Tensor]] = field(default_factory=list)


_current: MemberCall | None = None


def member_call() -> MemberCall | None:
    """Return the forward of an ensemble that is running, or None in an ordinary forward."""
    return _current


def observe(x: Tensor, receive: Callable[[Tensor], None]) -> None:
    """Pass x to `receive`: at once in an ordinary forward; after the forward of an ensemble, with a first axis of S."""
    if _current is None:
        receive(x)
    else:
        _current.observed.append((receive, x))


def stack_members(make: Callable[[], nn.Module], seeds: Sequence[int]) -> nn.Module:
    """Return a network whose parameters are those of `make()` under each seed, stacked; for one seed, the network.

    The global random state stays as it was.
    """
    networks = []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            torch.default_generator.manual_seed(seed)  # networks are made on the CPU
            networks.append(make())
    if len(networks) > 1:
        stacked, _ = stack_module_state(networks)
        own = {parameter: name for name, parameter in networks[0].named_parameters()}
        trains = {name: parameter.requires_grad for name, parameter in networks[0].named_parameters()}
        members = {name: nn.Parameter(value.detach(), trains[name]) for name, value in stacked.items()}
        for name, parameter in list(networks[0].named_parameters(remove_duplicate=False)):  # tied ones stay tied
            owner, _, leaf = name.rpartition(".")
            setattr(networks[0].get_submodule(owner), leaf, members[own[parameter]])
    return networks[0]


def call_members(
    network: nn.Module, members: int, tokens: Tensor, labels: Tensor | None = None, **options: bool
) -> tuple[Tensor, ...]:
    """Run every member and return each output of the network with a first axis of S, in a tuple.

    Args:
        network: A network from `stack_members`.
        members: S.
        tokens: [S, B, T], or [B, T] where all members share them.
        labels: Likewise; for hooks that ask for them.
        **options: Passed on to the network.
    """
    receivers: list[Callable[[Tensor], None]] = []

    def call_member(
        parameters: dict[str, Tensor], index: Tensor, tokens: Tensor, labels: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        global _current
        _current = call = MemberCall(index, labels)
        try:
            outputs = functional_call(network, parameters, (tokens,), options)
        finally:
            _current = None
        receivers[:] = [receive for receive, _ in call.observed]
        return as_tuple(outputs), tuple(x for _, x in call.observed)

    parameters: dict[str, Tensor] = dict(network.named_parameters())
    inputs = parameters, torch.arange(members, device=tokens.device), tokens, labels
    in_dims = 0, 0, _member_axis(tokens), _member_axis(labels)
    outputs, observed = vmap(call_member, in_dims, randomness="different")(*inputs)
    for receive, x in zip(receivers, observed, strict=True):
        receive(x)
    return outputs


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the outputs of a network as a tuple."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _member_axis(x: Tensor | None) -> int | None:
    return 0 if x is not None and x.dim() == 3 else None


def member_state(state: dict[str, Tensor], member: int) -> dict[str, Tensor]:
    """Return a copy of one member's parameters, as those of an ordinary network."""
    return {name: value[member].clone() for name, value in state.items()}


def fit_value(donor: Tensor, target: Tensor, members: int) -> Tensor | None:
    """Return a parameter in the shape of `target`, repeated for every member if it has no member axis.

    None if the shapes do not fit.
    """
    fits = donor.shape == target.shape or (members > 1 and donor.shape == target.shape[1:])
    return donor.expand(target.shape) if fits else None


def fit_state(state: dict[str, Tensor], target: dict[str, Tensor], members: int, source: str) -> dict[str, Tensor]:
    """Return a checkpoint's parameters in the shapes of `target`; a single network's are given to every member.

    Raises:
        UserError: A parameter is missing, of another shape, or unknown; names it and `source`.
    """
    if unknown := sorted(state.keys() - target.keys()):
        raise UserError(f"{source} does not fit the model: it has a parameter that the model has not, {unknown[0]}")
    fitted = {}
    for name, value in target.items():
        if name not in state:
            raise UserError(f"{source} has no parameter {name}")
        donor = fit_value(state[name], value, members)
        if donor is None:
            shapes = f"{tuple(state[name].shape)} there and {tuple(value.shape)} in the model"
            raise UserError(f"{source} does not fit the model: {name} is {shapes}")
        fitted[name] = donor
    if mismatch := tied_mismatch(fitted, target):
        raise UserError(f"{source} does not fit the model: {mismatch}")
    return fitted


def tied_mismatch(state: Mapping[str, Any], target: Mapping[str, Any]) -> str | None:
    """Return which names share a parameter in `target` and have different values in `state`; None if none have."""
    first: dict[tuple[Any, ...], str] = {}
    for name, value in target.items():
        if not isinstance(value, Tensor) or value.data_ptr() == 0:  # no values, as on the meta device
            continue
        other = first.setdefault((value.device, value.data_ptr(), value.shape, value.stride()), name)
        if other != name and not _same(state[other], state[name]):
            return f"{other} and {name} are one parameter in the model, and differ there"
    return None


def _same(x: Any, y: Any) -> bool:
    """Return whether two tensors are the same, with NaN at the same places; true for what are no tensors."""
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return True
    return x.shape == y.shape and bool(((x == y) | (x.isnan() & y.isnan())).all())
