"""A causal language model called with vectors in the place of some tokens, for the logits of some positions.

Everything else is the model's own forward: the scale of its embeddings and of its logits, its caps, its masks.

Shapes: B batch, T positions, K vectors, D width of a vector, F width of a site, N positions of the whole batch, V
vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning_modules.pretrained.loading import CausalLM

CHUNK = 4096  # tokens at a time in fp32: a vocabulary may be large


class Sites(nn.Module):
    """Modules of a model whose outputs vectors can replace: a vector has one part for each site, side by side.

    Args:
        modules: The modules.
        widths: The width F of each module's output.
    """

    def __init__(self, modules: Sequence[nn.Module], widths: Sequence[int]):
        super().__init__()
        self.sites, self.widths = tuple(modules), list(widths)  # a tuple, so that they stay parts of the model alone

    @property
    def width(self) -> int:
        """Width D of a vector."""
        return sum(self.widths)

    def outputs(self, vectors_BKD: Tensor) -> Tensor:
        """Return what vectors stand for in the outputs of the sites: the vectors themselves."""
        return vectors_BKD

    def vectors(self, outputs_BTD: Tensor) -> Tensor:
        """Return vectors of outputs, the inverse of `outputs`."""
        return outputs_BTD


def vocabulary(model: "CausalLM") -> int:
    """Return the number of tokens that a model reads, which may differ from that of its tokenizer."""
    return model.get_input_embeddings().weight.shape[0]


def embedding_of(model: "CausalLM") -> Sites:
    """Return the model's embedding as the only site; vectors are at the scale of its output."""
    embedding = model.get_input_embeddings()
    return Sites([embedding], [embedding.weight.shape[1]])


@torch.no_grad()
def embedding_scale(model: "CausalLM") -> float:
    """Return the root mean square of the embedding's output over the vocabulary.

    It is not that of its weights: some models scale inside of the embedding, such as Gemma 3 by the root of D.
    """
    embedding = model.get_input_embeddings()
    (size, width), device = embedding.weight.shape, embedding.weight.device
    parts = [torch.arange(start, min(start + CHUNK, size), device=device) for start in range(0, size, CHUNK)]
    squares = [embedding(tokens).float().square().sum().item() for tokens in parts]
    return float((sum(squares) / (size * width)) ** 0.5)


@torch.no_grad()
def reads_ahead(model: "CausalLM") -> bool:
    """Return whether logits depend on later tokens, as those of an encoder do."""
    tokens_BT = torch.tensor([[1, 2, 3], [1, 2, 4]], device=model.device) % vocabulary(model)
    first_TV, second_TV = model(input_ids=tokens_BT, use_cache=False).logits[:, :2].float()
    rounding = torch.finfo(model.dtype).eps ** 0.5 * first_TV.abs().max()
    return bool(((first_TV - second_TV).abs() > rounding).any())


@contextmanager
def inserted(sites: Sites, vectors_BKD: Tensor | None, column_BT: Tensor) -> Iterator[None]:
    """Replace outputs of sites by vectors, in the first call of each site inside the block.

    The model still gets tokens, since some models look up more than their embedding, such as Gemma 4.

    Args:
        sites: The sites.
        vectors_BKD: The vectors; None to replace nothing.
        column_BT: For each position the vector k that goes there, -1 for a token.
    """
    if vectors_BKD is None:
        yield
        return
    with ExitStack() as hooks:
        parts = sites.outputs(vectors_BKD).split(sites.widths, dim=-1)  # type: ignore[no-untyped-call]  # torch lacks types
        for site, part_BKF in zip(sites.sites, parts, strict=True):
            hooks.callback(_insert(site, part_BKF, column_BT).remove)
        yield


def _insert(site: nn.Module, part_BKF: Tensor, column_BT: Tensor) -> Any:
    """Add a hook that replaces outputs of the next call of a site; return its handle."""

    def insert(module: nn.Module, args: Any, output_BTF: Tensor) -> Tensor:
        handle.remove()  # generation calls the site again for each new token
        at_BT1 = (column_BT >= 0)[..., None]
        index_BTF = column_BT.clamp_min(0)[..., None].expand_as(output_BTF)
        return torch.where(at_BT1, part_BKF.to(output_BTF.dtype).gather(1, index_BTF), output_BTF)

    handle = site.register_forward_hook(insert)
    return handle


@contextmanager
def recorded(sites: Sites) -> Iterator[list[Tensor]]:
    """Yield a list that gets the outputs of the sites, in their order; a site has been called once in the block."""
    found: list[Tensor] = [torch.empty(0)] * len(sites.sites)
    with ExitStack() as hooks:
        for index, site in enumerate(sites.sites):

            def keep(module: nn.Module, args: Any, output_BTF: Tensor, index: int = index) -> None:
                found[index] = output_BTF

            hooks.callback(site.register_forward_hook(keep).remove)
        yield found


def logits_at(
    model: "CausalLM",
    tokens_BT: Tensor,
    predict_N: Tensor,
    vectors_BKD: Tensor | None,
    column_BT: Tensor,
    sites: Sites | None = None,
) -> Tensor:
    """Return the model's logits_NV at some positions; the LM head computes no others.

    Padding has to come last in a row, so that causal attention needs no mask.

    Args:
        model: The model.
        tokens_BT: The tokens.
        predict_N: Flat positions, row * T + column.
        vectors_BKD: Vectors in the place of tokens, see `inserted`.
        column_BT: The places of the vectors.
        sites: Where vectors go in; None for the embedding.
    """
    selected = False

    def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal selected
        selected = True
        return args[0].flatten(0, -2)[predict_N][None], *args[1:]

    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(select) if head is not None else None
    try:
        with inserted(sites or embedding_of(model), vectors_BKD, column_BT):
            logits: Tensor = model(input_ids=tokens_BT, use_cache=False).logits
    finally:
        if handle is not None:
            handle.remove()
    return logits.flatten(0, -2) if selected else logits.flatten(0, -2)[predict_N]
