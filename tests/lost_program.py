"""A simulation that two processes share, of which test_lost_processes.py kills one.

    python lost_program.py FOLDER ADDRESS INDEX STEPS

Prints "round" after the first checkpoint of its loop.
"""

import sys
import threading
import time
from pathlib import Path

import jax


def main(folder: str, address: str, index: str, steps: str) -> None:
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(coordinator_address=address, num_processes=2, process_id=int(index))

    import numpy as np

    import esljax as esl

    def say() -> None:
        while not any(path.name.isdecimal() for path in Path(folder).glob("*")):
            time.sleep(0.05)
        print("round", flush=True)

    threading.Thread(target=say, daemon=True).start()
    esl.simulate(
        esl.Quadratic(1.0),
        esl.Langevin(0.1, 0.1),
        np.ones((8, 2)) * np.arange(8)[:, None],
        steps=int(steps),
        snapshots=int(steps) // 5,
        key=jax.random.key(0),
        mesh=esl.member_mesh(),
        checkpoints=esl.Checkpoints(folder, resume=True, every=0),
    )
    print("finished", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
