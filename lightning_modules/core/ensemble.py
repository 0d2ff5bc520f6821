"""Many seeds of one network trained as one program: parameters stacked, the forward vmapped.

Launches are shared by all members, so a small network costs little more for S seeds than for one. Parameters keep their
names and gain a first axis; AdamW treats each element alone, so the stacked update is the members' own.

Hooks on submodules run inside the vmap, once for all members, on tensors without their member axis. What such a hook
needs of its member it asks `member_call`; what it only looks at it hands to `observe`.

Shapes: S members, the rest as a single member has it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from datamodules.errors import UserError


@dataclass
class MemberCall:
    """The call that a hook runs in, seen from one member.

    Attributes:
        index: Which member, a scalar tensor.
        labels: Its labels, or None.
        observed: What hooks handed to `observe`.
    """

    index: Tensor
    labels: Tensor | None
    observed: list[tuple[Callable[[Tensor], None], Tensor]] = field(default_factory=list)


_current: MemberCall | None = None


def member_call() -> MemberCall | None:
    """The call of an ensemble that is under way, or None in an ordinary forward."""
    return _current


def observe(x: Tensor, note: Callable[[Tensor], None]) -> None:
    """Pass x to `note`: at once in an ordinary forward; else after the ensemble's, which x may not leave, as x_S..."""
    if _current is None:
        note(x)
    else:
        _current.observed.append((note, x))


def stack_members(make: Callable[[], nn.Module], seeds: Sequence[int]) -> nn.Module:
    """A network whose parameters are those of `make()` under each seed, stacked; of one seed, the network itself.

    The random state is left as it was.
    """
    networks = []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            torch.default_generator.manual_seed(seed)  # the CPU's, where networks are made
            networks.append(make())
    if len(networks) > 1:
        stacked, _ = stack_module_state(networks)
        for name, value in stacked.items():
            owner, _, leaf = name.rpartition(".")
            setattr(networks[0].get_submodule(owner), leaf, nn.Parameter(value.detach()))
    return networks[0]


def call_members(
    network: nn.Module, members: int, tokens: Tensor, labels: Tensor | None = None, **options: Any
) -> tuple[Tensor, ...]:
    """Run every member: each output of the network with a first axis of S, in a tuple.

    Args:
        network: As `stack_members` made it.
        members: S.
        tokens: [S, B, T], or [B, T] for all members the same.
        labels: Likewise; for hooks that ask for them.
        **options: Passed on to the network.
    """
    notes: list[Callable[[Tensor], None]] = []

    def member(parameters: dict[str, Tensor], index: Tensor, tokens: Tensor, labels: Tensor | None) -> tuple:
        global _current
        _current = call = MemberCall(index, labels)
        try:
            outputs = functional_call(network, parameters, (tokens,), options)
        finally:
            _current = None
        notes[:] = [note for note, _ in call.observed]
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return outputs, tuple(x for _, x in call.observed)

    inputs = dict(network.named_parameters()), torch.arange(members, device=tokens.device), tokens, labels
    in_dims = 0, 0, _member_axis(tokens), _member_axis(labels)
    outputs, observed = vmap(member, in_dims, randomness="different")(*inputs)
    for note, x in zip(notes, observed, strict=True):
        note(x)
    return outputs


def _member_axis(x: Tensor | None) -> int | None:
    return 0 if x is not None and x.dim() == 3 else None


def member_state(state: dict[str, Tensor], member: int) -> dict[str, Tensor]:
    """The parameters of one member, as those of an ordinary network; a copy of its own."""
    return {name: value[member].clone() for name, value in state.items()}


def fit_value(given: Tensor, own: Tensor, members: int) -> Tensor | None:
    """A parameter in the shape of `own`, a single network's for every one of `members`; None if it does not fit."""
    fits = given.shape == own.shape or (members > 1 and given.shape == own.shape[1:])
    return given.expand(own.shape) if fits else None


def fit_state(state: dict[str, Tensor], own: dict[str, Tensor], members: int, source: str) -> dict[str, Tensor]:
    """A checkpoint's parameters in the shape of `own`: a single network's are given to every one of `members`.

    Raises:
        UserError: A parameter is missing, of another shape, or one too many; names it and `source`.
    """
    if more := sorted(state.keys() - own.keys()):
        raise UserError(f"{source} does not fit the model: it has a parameter that the model has not, {more[0]}")
    fitted = {}
    for name, value in own.items():
        if name not in state:
            raise UserError(f"{source} has no parameter {name}")
        fitted[name] = fit_value(state[name], value, members)
        if fitted[name] is None:
            shapes = f"{tuple(state[name].shape)} there and {tuple(value.shape)} in the model"
            raise UserError(f"{source} does not fit the model: {name} is {shapes}")
    return fitted
