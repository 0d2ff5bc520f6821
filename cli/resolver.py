"""A command line that is resolved and not run, as a study needs it for each of its arms."""

from typing import Any

import yaml

from cli.app import CrosstalkCLI


class Resolver(CrosstalkCLI):
    """Parses and checks a command line as a run does, and builds nothing.

    Attributes:
        resolved: The whole config.
    """

    resolved: dict[str, Any]

    def before_instantiate_classes(self) -> None:
        """Keep the config."""
        self.resolved = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))[self.subcommand]

    def _set_seed(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def after_instantiate_classes(self) -> None:
        """Do nothing, since there is no model."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass
