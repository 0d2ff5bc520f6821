"""Crosstalk: what survives when signals share a medium?

Train, then test:     python main.py fit --config configs/X.yaml [--config overlay.yaml] [--key value]
Test a checkpoint:    python main.py test --config configs/X.yaml --ckpt_path runs/X/.../checkpoints/last.ckpt
Go on training:       python main.py fit --config configs/X.yaml --ckpt_path runs/X/.../checkpoints/last.ckpt
Many runs, a verdict: python main.py study studies/X.yaml [--jobs 2 | --executor slurm --partition gpu]
Claims and verdicts:  python main.py ledger
"""

import os
import sys
import warnings
from pathlib import Path
from shutil import rmtree
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden

import callbacks  # noqa: F401  (imported so that configs can use bare class names)
import datamodules  # noqa: F401
import lightning_modules.question_answering
import lightning_modules.separability
import lightning_modules.telepathy  # noqa: F401
from callbacks.last_checkpoint import LastCheckpoint
from callbacks.run_record import RunRecord, make_run_dir
from cli.config_errors import FriendlyParser
from cli.user_errors import user_message
from datamodules.errors import UserError
from lightning_modules.core.checkpoints import check_checkpoint

RUN_DIR_VARIABLE = "CROSSTALK_RUN_DIR"  # tells the folder to the processes that DDP starts


# What Lightning says of itself, of frozen models, which are in eval mode on purpose, and of loaders without workers,
# which keep up: data_wait in a run's results tells; a study reads its arms' command lines besides its own
for expected in (
    ".*isinstance.treespec",
    ".*in eval mode at the start",
    ".*does not have many workers",
    "LightningCLI.s args",
):
    warnings.filterwarnings("ignore", expected)


class CrosstalkCLI(LightningCLI):
    """LightningCLI with a folder of its own for each run, a test after the fit, and mistakes told in a sentence.

    Args:
        args: The command line without the program's name; `sys.argv[1:]` if None.
    """

    trainer: Trainer | None = None
    record: RunRecord | None = None
    run_dir: Path | None = None  # set only if this process made it

    def __init__(self, args: list[str] | None = None) -> None:
        self.command = sys.argv[1:] if args is None else args
        try:
            super().__init__(
                LightningModule,
                LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                seed_everything_default=0,
                trainer_defaults={"use_distributed_sampler": False},  # the datamodules shard themselves
                auto_configure_optimizers=False,  # modules take their optimizer as an argument
                parser_class=FriendlyParser,
                parser_kwargs={"description": __doc__} | {name: help_texts(name) for name in self.subcommands()},
                args=args,
            )
        except Exception as error:
            message = user_message(error)
            self._tidy(mistake=message is not None)
            if message is None:
                raise
            sys.stderr.write(f"error: {message}\n")
            sys.exit(2)
        if self.record and self.record.path:
            table = f"\n{self.record.table()}\n" if self.record.record["metrics"] else ""
            print(f"{table}results: {self.record.path}")

    def _parse_ckpt_path(self) -> None:
        """Does nothing: Lightning would replace the user's model config by the checkpoint's hyperparameters."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds our own top-level key; every command takes it, since the config.yaml of a fit holds it."""
        parser.add_argument("--test_after_fit", type=bool, default=True, help="Whether fit ends with a test.")

    def before_instantiate_classes(self) -> None:
        """Refuses a damaged checkpoint, then gives the run its folder."""
        config = self.config[self.subcommand]
        if config.ckpt_path:
            check_checkpoint(str(config.ckpt_path))
        resolved = self.parser.dump(self.config, skip_unset=False)  # a null may stand against a default
        configs = [str(path) for path in config.config or []]
        self.record = RunRecord(self.command, configs, yaml.safe_load(resolved)[self.subcommand])
        self.log_dir = Path(config.trainer.default_root_dir or os.environ.get(RUN_DIR_VARIABLE, "runs"))
        if rank_zero_only.rank or config.trainer.fast_dev_run:
            return  # only rank 0 makes folders, and a fast_dev_run writes nothing
        if config.trainer.default_root_dir is None:
            self.log_dir = self.run_dir = make_run_dir(configs[0] if configs else None, resolved)
            os.environ[RUN_DIR_VARIABLE] = str(self.run_dir)
        elif (self.log_dir / "config.yaml").exists():
            raise UserError(f"trainer.default_root_dir: {self.log_dir} already holds a run, name another folder")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds what every run has to what the user configured: record, progress bar, checkpoints, TensorBoard."""
        given = self._get(self.config_init, "trainer")
        users = given.callbacks if isinstance(given.callbacks, list) else [given.callbacks] if given.callbacks else []
        added = [self.record]
        if given.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in users):
            # A refresh waits for the device, and in a log file it is a line of its own.
            added.append(TQDMProgressBar(refresh_rate=10 if sys.stdout.isatty() else 100))
        saves = given.enable_checkpointing is not False and not given.fast_dev_run
        if saves and not any(isinstance(c, Checkpoint) for c in users):
            added.append(LastCheckpoint())
        if given.logger is None or given.logger is True:
            kwargs["logger"] = TensorBoardLogger(self.log_dir, name="", version="", default_hp_metric=False)
        try:
            return super().instantiate_trainer(callbacks=users + added, default_root_dir=self.log_dir, **kwargs)
        except (TypeError, ValueError) as error:  # flags that Lightning checks by itself
            raise UserError(f"trainer: {error}") from error

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Reads checkpoints without running code from them, unless the user says otherwise."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if "verbose" in kwargs:
            kwargs["verbose"] = False  # the record's own table has intervals too
        return kwargs | {"weights_only": kwargs["weights_only"] is not False}

    def before_fit(self) -> None:
        """Tells the record whether a test follows, without which the run has not come to its end."""
        has_test = is_overridden("test_dataloader", self.datamodule) and is_overridden("test_step", self.model)
        self.record.test_follows = self.config.fit.test_after_fit and has_test

    def after_fit(self) -> None:
        """Tests the weights just trained, if there is a test set."""
        if self.record.test_follows:
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)

    def _tidy(self, mistake: bool) -> None:
        """Leaves nothing of a run that ended on a user's mistake before it trained, and no empty folder of any."""
        if self.run_dir is None:
            return
        trained = self.trainer is not None and self.trainer.global_step > 0
        if not any(self.run_dir.iterdir()) or (mistake and not trained and not any(self.run_dir.rglob("*.ckpt"))):
            rmtree(self.run_dir)


class Resolver(CrosstalkCLI):
    """Reads and checks a command line as a run would, and stops there; `resolved` is the whole config."""

    resolved: dict[str, Any]

    def before_instantiate_classes(self) -> None:
        """Keeps the config."""
        self.resolved = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))[self.subcommand]

    def _set_seed(self) -> None:
        """Seeds nothing."""

    def instantiate_classes(self) -> None:
        """Builds nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs nothing."""


def help_texts(command: str) -> dict[str, str]:
    """What a command's --help begins with; the usage that argparse makes would name a hundred options first."""
    usage = f"python main.py {command} --config FILE [--config OVERLAY ...] [--key value ...]"
    return {"description": __doc__, "usage": usage}
