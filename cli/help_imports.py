"""Faster imports for a help page.

Lightning imports torchmetrics, which imports matplotlib, scipy and transformers if they are installed. Their import
takes nearly as long as the rest of a help page, which needs none of them.
"""

from lightning_utilities.core import imports

OPTIONAL = ("matplotlib", "scipy", "transformers")


def import_torchmetrics_alone() -> None:
    """Import torchmetrics without its optional packages, in a process that only prints a help page."""
    package_available, is_met = imports.package_available, imports.RequirementCache.__bool__

    def is_available(name: str) -> bool:
        return name not in OPTIONAL and package_available(name)

    def is_required_and_met(requirement: imports.RequirementCache) -> bool:
        return not str(requirement.requirement).startswith(OPTIONAL) and is_met(requirement)

    imports.package_available = is_available  # type: ignore[assignment]  # restored below
    imports.RequirementCache.__bool__ = is_required_and_met  # type: ignore[assignment,method-assign]  # restored below
    try:
        import torchmetrics  # noqa: F401
    finally:
        imports.package_available = package_available
        imports.RequirementCache.__bool__ = is_met  # type: ignore[method-assign]  # as it was
