"""The exception for mistakes of the user."""


class UserError(ValueError):
    """A mistake of the user, such as a wrong setting or a missing file; its message is one sentence for the terminal.

    The command line prints the message and exits with code 2. Every other exception keeps its stack trace.
    """
