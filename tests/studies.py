"""A small study, and a pool that must stay idle, for the tests of the room of studies."""

import esljax as esl

BASE = esl.RunConfig(data="moons", hidden=(4,), members=8, steps=10, snapshots=5, batch_size=32)
GRID = {
    "rate": [0.1, 0.4, 1.6],
    "members": [6, 8],
    "schedule": ["constant", "cosine"],
    "seed": [3, 1],
}


class Idle(esl.study.executors.InProcess):
    """A pool that fails as soon as a task is sent to it."""

    def submit(self, fn, /, *args):
        raise AssertionError("a task was run")
