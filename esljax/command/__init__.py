"""The command line: what the library does, with files, progress and exit codes around it."""

from esljax.command.cli import main

__all__ = ["main"]
