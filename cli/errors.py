"""What the command line can fail with. Each error carries its exit code and a text that says what to do next."""

from __future__ import annotations

EXIT_REFUSED, EXIT_USAGE, EXIT_NO_AGENT, EXIT_NO_LEADER, EXIT_UNKNOWN = 1, 2, 3, 4, 5


class CliError(Exception):
    """Root of the command line's errors: the text goes to stderr, ``exit_code`` to the shell."""

    exit_code = EXIT_REFUSED


class UsageError(CliError):
    """The command was typed wrongly."""

    exit_code = EXIT_USAGE


class Refused(CliError):
    """The agent answered, and said no. ``status`` is the HTTP status."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class NoAgent(CliError):
    """Nothing answers at the agent's address."""

    exit_code = EXIT_NO_AGENT


class NoLeader(CliError):
    """The cluster had no leader for the whole bounded time."""

    exit_code = EXIT_NO_LEADER


class OutcomeUnknown(CliError):
    """A write may or may not have been applied."""

    exit_code = EXIT_UNKNOWN
