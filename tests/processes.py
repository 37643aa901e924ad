"""Waiting for processes that a test starts: for the event, however slow a busy machine is."""

import time

# Seconds after which a process hangs. Nothing that works takes a tenth of it on idle cores.
PATIENCE = 1200


def wait_until(happened, awaited: str) -> None:
    """Return once `happened()` is true, or raise `TimeoutError` with what was awaited."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{awaited} did not happen in {PATIENCE} s")
        time.sleep(0.02)
