"""A block of the decoder that the lines share: a mixer and an MLP, each with a norm before it.

A mixer is what moves information between positions: attention, a recurrence, a convolution. A block takes it as a
factory and asks nothing of it but the `Mixer` protocol.

Shapes: B batch, T positions, D width, M MLP width.
"""

from collections.abc import Callable
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor, nn

Factory = Callable[[], nn.Module]


class Mixer(Protocol):
    """The part of a block that moves information between positions.

    Attributes:
        site: The name of the mixer inside its block, such as `attn` in `blocks.0.attn`.
    """

    site: str

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the mixer's contribution to the residual stream, [B, T, D]; causal."""
        ...


@runtime_checkable
class StatefulMixer(Protocol):
    """A mixer that can also run one position at a time."""

    def init_state(self, batch: int) -> Any:
        """Return the state before the first position."""
        ...

    def step(self, x_BD: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Return the output at the next position, [B, D], and the state after it."""
        ...


class ExtensibleMixer(StatefulMixer, Protocol):
    """A mixer that can also run some positions at a time."""

    def extend(self, x_BTD: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Return the output at the next T positions, [B, T, D], and the state after them."""
        ...


class MLP(nn.Module):
    """D -> M -> D with a ReLU. Weights begin as N(0, 1 / fan-in), biases as zero."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        for layer in (self.up, self.down):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the MLP's contribution to the residual stream."""
        return cast(Tensor, self.down(self.up(x_BTD).relu()))


class Block(nn.Module):
    """x + dropout(mixer(norm(x))), then x + dropout(mlp(norm(x))).

    Sites: the mixer, under the name in its `site` attribute, `mid_residual` (the stream after the mixer), `mlp`, and
    `residual` (the stream after the MLP).

    Args:
        width: D.
        mixer: Makes the mixer.
        mlp: Makes the MLP; the block ends after the mixer if None.
        norm: Makes a norm of a given width.
        dropout: Share of the outputs of mixer and MLP that are zeroed in training.
    """

    def __init__(
        self, width: int, mixer: Factory, mlp: Factory | None, norm: Callable[[int], nn.Module], dropout: float = 0.0
    ):
        super().__init__()
        mixer_norm, made = norm(width), mixer()
        self.site = cast(Mixer, made).site
        self.add_module(f"{self.site}_norm", mixer_norm)
        self.add_module(self.site, made)
        self.mid_residual = nn.Identity()
        self.has_mlp = mlp is not None
        if mlp is not None:
            self.mlp_norm, self.mlp = norm(width), mlp()
        self.residual, self.dropout = nn.Identity(), nn.Dropout(dropout)

    @property
    def mixer(self) -> nn.Module:
        """The mixer."""
        return cast(nn.Module, getattr(self, self.site))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the residual stream after the block."""
        return self._after_mixer(x_BTD, self.mixer(self._mixer_input(x_BTD)))

    def step(self, x_BD: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Return the residual stream after the block at the next position, and the mixer's state after it."""
        mixed_BD, state = cast(StatefulMixer, self.mixer).step(self._mixer_input(x_BD), state)
        return self._after_mixer(x_BD, mixed_BD), state

    def extend(self, x_BTD: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Return the residual stream after the block at the next T positions, and the mixer's state after them."""
        mixed_BTD, state = cast(ExtensibleMixer, self.mixer).extend(self._mixer_input(x_BTD), state)
        return self._after_mixer(x_BTD, mixed_BTD), state

    def _mixer_input(self, x: Tensor) -> Tensor:
        return cast(Tensor, getattr(self, f"{self.site}_norm")(x))

    def _after_mixer(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = self.mid_residual(x + self.dropout(mixed))
        return cast(Tensor, self.residual(x + self.dropout(self.mlp(self.mlp_norm(x))) if self.has_mlp else x))
