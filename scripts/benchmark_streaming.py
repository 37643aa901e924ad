"""Measure an ensemble on disk beside one cold read of it and one product of matrices.

    python scripts/benchmark_streaming.py [--smoke] [--folder FOLDER] [--vocabulary 50304]
        [--snapshots 20] [--members 10] [--out FILE.json]

Makes members of a small language model (14 million parameters with the usual vocabulary) as
safetensors, laid out as on the Hub, and removes them at the end. Then, in one run: one cold read of
all files; one product of matrices in float64 by NumPy's BLAS, of as many operations as the inner
products of the pairs that a chain compares take; and `esl.from_checkpoints` of the cold files, with
its largest anonymous memory, that of Python and jax among it. The caches of the files are dropped
before each read. Last the report, layer by layer.

Set OPENBLAS_NUM_THREADS=1 for threads of our own; the product uses all cores in any case.
"""

import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import timing
from safetensors.numpy import save_file

import esljax as esl


def shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Six layers of width 128, as in Pythia-14m."""
    of_layer = {
        "attention.query_key_value.weight": (384, 128),
        "attention.query_key_value.bias": (384,),
        "attention.dense.weight": (128, 128),
        "mlp.dense_h_to_4h.weight": (512, 128),
        "mlp.dense_4h_to_h.weight": (128, 512),
        "input_layernorm.weight": (128,),
    }
    layers = {f"layers.{i}.{key}": shape for i in range(6) for key, shape in of_layer.items()}
    ends = {"embed_in.weight": (vocabulary, 128), "embed_out.weight": (vocabulary, 128)}
    return ends | layers


def make(folder: Path, vocabulary: int, members: int, snapshots: int) -> int:
    """Write the ensemble, and return its bytes.

    Members decay and drift in directions of their own; the middle layers move most.
    """
    rng = np.random.default_rng(0)
    model = shapes(vocabulary)
    largest = max(int(np.prod(shape)) for shape in model.values())
    pool = rng.normal(size=3 * largest).astype(np.float32)
    for seed in range(members):
        drawn = {key: rng.integers(0, 2 * largest, snapshots + 1) for key in model}

        def noise(key: str, k: int, shape: tuple[int, ...], drawn: Any = drawn) -> np.ndarray:
            first = drawn[key][k]
            return pool[first : first + int(np.prod(shape))].reshape(shape)

        weights = {key: 0.02 * noise(key, 0, shape) for key, shape in model.items()}
        for j in range(snapshots):
            place = folder / f"seed{seed}" / f"step{1000 * j}"
            place.mkdir(parents=True)
            save_file(weights, place / "model.safetensors")
            for key, shape in model.items():
                layer = re.match(r"layers\.(\d)", key)
                pace = 1.0 if layer is None else (1, 2, 4, 4, 2, 1)[int(layer[1])]
                drift = 4e-4 * pace * noise(key, snapshots, shape)
                weights[key] = weights[key] + drift + 2e-4 * noise(key, j, shape)
    return sum(path.stat().st_size for path in files(folder))


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def cold(folder: Path) -> None:
    """Drop the files from the cache of the system."""
    for path in files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(folder: Path) -> float:
    """Return the seconds of one read of all files, one after the other."""
    room = memoryview(bytearray(1 << 23))
    started = time.perf_counter()
    for path in files(folder):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(room):
                pass
    return time.perf_counter() - started


def needed(members: int, snapshots: int) -> int:
    """Return the pairs of members that a chain compares: over its links and its coarse links, from
    the start to the end, and within each snapshot."""
    links = snapshots - 1
    across = links + 1 + (links // 2 if links % 2 == 0 else 0)
    return across * members**2 + snapshots * members * (members - 1) // 2


def product(operations: float, side: int = 1024) -> float:
    """Return the seconds of products of square matrices with so many operations, on all cores."""
    a = np.random.default_rng(0).normal(size=(side, side))
    cores = os.cpu_count() or 1
    rounds = max(1, round(operations / (2 * side**3 * cores)))
    rooms = [np.empty_like(a) for _ in range(cores)]

    def multiply(room: np.ndarray) -> None:
        for _ in range(rounds):
            np.matmul(a, a, out=room)

    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(multiply, rooms))
        started = time.perf_counter()
        list(pool.map(multiply, rooms))
        taken = time.perf_counter() - started
    return taken * operations / (2 * side**3 * cores * rounds)


class Anonymous:
    """The largest anonymous memory of this process within a block, in bytes; 0 where the system
    does not tell."""

    def __enter__(self) -> "Anonymous":
        self.largest, self.over = 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.over.wait(0.02):
            self.largest = max(self.largest, *self.now())

    def now(self) -> Iterator[int]:
        yield 0
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                yield 1024 * int(line.split()[1])

    def __exit__(self, *exception: object) -> None:
        self.over.set()
        self.thread.join()


def by_layer(report: esl.SpeedLimit) -> dict[str, tuple[float, float]]:
    """Return the shares of Σ and W2² of each layer."""
    layers: dict[str, tuple[float, float]] = {}
    for share in report.by_key():
        parts = share.key.split(".")
        layer = ".".join(parts[:2]) if parts[0] == "layers" else parts[0]
        sigma, whole = layers.get(layer, (0.0, 0.0))
        layers[layer] = sigma + (share.entropy_production or 0), whole + (share.w2_squared or 0)
    return dict(sorted(layers.items()))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = timing.parser("Stream an ensemble from disk beside one read and one product.")
    parser.add_argument("--folder", type=Path, help="where to make it; a temporary one by default")
    parser.add_argument("--vocabulary", type=int, default=50304, help="256 parameters each")
    parser.add_argument("--snapshots", type=int, default=20)
    parser.add_argument("--members", type=int, default=10)
    arguments = parser.parse_args(argv)
    members, snapshots, vocabulary = arguments.members, arguments.snapshots, arguments.vocabulary
    if arguments.smoke:
        members, snapshots, vocabulary = 4, 3, 64
    folder = Path(tempfile.mkdtemp(dir=arguments.folder, prefix="streaming-"))
    d = sum(int(np.prod(shape)) for shape in shapes(vocabulary).values())
    wanted, free = 4 * d * members * snapshots, shutil.disk_usage(folder).free
    if wanted > 0.8 * free:
        raise SystemExit(f"{wanted / 1e9:.1f} GB do not fit on {folder}; lower --vocabulary")
    try:
        nbytes = make(folder, vocabulary, members, snapshots)
        operations = 2.0 * d * needed(members, snapshots)
        cold(folder)
        cpu = [time.process_time()]
        reading = read(folder)
        cpu.append(time.process_time())
        cold(folder)
        with Anonymous() as anonymous:
            started = time.perf_counter()
            path = esl.from_checkpoints(folder)
            ours = time.perf_counter() - started
        cpu.append(time.process_time())
        load = os.getloadavg()[0]
        multiplying = product(operations)
        started = time.perf_counter()
        report = esl.speed_limit(path, transport=esl.ExactTransport(), debias=members >= 8)
        measuring = time.perf_counter() - started
    finally:
        shutil.rmtree(folder)
    numbers = {
        "parameters": d,
        "members": members,
        "snapshots": snapshots,
        "gigabytes": nbytes / 1e9,
        "seconds_of_a_cold_read": reading,
        "seconds_of_a_product": multiplying,
        "bar": reading + 1.3 * multiplying,
        "seconds": ours,
        "cpu_seconds_of_a_cold_read": cpu[1] - cpu[0],
        "cpu_seconds": cpu[2] - cpu[1],
        "load": load,
        "anonymous_megabytes": anonymous.largest / 1e6,
        "seconds_of_the_report": measuring,
        "entropy_production": float(report.entropy_production),
        "w2_squared": float(report.w2_squared),
        "by_layer": by_layer(report),
    }
    print(path)
    print(f"{nbytes / 1e9:.2f} GB: a cold read takes {reading:.2f} s, and the product")
    print(f"{multiplying:.2f} s, so the bar is {numbers['bar']:.2f} s")
    print(f"from_checkpoints: {ours:.2f} s, {anonymous.largest / 1e6:.0f} MB of anonymous memory")
    print(
        f"CPU: read {cpu[1] - cpu[0]:.2f} s, from_checkpoints {cpu[2] - cpu[1]:.2f} s; load {load}"
    )
    print(f"then speed_limit: {measuring:.2f} s with compilation")
    print(f"Σ = {numbers['entropy_production']:.4g}, W2² = {numbers['w2_squared']:.4g}")
    for layer, (sigma, whole) in by_layer(report).items():
        print(f"  {layer:<12}{100 * sigma:6.1f} % of Σ{100 * whole:6.1f} % of W2²")
    print(report.by_key())
    timing.write(arguments.out, numbers)
    return numbers


if __name__ == "__main__":
    main()
