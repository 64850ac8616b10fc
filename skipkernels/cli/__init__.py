"""The ``skipkernels`` command: one file per subcommand. Nothing heavy is imported before a command runs."""

from skipkernels.cli.app import app, main

__all__ = ["app", "main"]
