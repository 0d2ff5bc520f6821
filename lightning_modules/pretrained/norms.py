"""RMS norms of a transformers model as one operator each.

Shapes: D width.
"""

import torch
from torch import Tensor, nn


class FusedNorm(nn.RMSNorm):
    """x / sqrt(mean(x²) + eps) · weight in the precision of the weight, by one operator."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of x; under autocast x may be of lower precision than the weight."""
        return super().forward(x.to(self.weight.dtype))


def fuse_norms(model: nn.Module) -> None:
    """Replace the RMS norms of an fp32 model by `FusedNorm`, with the same weights under the same names.

    Transformers writes x / sqrt(mean(x²) + eps) · weight as six operators, and autograd doubles them. With few rows a
    GPU waits for the program to launch them. A norm is replaced only if both give the same numbers for an example, so
    that norms with another formula, such as Gemma's, stay. Those of other precisions stay as well, since transformers
    rounds before it multiplies by the weight.
    """
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if (fused := _fused(norm)) is not None:
                setattr(parent, name, fused)


@torch.no_grad()
def _fused(norm: nn.Module) -> FusedNorm | None:
    """Return the same norm as one operator; None if it is no RMS norm in fp32."""
    weight_D, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if not (isinstance(weight_D, nn.Parameter) and isinstance(eps, float) and type(norm).__name__.endswith("RMSNorm")):
        return None
    if weight_D.dim() != 1 or weight_D.dtype != torch.float32:
        return None
    fused = FusedNorm(len(weight_D), eps, device="meta").train(norm.training)
    fused.weight = weight_D
    # The second example is so small that eps counts
    example_D = torch.linspace(-1, 2, len(weight_D), device=weight_D.device)
    examples_2D = torch.stack([example_D, 1e-3 * example_D])
    return fused if torch.allclose(norm(examples_2D), fused(examples_2D)) else None
