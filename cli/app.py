"""The commands that run a model: fit, validate, test and predict."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jsonargparse.typing import PositiveFloat
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden

import callbacks  # noqa: F401  (these seven are loaded so that a config may name their classes without a module)
import datamodules  # noqa: F401
import lightning_modules.groundthink
import lightning_modules.groundthink.mechanism
import lightning_modules.phase
import lightning_modules.question_answering
import lightning_modules.separability
import lightning_modules.telepathy  # noqa: F401
from callbacks.divergence import Diverged
from callbacks.interruption import ADVICE, GRACE, SIGNALS, Interruption, end_ranks
from callbacks.last_checkpoint import LastCheckpoint
from callbacks.run_record import RunRecord
from cli import output, renames
from cli.checkpoint import check_files, check_fit
from cli.commands import run_help
from cli.device import device_of_run
from cli.flags import check_flags
from cli.friendly_parser import FriendlyParser
from cli.given_folder import GivenFolder
from cli.run_folder import make_run_dir, tidy_run_dir
from cli.trainer import build, make_trainer, with_defaults
from cli.user_errors import host_message, library_message, user_message
from datamodules.errors import UserError
from lightning_modules.core.signals import Interrupted, Signals
from lightning_modules.pretrained.loading_device import loading_to

RUN_DIR_VARIABLE = "CROSSTALK_RUN_DIR"  # passes the folder to the processes that DDP starts

output.silence()
renames.install()


class RunParser(FriendlyParser, LightningArgumentParser):
    """Lightning's parser, with errors of one sentence."""


class CrosstalkCLI(LightningCLI):
    """LightningCLI with one folder for each run, a test after the fit, and one sentence for each mistake of the user.

    Args:
        args: The command line without the program's name; `sys.argv[1:]` if None.

    Attributes:
        record: The run's record.
        run_dir: The run's folder if this process chose it.
        given_folder: The run's folder if the user named it and this process writes into it.
        log_dir: The run's folder.
    """

    record: RunRecord
    run_dir: Path | None = None
    given_folder: GivenFolder | None = None
    log_dir: Path

    def __init__(self, args: list[str] | None = None) -> None:
        self.command = sys.argv[1:] if args is None else args
        self.signals = Signals(SIGNALS, ADVICE, GRACE)
        try:
            with self.signals:
                self._run_line()
        except BaseException as error:
            self._end(error)
            raise
        finally:
            if self.given_folder:
                self.given_folder.release()

    def _run_line(self) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            trainer_defaults={"use_distributed_sampler": False},  # the datamodules shard themselves
            auto_configure_optimizers=False,  # modules take their optimizer as an argument
            parser_class=RunParser,
            parser_kwargs={command: _help_texts(command) for command in self.subcommands()},
            args=renames.renamed_line(self.command),
        )

    def __deepcopy__(self, memo: dict[int, object]) -> "CrosstalkCLI":
        # jsonargparse's factories, such as a model's optimizer, refer to this object; weight averaging copies the model
        return self

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would replace the user's model config with the checkpoint's hyperparameters."""

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:  # out of bounds
            raise UserError(f"seed_everything: {error}") from error

    def _add_instantiators(self) -> None:
        super()._add_instantiators()
        self.parser.add_instantiator(build, object)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the project's keys; every command accepts them, since the config.yaml of a fit holds them."""
        parser.add_argument("--test_after_fit", type=bool, default=True, help="Whether fit ends with a test.")
        minutes = "Longest time between two checkpoints, in minutes; a killed run loses no more work."
        parser.add_argument("--checkpoint_minutes", type=PositiveFloat, default=5.0, help=minutes)

    def before_instantiate_classes(self) -> None:
        """Refuse files that are no checkpoints of use, then give the run its folder."""
        config = self.config[self.subcommand]
        # A null may stand against a default; parsing was a validation
        resolved = self.parser.dump(self.config, skip_unset=False, skip_validation=True)
        settings = yaml.safe_load(resolved)[self.subcommand]
        check_flags(self.subcommand, settings)
        check_files(str(self.subcommand), settings)
        configs = [str(path) for path in config.config or []]
        self.record = RunRecord(self.command, configs, settings)
        self.signals.before_end = self._before_end
        self.log_dir = Path(config.trainer.default_root_dir or os.environ.get(RUN_DIR_VARIABLE, "runs"))
        if config.trainer.fast_dev_run:
            return  # it writes nothing
        if config.trainer.default_root_dir is None:
            self._make_folder(configs[0] if configs else None, resolved)
        else:
            self._check_given_folder()

    @rank_zero_only
    def _make_folder(self, config_file: str | None, resolved: str) -> None:
        self.log_dir = self.run_dir = make_run_dir(config_file, resolved)
        os.environ[RUN_DIR_VARIABLE] = str(self.run_dir)

    @rank_zero_only
    def _check_given_folder(self) -> None:
        self.given_folder = GivenFolder(self.log_dir, "trainer.default_root_dir")

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; pretrained models are loaded onto the device of this process."""
        with loading_to(device_of_run(self.config[self.subcommand].trainer)):
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with what every run has: record, progress bar, checkpoints, signals, TensorBoard."""
        minutes = self._get(self.config_init, "checkpoint_minutes")
        users = self._get(self.config_init, "trainer")
        flags = with_defaults(users, self.log_dir, minutes, self.record, Interruption(self.signals))
        return make_trainer(partial(super().instantiate_trainer, **flags, **kwargs))

    def after_instantiate_classes(self) -> None:
        """Check that checkpoints fit the model, and suppress the hints that do not apply to the project's modules."""
        check_fit(str(self.subcommand), self.record.config, self.model, self.datamodule, self.trainer)
        output.silence_reduction_hints(self.model)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Read checkpoints without running code from them, unless the user says otherwise."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if "verbose" in kwargs:
            kwargs["verbose"] = False  # the record's table has intervals too
        return kwargs | {"weights_only": kwargs["weights_only"] is not False}

    def before_fit(self) -> None:
        """Tell the record whether a test follows; the run is not finished without it."""
        has_test = is_overridden("test_dataloader", self.datamodule) and is_overridden("test_step", self.model)
        measures = not self.trainer.barebones  # which turns off the log of measures
        self.record.test_follows = self.config.fit.test_after_fit and has_test and measures

    def after_fit(self) -> None:
        """Test the trained weights, if there is a test set."""
        if self.record.test_follows:
            # After its last step, a resumed run has the weights of training, and its checkpoint those of the test
            savers = self.trainer.checkpoint_callbacks
            ended = any(isinstance(saver, LastCheckpoint) and saver.nothing_trained for saver in savers)
            path = self.config.fit.ckpt_path if ended else None
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False, ckpt_path=path)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the command, then print its results."""
        super()._run_subcommand(subcommand)
        if self.record.path:
            table = f"\n{self.record.table()}\n" if self.record.record["metrics"] else ""
            print(f"{table}results: {self.record.path}")

    def _before_end(self) -> None:
        """Record the end of a process that ends at once, and end the other ranks with it."""
        end_ranks(vars(self).get("trainer"))
        self.record.end("interrupted")

    def _end(self, error: BaseException) -> None:
        """Exit with one sentence if the error is not a bug, and remove what a run that did not start has left."""
        trainer = vars(self).get("trainer")
        end_ranks(trainer)
        mistake, host = user_message(error) or (None if self._trained else library_message(error)), host_message(error)
        self._tidy(mistake is not None)
        other = trainer is not None and trainer.global_rank > 0  # Lightning kills rank 0 when another rank fails
        if isinstance(error, Interrupted):
            sys.exit(0 if other and self.signals.agreed else error.exit_code)
        if isinstance(error, Diverged):
            self._explain_divergence(error)
            sys.exit(0 if other else 1)
        if mistake or host:
            sys.stderr.write(f"error: {mistake or host}\n")
            sys.exit(2 if mistake else 1)

    @property
    def _trained(self) -> bool:
        return "record" in vars(self) and self.record.trained

    @rank_zero_only
    def _explain_divergence(self, error: Diverged) -> None:
        advice = "lower the learning rate, or set model.on_nonfinite to continue"
        last = self.log_dir / "checkpoints" / "last.ckpt"
        kept = f"; the last finite checkpoint is {last}" if last.exists() else ""
        sys.stderr.write(f"error: {error}{kept}; {advice}\n")

    def _tidy(self, mistake: bool) -> None:
        """Remove what a run has left that ended on a user's mistake before it trained, and an empty folder always."""
        mistake = mistake and not self._trained
        if self.given_folder and mistake:
            self.given_folder.clear()
        if self.run_dir:
            tidy_run_dir(self.run_dir, mistake)


def _help_texts(command: str) -> dict[str, str]:
    """Return the first lines of a command's help; argparse's usage would begin with a hundred options."""
    usage = f"python main.py {command} --config FILE [--config OVERLAY ...] [--key value ...]"
    return {"description": run_help(command), "usage": usage}
