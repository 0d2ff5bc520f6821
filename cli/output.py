"""What a run prints, and what it leaves out because it says nothing to the user."""

import logging
import warnings

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.nn import Module

USELESS_LINES = (
    "💡 Tip: ",  # advertises other products
    "TPU available: False",
    "`Trainer(limit_",  # repeats a flag that the user set
)
USELESS_WARNINGS = (
    ".*isinstance.treespec",  # about Lightning's code
    "LightningCLI.s args",  # a study reads the command lines of its arms beside the process's command line
    ".*in eval mode at the start",  # frozen models are in eval mode on purpose
    "The `srun` command is available",  # a study's jobs, and a single process, do without it
    "RNN module weights are not part of single",  # those of an ensemble's members are slices of a stack on purpose
    ".*does not have many workers",  # `data_wait` in a run's results tells whether loading is slow
)
REDUCED = "It is recommended to use .self.log"  # of values that are reduced already


def silence() -> None:
    """Suppress the lines and warnings that say nothing to the user."""
    for message in USELESS_WARNINGS:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_says_something)


def silence_reduction_hints(module: LightningModule) -> None:
    """Suppress Lightning's hint to reduce logged values over the ranks for the project's modules, which reduce them."""
    if type(module).__module__.startswith("lightning_modules."):
        warnings.filterwarnings("ignore", REDUCED)


class ParameterTable(Callback):
    """Prints the number of trained and of frozen parameters of each submodule when training starts."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table on rank 0."""
        rank_zero_info("\n" + parameter_table(pl_module))


def parameter_table(module: Module) -> str:
    """Return a table of the submodules that have parameters: name, class, trained and frozen parameters."""
    rows = [("module", "class", "trained", "frozen")]
    for name, child in module.named_children():
        if any(True for _ in child.parameters()):
            rows.append((name, type(child).__name__, *_counts(child)))
    rows.append(("total", "", *_counts(module)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [f"{n:<{widths[0]}}  {c:<{widths[1]}}  {t:>{widths[2]}}  {f:>{widths[3]}}" for n, c, t, f in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _counts(module: Module) -> tuple[str, str]:
    parameters = list(module.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in parameters) - trained
    return f"{trained:,}", f"{frozen:,}"


def _says_something(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(USELESS_LINES)
