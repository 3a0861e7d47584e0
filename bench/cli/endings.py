"""Exit codes of the command, the same for every subcommand."""

from __future__ import annotations

EXIT_FAILED_RUNS = 1
EXIT_REGRESSION = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
