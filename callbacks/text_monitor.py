"""Samples of text in training, and whether they repeat themselves more than the text that the model learns from."""

from lightning.pytorch import LightningModule, Trainer

from callbacks.probe import Probe, naming
from datamodules import TextCorpus
from datamodules.errors import UserError, check_numbers
from datamodules.sequence_task import Split
from lightning_modules.core.contracts import StatefulNetwork
from lightning_modules.core.diversity import distinct_n
from lightning_modules.core.ensemble_module import EnsembleModule
from lightning_modules.core.generation import Sampling, generate
from lightning_modules.core.repetition import repetition_rate
from lightning_modules.core.reporting import (
    add_text,
    is_dry_run,
    keep_scalars,
    log_scalars,
    logged_step,
    run_folder,
)
from lightning_modules.core.samples import EvalSample, text_table, write_jsonl
from lightning_modules.core.seeding import seeded_generator
from lightning_modules.core.text_stream import Vocabulary

NGRAM = 4  # words


class TextMonitor(Probe):
    """Continues held-out texts with the model, and compares the repetition in them with that of the training text.

    It runs at the end of `validate` and `test`, and at some validations of a fit; `<stage>` is `validation` or `test`:

    - `<stage>/repetition`: share of the sequences of four words that have occurred in the same sample before;
    - `<stage>/distinct_2`: different pairs of words / pairs of words, over all samples;
    - `<stage>/own_repetition`, `<stage>/own_distinct_2`: the same for as many windows of the training text with as many
      tokens;
    - the samples, as a table in loggers that take text and in `samples/text-<stage>-<step>.jsonl`, beside the text that
      really follows.

    The prompts and the random numbers are the same each time, and the course of training is that without the monitor.
    Rank 0 generates.

    Example::

        trainer:
          callbacks+:
            - {class_path: TextMonitor, init_args: {every_n_steps: 500, length: 512}}

    Args:
        rows: Samples.
        every_n_steps: In a fit, generate at the first validation after each n optimizer steps; 0 for never.
        prompt: Tokens of each prompt.
        length: Tokens of each sample; four rows of the data if None.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Sample among this many tokens; None for all.

    Raises:
        UserError: A number is out of range; at `setup`, there are two of these callbacks, the data is no text, the
            held-out text is too short, or the model cannot generate as many tokens; at the start, another callback has
            a hook on the network, which expects whole rows.
    """

    def __init__(
        self,
        rows: int = 8,
        every_n_steps: int = 500,
        prompt: int = 16,
        length: int | None = None,
        temperature: float = 0.8,
        top_k: int | None = None,
    ) -> None:
        super().__init__(rows, every_n_steps)
        check_numbers("TextMonitor", 1, prompt=prompt, length=length)
        self.prompt, self.length = prompt, length
        try:
            self.sampling = Sampling(temperature, top_k)
        except UserError as error:
            raise UserError(f"TextMonitor.{error}") from error

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse data of another kind, short texts, and models that cannot generate as many tokens."""
        super().setup(trainer, pl_module, stage)
        assert isinstance(pl_module, EnsembleModule)  # see the base class
        texts = self.text(trainer)
        if pl_module.ensemble > 1 or not isinstance(pl_module.network, StatefulNetwork):
            raise UserError("TextMonitor generates with a single network that has `step`: set model.ensemble to 1")
        length = self.prompt + self._length(texts)
        self.check_length(pl_module, length - 1)  # the last token is not read
        with naming(self):
            texts.text_rows("test" if stage == "test" else "validation", 1, length)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse hooks on the network, which other callbacks have added by now."""
        self._check_steps(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Likewise."""
        self._check_steps(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Likewise."""
        self._check_steps(pl_module)

    def _check_steps(self, module: LightningModule) -> None:
        """Check that the network can run one position at a time, before it trains for hours."""
        assert isinstance(module, EnsembleModule)  # see `setup`
        assert isinstance(module.network, StatefulNetwork)
        with naming(self):
            module.network.init_state(1)

    def _length(self, texts: TextCorpus) -> int:
        return self.length or 4 * texts.seq_len

    def measure(self, trainer: Trainer, module: EnsembleModule, split: Split) -> None:
        """Generate and report."""
        texts, rows = self.text(trainer), self.count(trainer)
        length = self._length(texts)
        samples = self._samples(texts, module, split, rows, length) if trainer.is_global_zero else []
        own_BT = texts.text_rows("train", rows, length)["tokens"].tolist()
        pairs = {"": [sample.output for sample in samples], "own_": [texts.decode(row) for row in own_BT]}
        measures = {}
        for whose, outputs in pairs.items():
            measures[f"{split}/{whose}repetition"] = repetition_rate(outputs, NGRAM)
            measures[f"{split}/{whose}distinct_2"] = distinct_n(outputs, 2)
        measures = trainer.strategy.broadcast(measures)  # only rank 0 has samples, and early stopping asks all ranks
        log_scalars(trainer, measures)
        keep_scalars(trainer, measures)
        folder = run_folder(trainer)
        if trainer.is_global_zero and not is_dry_run(trainer):
            add_text(trainer, f"{split}/text", text_table(samples), logged_step(trainer))
            write_jsonl(folder / "samples" / f"text-{split}-{trainer.global_step}.jsonl", samples)

    def _samples(
        self, texts: TextCorpus, module: EnsembleModule, split: Split, rows: int, length: int
    ) -> list[EvalSample]:
        tokens_BT = texts.text_rows(split, rows, self.prompt + length)["tokens"]
        prompt_BT, real_BN = tokens_BT[:, : self.prompt], tokens_BT[:, self.prompt :]
        network: StatefulNetwork = Vocabulary(module.network, texts.vocab_size)  # type: ignore[arg-type]  # see `setup`
        generator = seeded_generator(0, device=module.device)
        new_BN = generate(network, prompt_BT.to(module.device), length, self.sampling, generator)
        parts = zip(prompt_BT.tolist(), real_BN.tolist(), new_BN.tolist(), strict=True)
        texts_of_rows = [[texts.decode(part) for part in row] for row in parts]
        return [EvalSample(prompt, real, new) for prompt, real, new in texts_of_rows]
