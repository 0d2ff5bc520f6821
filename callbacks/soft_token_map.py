"""Soft tokens among the words of the target, over training."""

import json

from lightning.pytorch import LightningModule, Trainer

from callbacks.at_validations import AtValidations
from callbacks.base import check_positive, refuse_second
from callbacks.held_out import evaluation
from callbacks.throughput import off_the_clock
from datamodules.errors import UserError
from lightning_modules.core.files import replacing
from lightning_modules.core.held_out import held_out_batches
from lightning_modules.core.reporting import add_figure, is_dry_run, keep_scalars, log_scalars, run_folder
from lightning_modules.core.samples import gather_dealt
from lightning_modules.telepathy import Telepathy
from lightning_modules.telepathy.embedding_map import EmbeddingSpace, PlacedQuestion, measures, placed, snapshot
from lightning_modules.telepathy.figures import embedding_map


class SoftTokenMap(AtValidations):
    """Shows where the soft tokens of some held-out questions lie among the embeddings of the target.

    It runs at the end of `validate`, and at some validations of a fit:

    - `soft_token_map/nearest_cosine`, `soft_token_map/size`, `soft_token_map/in_question`: see
      `lightning_modules.telepathy.embedding_map.measures`;
    - a figure of soft tokens and embeddings along the first two principal components of the embeddings, with the words
      nearest to some soft tokens, in loggers that take figures;
    - `soft_tokens/<step>.json` in the run's folder, with the place and the nearest word of every soft token, from
      which `benchmarks/telepathy_pictures.py tokens` draws several steps as one picture.

    The course of training is the same as without the callback.

    Example::

        trainer:
          callbacks+:
            - {class_path: SoftTokenMap, init_args: {every_n_steps: 200}}

    Args:
        n_samples: Held-out questions over all ranks, the same ones each time.
        every_n_steps: In a fit, measure at the first validation after each n optimizer steps; 0 for never.

    Raises:
        UserError: A number is out of range; at `setup`, there are two of these callbacks, or the module has no soft
            tokens in the embedding space of a target; at a validation, the data gives no held-out questions.
    """

    def __init__(self, n_samples: int = 8, every_n_steps: int = 500) -> None:
        check_positive(self, n_samples=n_samples)
        super().__init__(every_n_steps)
        self.n_samples = n_samples

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second callback, and modules whose soft tokens are no embeddings."""
        refuse_second(trainer, self)
        if not isinstance(pl_module, Telepathy):
            raise UserError(f"SoftTokenMap needs soft tokens, which {type(pl_module).__name__} does not have")
        if pl_module.target.takes_key_values:
            raise UserError("SoftTokenMap: the soft tokens of a KVBridge are keys and values, and no embeddings")

    def at_validation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure."""
        with off_the_clock(trainer), evaluation(trainer, pl_module):
            self._measure(trainer, pl_module)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Telepathy)  # see `setup`
        batches = held_out_batches(trainer, self.n_samples, "SoftTokenMap")
        space = EmbeddingSpace(pl_module.target)
        mine: list[PlacedQuestion] = []
        for batch in map(trainer.strategy.batch_to_device, batches):
            mine += placed(space, batch, pl_module(batch))
        questions = gather_dealt(mine)
        values = {f"soft_token_map/{name}": value for name, value in measures(questions).items()}
        log_scalars(trainer, values)
        keep_scalars(trainer, values)
        folder = run_folder(trainer) / "soft_tokens"
        if not trainer.is_global_zero or is_dry_run(trainer):
            return
        shown = snapshot(space, questions, trainer.global_step)
        add_figure(trainer, "soft_token_map", embedding_map([shown]))
        with replacing(folder / f"{trainer.global_step}.json") as draft:
            draft.write_text(json.dumps(shown), encoding="utf-8")
