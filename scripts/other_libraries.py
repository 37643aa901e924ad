"""The runs of `benchmark_simulation.py` as other libraries make them, each in its best setting.

A contender takes a `System` and returns a function without arguments that makes one run, from
positions to snapshots (J+1, n, d) and energies (J+1, n), in arrays of its library. It raises
ImportError where its library is not installed: `pip install "esljax[benchmark]"` brings them all.
Settings that were tried and lost are named at the contender.
"""

import itertools
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Run = Callable[[], tuple[Any, Any]]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class System(NamedTuple):
    """An ensemble and its potential: a quadratic, or a network with one hidden layer of tanh."""

    potential: Any
    positions: jax.Array
    steps: int
    links: int
    temperature: float
    rate: float = 0.05
    examples: Any = None
    """Inputs and labels of a network; None for a quadratic."""
    hidden: int = 0

    @property
    def amplitude(self) -> float:
        """The standard deviation of the noise of a step."""
        return (2 * self.temperature * self.rate) ** 0.5

    @property
    def products(self) -> float:
        """Floating operations of the products of one step: forward, in the weights, and in the
        hidden units."""
        if self.examples is None:
            return 0.0
        inputs, labels = self.examples
        rows = self.potential.batch_size or len(labels)
        outputs = int(labels.max()) + 1
        layers = 2 * inputs.shape[1] * self.hidden + 3 * self.hidden * outputs
        return 2.0 * len(self.positions) * rows * layers


# --- Libraries on JAX -----------------------------------------------------------------------------


def blackjax(system: System) -> Run:
    """SGLD of the whole ensemble as one position: noise for each member by itself is slower."""
    import blackjax

    potential, links = system.potential, system.links
    sgld = blackjax.sgld.build_kernel()

    def slopes(positions, batches):
        return -jax.vmap(potential.energy_and_gradient)(positions, batches)[1]

    @jax.jit
    def run(positions, key):
        def step(positions, k):
            batches = _batches(potential, key, k, len(positions))
            args = slopes, batches, system.rate, system.temperature
            noise = jax.random.fold_in(jax.random.fold_in(key, k), 1)
            return sgld(noise, positions, *args), None

        def link(positions, ks):
            end, _ = jax.lax.scan(step, positions, ks)
            return end, (positions, _energies(potential, positions, key, ks[0]))

        final, snapshots = jax.lax.scan(
            link, positions, jnp.arange(system.steps).reshape(links, -1)
        )
        last = final, _energies(potential, final, key, system.steps)
        return jax.tree.map(lambda x, end: jnp.concatenate([x, end[None]]), snapshots, last)

    return lambda: run(system.positions, jax.random.key(1))


def diffrax_tree(system: System) -> Run:
    """Euler's method on a VirtualBrownianTree."""
    return _diffrax(system, tree=True)


def diffrax_path(system: System) -> Run:
    """Euler's method on an UnsafeBrownianPath, which draws once a step."""
    return _diffrax(system, tree=False)


def _diffrax(system: System, tree: bool) -> Run:
    run = diffrax_run(system, tree)

    @jax.jit
    def both(positions, key):
        snapshots = run(positions, jnp.full(system.steps, system.rate), key)
        edges = jnp.arange(system.links + 1) * (system.steps // system.links)
        energies = jax.lax.map(
            lambda each: _energies(system.potential, each[0], key, each[1]), (snapshots, edges)
        )
        return snapshots, energies

    return lambda: both(system.positions, jax.random.key(1))


def diffrax_run(system: System, tree: bool) -> Callable[[Any, Any, Any], Any]:
    """Positions, rates (K,) and a key to snapshots. The clock counts steps; the state is one row,
    which draws noise faster than members of few coordinates do."""
    import diffrax
    import lineax

    potential, steps = system.potential, system.steps
    n, d = system.positions.shape

    def drift(t, row, args):
        rates, key = args
        k = t.astype(int)
        batches = _batches(potential, key, k, n)
        gradients = jax.vmap(potential.energy_and_gradient)(row.reshape(n, d), batches)[1]
        return -rates[k] * gradients.reshape(-1)

    def spread(t, row, args):
        amplitude = jnp.sqrt(2 * system.temperature * args[0][t.astype(int)])
        return lineax.DiagonalLinearOperator(jnp.broadcast_to(amplitude, row.shape))

    def run(positions, rates, key):
        own = jax.random.fold_in(key, steps + 1)
        brownian = (
            diffrax.VirtualBrownianTree(0.0, float(steps), tol=0.5, shape=(n * d,), key=own)
            if tree
            else diffrax.UnsafeBrownianPath(shape=(n * d,), key=own)
        )
        solution = diffrax.diffeqsolve(
            diffrax.MultiTerm(
                diffrax.ODETerm(drift),
                diffrax.ControlTerm(spread, brownian),
            ),
            diffrax.Euler(),
            0.0,
            float(steps),
            1.0,
            positions.reshape(-1),
            args=(rates, key),
            saveat=diffrax.SaveAt(ts=jnp.linspace(0.0, steps, system.links + 1)),
            # The path has no reverse mode.
            adjoint=diffrax.RecursiveCheckpointAdjoint() if tree else diffrax.ForwardMode(),
            max_steps=steps,
        )
        return solution.ys.reshape(-1, n, d)

    return run


def _energies(potential: Any, positions: Any, key: Any, k: Any) -> Any:
    return jax.vmap(potential.energy)(positions, _batches(potential, key, k, len(positions)))


def _batches(potential: Any, key: Any, k: Any, members: int) -> Any:
    """The batches of step k, as `simulate` draws them."""
    return potential.draw(jax.random.fold_in(jax.random.fold_in(key, k), 0), members)


# --- NumPy ----------------------------------------------------------------------------------------


def numpy(system: System) -> Run:
    """Float32, in place, noise by SFC64, products by OpenBLAS on every core."""
    from threadpoolctl import threadpool_limits

    random = np.random.Generator(np.random.SFC64(1))
    start = np.array(system.positions)
    kick = (_NumpyQuadratic if system.examples is None else _NumpyNetwork)(system, random)
    length = system.steps // system.links

    def run():
        positions, gradients, noise = start.copy(), np.empty_like(start), np.empty_like(start)
        snapshots = np.empty((system.links + 1, *start.shape), start.dtype)
        energies = np.empty(snapshots.shape[:2], start.dtype)
        with threadpool_limits(CORES, "blas"):
            for k in range(system.steps):
                j, inside = divmod(k, length)
                energy = kick(positions, gradients, inside == 0)
                if inside == 0:
                    snapshots[j], energies[j] = positions, energy
                gradients *= system.rate
                positions -= gradients
                if system.amplitude:
                    random.standard_normal(dtype=np.float32, out=noise)
                    noise *= np.float32(system.amplitude)
                    positions += noise
            snapshots[-1], energies[-1] = positions, kick(positions, gradients, True)
        return snapshots, energies

    return run


class _NumpyQuadratic:
    def __init__(self, system: System, random: np.random.Generator):
        del random
        self.stiffness = np.asarray(system.potential.stiffness)

    def __call__(self, positions, gradients, energies):
        np.multiply(positions, self.stiffness, out=gradients)
        return (positions * gradients).sum(1) / 2 if energies else None


class _NumpyNetwork:
    def __init__(self, system: System, random: np.random.Generator):
        inputs, labels = (np.asarray(x) for x in system.examples)
        self.inputs, self.labels, self.random = inputs, labels, random
        self.batch, self.l2 = system.potential.batch_size, float(system.potential.l2)
        n, b = len(system.positions), self.batch or len(labels)
        self.sizes = inputs.shape[1], system.hidden, int(labels.max()) + 1
        self.rows = np.broadcast_to(np.arange(len(labels)), (n, len(labels))).ravel()
        self.x, self.hidden, self.back = (
            np.empty((n, b, size), np.float32) for size in (*self.sizes[:2], system.hidden)
        )
        # Sums over few classes are fast where the rows lie side by side.
        self.outputs = np.empty((n, self.sizes[2], b), np.float32)
        self.places = (np.arange(n)[:, None] * self.sizes[2] * b + np.arange(b)).ravel()

    def __call__(self, positions, gradients, energies):
        n, b, _ = self.x.shape
        rows = self.rows
        if self.batch is not None:
            rows = self.random.integers(0, len(self.labels), n * b, dtype=np.int32)
        np.take(self.inputs, rows, axis=0, out=self.x.reshape(n * b, -1), mode="clip")
        labels = self.places + b * self.labels[rows]
        first, weights, last, readout = layers(positions, self.sizes)
        of_first, of_weights, of_last, of_readout = layers(gradients, self.sizes)
        np.matmul(self.x, weights, out=self.hidden)
        self.hidden += first[:, None]
        np.tanh(self.hidden, out=self.hidden)
        np.matmul(readout.transpose(0, 2, 1), self.hidden.transpose(0, 2, 1), out=self.outputs)
        self.outputs += last[:, :, None]
        shares, energy = self.outputs, None
        shares -= shares.max(1, keepdims=True)
        chosen = shares.reshape(-1)[labels].reshape(n, b) if energies else None
        np.exp(shares, out=shares)
        total = shares.sum(1, keepdims=True)
        if energies:
            energy = (np.log(total[:, 0]) - chosen).mean(1)
            energy += self.l2 / 2 * (positions**2).sum(1)
        shares /= total * b
        shares.reshape(-1)[labels] -= np.float32(1 / b)
        errors = shares.transpose(0, 2, 1)
        np.matmul(self.hidden.transpose(0, 2, 1), errors, out=of_readout)
        shares.sum(2, out=of_last)
        np.matmul(errors, readout.transpose(0, 2, 1), out=self.back)
        np.multiply(self.hidden, self.hidden, out=self.hidden)
        np.subtract(1, self.hidden, out=self.hidden)
        self.back *= self.hidden
        np.matmul(self.x.transpose(0, 2, 1), self.back, out=of_weights)
        self.back.sum(1, out=of_first)
        gradients += np.float32(self.l2) * positions
        return energy


def layers(rows: Any, sizes: tuple[int, int, int]) -> list[Any]:
    """Views of raveled members (n, d): bias and kernel of each layer."""
    inputs, hidden, outputs = sizes
    shapes = (hidden,), (inputs, hidden), (outputs,), (hidden, outputs)
    edges = [0, *itertools.accumulate(math.prod(shape) for shape in shapes)]
    return [
        rows[:, start:stop].reshape(len(rows), *shape)
        for start, stop, shape in zip(edges[:-1], edges[1:], shapes, strict=True)
    ]


# --- PyTorch --------------------------------------------------------------------------------------


def torch_by_hand(system: System) -> Run:
    """Batched products with a backward pass by hand, in place, without a graph."""
    return _torch(system, _TorchQuadratic if system.examples is None else _TorchNetwork)


def torch_compiled(system: System) -> Run:
    """The same formulas through torch.compile."""
    kind = _TorchQuadratic if system.examples is None else _TorchNetwork
    return _torch(system, kind, compiled=True)


def torch_func(system: System) -> Run:
    """torch.func: vmap over the members of the gradient of one member's loss."""
    return _torch(system, _TorchFunctional)


def _torch(system: System, kind: Any, compiled: bool = False) -> Run:
    import torch

    torch.manual_seed(1)
    start = torch.from_numpy(np.array(system.positions))
    kick = kind(system, torch)
    if compiled:
        kick.gradients = torch.compile(kick.gradients, fullgraph=True, dynamic=False)
    length = system.steps // system.links
    threads = {}

    def run():
        # Threads that wait for each other lose where other work shares the cores, and on small
        # arrays: the first call chooses between all cores and one.
        if not threads:
            for count in (CORES, 1):
                torch.set_num_threads(count)
                whole()
                times = []
                for _ in range(3):
                    began = time.perf_counter()
                    whole()
                    times.append(time.perf_counter() - began)
                threads[count] = min(times)
        torch.set_num_threads(min(threads, key=lambda count: threads[count]))
        return whole()

    def whole():
        with torch.inference_mode() if not compiled else torch.no_grad():
            positions, noise = start.clone(), torch.empty_like(start)
            snapshots = torch.empty(system.links + 1, *start.shape)
            energies = torch.empty(snapshots.shape[:2])
            for k in range(system.steps + 1):
                j, inside = divmod(k, length)
                batch = kick.draw()
                if inside == 0:
                    snapshots[j], energies[j] = positions, kick.energies(positions, *batch)
                if k < system.steps:
                    positions.sub_(kick.gradients(positions, *batch), alpha=system.rate)
                    if system.amplitude:
                        positions.add_(noise.normal_(), alpha=system.amplitude)
        return snapshots, energies

    return run


class _TorchQuadratic:
    def __init__(self, system: System, torch: Any):
        self.stiffness = torch.from_numpy(np.array(system.potential.stiffness))

    def draw(self):
        return ()

    def energies(self, positions):
        return (self.stiffness * positions**2).sum(1) / 2

    def gradients(self, positions):
        return self.stiffness * positions


class _TorchNetwork:
    def __init__(self, system: System, torch: Any):
        self.torch = torch
        inputs, labels = (torch.from_numpy(np.array(x)) for x in system.examples)
        self.inputs, self.labels = inputs, labels.long()
        self.batch, self.l2 = system.potential.batch_size, float(system.potential.l2)
        self.members = len(system.positions)
        self.sizes = inputs.shape[1], system.hidden, int(labels.max()) + 1

    def draw(self):
        n, m = self.members, len(self.labels)
        if self.batch is None:
            rows = self.torch.arange(m).repeat(n)
        else:
            rows = self.torch.randint(m, (n * self.batch,))
        inputs = self.inputs.index_select(0, rows).view(n, -1, self.sizes[0])
        return inputs, self.labels.index_select(0, rows).view(n, -1)

    def energies(self, positions, inputs, labels):
        first, weights, last, readout = layers(positions, self.sizes)
        hidden = self.torch.baddbmm(first[:, None], inputs, weights).tanh_()
        outputs = self.torch.baddbmm(last[..., None], readout.mT, hidden.mT)
        chosen = outputs.gather(1, labels[:, None])[:, 0]
        losses = (outputs.logsumexp(1) - chosen).mean(1)
        return losses + self.l2 / 2 * (positions**2).sum(1)

    def gradients(self, positions, inputs, labels):
        torch = self.torch
        first, weights, last, readout = layers(positions, self.sizes)
        hidden = torch.baddbmm(first[:, None], inputs, weights).tanh()
        # A softmax over few classes is fast where the rows lie side by side.
        outputs = torch.baddbmm(last[..., None], readout.mT, hidden.mT)
        shares = outputs.softmax(1)
        right = shares.new_full((1, 1, 1), -1.0).expand(len(labels), 1, labels.shape[1])
        errors = shares.scatter_add(1, labels[:, None], right) / labels.shape[1]
        back = (errors.mT @ readout.mT) * (1 - hidden * hidden)
        parts = back.sum(1), inputs.mT @ back, errors.sum(2), hidden.mT @ errors.mT
        flat = torch.cat([part.flatten(1) for part in parts], 1)
        return flat.add(positions, alpha=self.l2)


class _TorchFunctional(_TorchNetwork):
    def __init__(self, system: System, torch: Any):
        from torch.func import grad_and_value, vmap

        if system.examples is None:
            stiffness = torch.from_numpy(np.array(system.potential.stiffness))
            self.draw = lambda: ()

            def loss(position):
                return (stiffness * position**2).sum() / 2

        else:
            super().__init__(system, torch)

            def loss(position, inputs, labels):
                first, weights, last, readout = (x[0] for x in layers(position[None], self.sizes))
                outputs = torch.addmm(last, torch.addmm(first, inputs, weights).tanh(), readout)
                misfit = torch.nn.functional.cross_entropy(outputs, labels)
                return misfit + self.l2 / 2 * (position**2).sum()

        self.both = vmap(grad_and_value(loss))

    def gradients(self, *arguments):
        return self.both(*arguments)[0]

    def energies(self, *arguments):
        return self.both(*arguments)[1]


CONTENDERS: Mapping[str, Callable[[System], Run]] = {
    "PyTorch, `baddbmm` and a backward pass by hand": torch_by_hand,
    "PyTorch, the same through `torch.compile`": torch_compiled,
    "PyTorch, `torch.func`: `vmap` of `grad`": torch_func,
    "NumPy": numpy,
    "blackjax, SGLD": blackjax,
    "diffrax, Euler on `UnsafeBrownianPath`": diffrax_path,
    "diffrax, Euler on `VirtualBrownianTree`": diffrax_tree,
}
