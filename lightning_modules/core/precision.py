"""Which precisions of the Trainer a module can train in."""

from lightning import Trainer

from datamodules.errors import UserError


def check_precision(trainer: Trainer, double: bool = True) -> None:
    """Refuse a precision in which training goes wrong.

    With `bf16-true` and `16-true` the weights themselves have 8 or 11 significant bits, so an update that is smaller
    than the last of them is lost.

    Args:
        trainer: The trainer, whose precision is checked.
        double: Whether the module can train in `64-true`; one that holds models of a dtype of their own cannot.

    Raises:
        UserError: The module cannot train in this precision.
    """
    precision = trainer.precision
    if precision in ("bf16-true", "16-true"):
        raise UserError(f"trainer.precision: {precision} rounds small updates away, use bf16-mixed or 32-true")
    if precision == "64-true" and not double:
        raise UserError("trainer.precision: 64-true does not fit the dtypes of the frozen models, use 32-true")
