"""`python -m esljax` and the `esljax` command."""

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    from esljax.command import main as run

    sys.exit(run())


if __name__ == "__main__":
    main()
