"""Keys and values of a decoder before it adds positions, as they are read from a model and put into its cache.

Rotary positions (RoPE, Su et al. 2021) turn a key by an angle that is proportional to its position. The output of
`k_proj` is the key before that turn. A key that is read there and put in there again is turned by the model's own code
to its new position. De-rotation and re-rotation are therefore exact for every kind of RoPE, and a model that has a norm
of keys (Qwen 3) applies it to a key of any origin.

Shapes: B batch, T positions, F width of a site, D width of all sites together.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from datamodules.errors import UserError
from lightning_modules.pretrained.causal_lm import Sites, inserted, recorded
from lightning_modules.pretrained.first_layers import FirstLayers, layer_stack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_modules.pretrained.loading import CausalLM

ROWS, LENGTH = 8, 64  # of the tokens from which the statistics of keys and values are taken
LACKS = "does not make its keys and values by one k_proj and one v_proj in each layer"

Run = Callable[[Tensor], Tensor]  # runs a model on tokens_BT


class KeyValues(Sites):
    """The keys and values of some layers, k_1, v_1, k_2, v_2, ... side by side, before positions are added.

    Vectors are standardised: each feature by its mean and deviation over random tokens. So all layers count alike, and
    a vector of zeros is an average key with an average value.

    Args:
        layers: The layers.
        run: Runs the model at least up to the last of these layers.
        vocabulary: Number of the model's tokens.

    Raises:
        UserError: A layer does not make its keys and values by `k_proj` and `v_proj`. The message is part of a sentence
            about the model.
    """

    mean_D: Tensor
    std_D: Tensor

    def __init__(self, layers: Sequence[nn.Module], run: Run, vocabulary: int):
        super().__init__([_projection(layer, name) for layer in layers for name in ("k_proj", "v_proj")], [])
        generator = torch.Generator().manual_seed(0)
        outputs = _outputs(self, run, torch.randint(vocabulary, (ROWS, LENGTH), generator=generator))
        self.widths = [output_BTF.shape[-1] for output_BTF in outputs]
        # Without the first position, which has outliers in many models
        output_ND = torch.cat(outputs, dim=-1)[:, 1:].flatten(0, 1).float()
        # Not in state dicts, since they follow from the weights of a frozen model
        self.register_buffer("mean_D", output_ND.mean(0), persistent=False)
        self.register_buffer("std_D", output_ND.std(0).clamp_min(1e-6), persistent=False)

    @property
    def layer_widths(self) -> list[int]:
        """Number of features of each layer, its keys and values together."""
        return [sum(self.widths[index : index + 2]) for index in range(0, len(self.widths), 2)]

    def outputs(self, vectors_BKD: Tensor) -> Tensor:
        """Return keys and values of standardised vectors."""
        return vectors_BKD.float() * self.std_D + self.mean_D

    def vectors(self, outputs_BTD: Tensor) -> Tensor:
        """Return standardised vectors of keys and values, in fp32."""
        return (outputs_BTD.float() - self.mean_D) / self.std_D


class FirstKeyValues(nn.Module):
    """Reads keys and values of some layers of a decoder, in the place of their hidden states.

    Args:
        first: Reads the hidden states; it stops after the last of its layers.
        path: Where the model comes from.

    Attributes:
        layers: The layers, counted from 1.
        sites: Their keys and values.

    Raises:
        UserError: The model's keys cannot be read without their positions.
    """

    def __init__(self, first: FirstLayers, path: str):
        super().__init__()
        self.first, self.layers = first, first.layers
        stack = None if first.count is None else layer_stack(first.model, first.count)
        vocabulary = cast(nn.Embedding, first.model.get_input_embeddings()).weight.shape[0]

        def run(tokens_BT: Tensor) -> Tensor:
            return cast(Tensor, first(tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool)))

        try:
            # Not bit by bit, since experts give a token other roundings beside other tokens
            if _differ(*run(torch.tensor([[3, 4], [3, 5]], device=first.model.device) % vocabulary)[:, 0]):
                raise UserError("is an encoder")
            if stack is None:
                raise UserError(LACKS)
            self.sites = KeyValues([stack[layer - 1] for layer in self.layers], run, vocabulary)
            _check_positions(stack[0], run, vocabulary)
        except UserError as error:
            raise _refused("model.source", path, first.model.config.model_type, error) from error

    @property
    def model(self) -> "PreTrainedModel":
        """The model, up to the last of the layers."""
        return self.first.model

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Return the standardised keys and values vectors_BTD of tokens, padded on the right; the mask is for them."""
        with recorded(self.sites) as found:
            self.first(tokens_BT, mask_BT)
        return self.sites.vectors(torch.cat(found, dim=-1))


def key_values_of(model: "CausalLM", path: str) -> KeyValues:
    """Return the keys and values of all layers of a causal language model as the sites of vectors.

    Args:
        model: The model.
        path: Where it comes from.

    Raises:
        UserError: The model's keys hold positions, or it passes more than keys and values from token to token.
    """
    stack = layer_stack(model, model.config.get_text_config().num_hidden_layers)
    vocabulary = model.get_input_embeddings().weight.shape[0]

    def run(tokens_BT: Tensor) -> Tensor:
        return cast(Tensor, model(input_ids=tokens_BT, use_cache=False).logits)

    try:
        if stack is None:
            raise UserError(LACKS)
        sites = KeyValues(list(stack), run, vocabulary)
        _check_positions(stack[0], run, vocabulary)
        _check_alone(sites, run, vocabulary)
    except UserError as error:
        raise _refused("model.target", path, model.config.model_type, error) from error
    return sites


def _projection(layer: nn.Module, name: str) -> nn.Module:
    if getattr(layer, "_compiled_call_impl", None) is not None:
        raise UserError("is compiled, which hides its keys and values (leave out compile)")
    found: list[nn.Module] = [module for path, module in layer.named_modules() if path.rpartition(".")[2] == name]
    if len(found) != 1:
        raise UserError(LACKS)
    return found[0]


@torch.no_grad()
def _outputs(sites: Sites, run: Run, tokens_BT: Tensor) -> list[Tensor]:
    device = next(sites.sites[0].parameters()).device
    with recorded(sites) as found:
        run(tokens_BT.to(device))
    if any(output.dim() != 3 for output in found):
        raise UserError(LACKS)
    return found


def _check_positions(layer: nn.Module, run: Run, vocabulary: int) -> None:
    """Check that keys of the first layer do not depend on their position: there they know no other token either."""
    tokens_BT = torch.full((1, 4), 5 % vocabulary)
    (key_BTF,) = _outputs(Sites([_projection(layer, "k_proj")], []), run, tokens_BT)
    if _differ(key_BTF, key_BTF[:, :1].expand_as(key_BTF)):
        raise UserError("has positions in its keys that cannot be taken out")


@torch.no_grad()
def _check_alone(sites: KeyValues, run: Run, vocabulary: int) -> None:
    """Check that keys and values are all that later tokens read of a token."""
    tokens_BT = torch.tensor([[3, 4, 5, 6], [3, 7, 8, 6]], device=sites.mean_D.device) % vocabulary
    column_BT = torch.tensor([[-1, 0, 1, -1]] * 2, device=tokens_BT.device)
    vectors_BKD = torch.ones(2, 2, sites.width, device=tokens_BT.device)
    with inserted(sites, vectors_BKD, column_BT):
        first_V, second_V = run(tokens_BT)[:, -1]
    if _differ(first_V, second_V):
        raise UserError("passes more than keys and values from token to token")


def _differ(x: Tensor, y: Tensor) -> bool:
    return bool(((x - y).abs() > torch.finfo(x.dtype).eps ** 0.5 * x.abs().max()).any())


def _refused(owner: str, path: str, kind: str, reason: UserError) -> UserError:
    return UserError(
        f"{owner}: '{path}' ({kind}) {reason}: use a TokenBridge in the place of a KVBridge, or a model such as Llama, "
        "Mistral or Qwen"
    )
