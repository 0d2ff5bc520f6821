"""A chain of two agents by text and by soft tokens: how long it takes, and how often the answer is right."""

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.base import check_positive, refuse_second
from callbacks.held_out import evaluation
from datamodules.errors import UserError
from datamodules.problems import Problem
from lightning_modules.core.held_out import held_out_batches
from lightning_modules.core.reporting import is_dry_run, keep_scalars, log_scalars
from lightning_modules.pretrained.loading import Pretrained
from lightning_modules.telepathy import Telepathy
from lightning_modules.telepathy.agents import Writer, measure_chain, pass_on

DRY_SAMPLES = 2


class AgentChain(Callback):
    """Passes held-out questions from one agent to the other, by text and by soft tokens, one at a time.

    By text, `writer` writes the question out token by token, and the module's target reads that text. By soft tokens,
    the module's source only reads. At the end of `test`, `chain/<measure>` is what
    `lightning_modules.telepathy.agents.measure_chain` computes of the times and the answers. Times are those of this
    machine at this moment: leave its cores free.

    Example::

        trainer:
          callbacks+:
            - {class_path: AgentChain, init_args: {writer: {path: assets/pair/source}}}

    Args:
        writer: The source as a whole causal language model, which the module does not have.
        n_samples: Questions, the first ones of the validation set.
        prompt: What makes the writer write the question.

    Raises:
        UserError: `n_samples` is not positive; at `setup`, there are two of these callbacks, the module has no bridge,
            the run has several processes, or the writer is no causal language model; at the end of a test, the data
            gives no held-out questions.
    """

    def __init__(self, writer: Pretrained, n_samples: int = 100, prompt: str = "Question: {question}\nRepeat:") -> None:
        check_positive(self, n_samples=n_samples)
        self.writer, self.n_samples, self.prompt = writer, n_samples, prompt
        self._loaded: Writer | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the writer before a test."""
        refuse_second(trainer, self)
        if not isinstance(pl_module, Telepathy):
            raise UserError(f"AgentChain needs a bridge between two models, not {type(pl_module).__name__}")
        if trainer.world_size > 1:
            raise UserError("AgentChain takes the time of one process: set trainer.devices to 1")
        if stage == "test":
            self._loaded = Writer(self.writer, self.prompt, trainer.strategy.root_device)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, and free the writer."""
        assert isinstance(pl_module, Telepathy)  # see `setup`
        assert self._loaded is not None
        with evaluation(trainer, pl_module):
            problems = self._problems(trainer)
            measures = measure_chain(pass_on(pl_module, self._loaded, problems, pl_module.answer_limit))
        self._loaded = None
        values = {f"chain/{name}": value for name, value in measures.values.items()}
        log_scalars(trainer, values)
        keep_scalars(trainer, values)
        pl_module.counts |= {f"chain/{name}": count for name, count in measures.counts.items()}
        pl_module.hits |= {f"chain/{name}": [hits] for name, hits in measures.hits.items()}
        pl_module.intervals |= {f"chain/{name}": interval for name, interval in measures.intervals.items()}

    def _problems(self, trainer: Trainer) -> list[Problem]:
        """Return held-out questions."""
        count = min(self.n_samples, DRY_SAMPLES) if is_dry_run(trainer) else self.n_samples
        batches = held_out_batches(trainer, count, "AgentChain")
        return [problem for batch in batches for problem in batch["problems"]]
