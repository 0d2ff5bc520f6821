"""The objective of bridges that sample."""

from typing import Literal

from torch import Tensor

from lightning_modules.telepathy.flaws import NOTES_SCALE
from lightning_modules.telepathy.flow import FlowBridge
from lightning_modules.telepathy.objectives.step import BridgeStep, Objective


def make_flow(text: Literal["aligned", "question", "answer"] = "question") -> Objective:
    """The error of the velocity from noise to the embeddings of a text, see `FlowBridge`.

    The embeddings are divided by their root mean square, so that they have the size of the noise. With the flaw
    `flow_scale` they have the size of Mistral's embeddings (0.003), and the velocity of the noise alone satisfies the
    loss.

    Args:
        text: `aligned`: the question, each token at a soft token of the source token in which it begins. `question`,
            `answer`: the k-th token at the k-th soft token, as in the notes.
    """

    def loss(step: BridgeStep) -> Tensor:
        bridge, encoding = step.bridge, step.encoding
        assert isinstance(bridge, FlowBridge)  # the module has checked it
        assert encoding.seed_B is not None
        text_BQD, mask_BQ = step.embedded(text)
        factor = NOTES_SCALE if "flow_scale" in step.flaws else 1.0
        states = encoding.states_BSC, step.batch["source_mask"]
        error = bridge.flow_loss(*states, encoding.seed_B, text_BQD * (factor / step.scale), mask_BQ)
        return error + 0 * step.soft_BKD.sum()  # DDP waits for a gradient of every parameter, that of the scale too

    return Objective(loss, needs=(text,))
