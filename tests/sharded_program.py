"""The program that test_sharding.py runs in processes of their own.

It writes the same numbers on meshes of several sizes into an .npz file.

    python sharded_program.py OUT.npz MESHES DEVICES [ADDRESS PROCESSES INDEX]

MESHES lists how many devices share the members, such as 1,8. DEVICES is the number of fake CPU
devices of each process.
"""

import functools
import re
import sys
from pathlib import Path

import jax


def collectives(function, *arguments) -> list[str]:
    """The operations between devices in a compiled program, each as "name result"."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    kinds = (
        "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    )
    pattern = rf"= (.*?) ({kinds})(?:-start)?\("
    return [f"{name} {result}" for result, name in re.findall(pattern, text)]


def main(out: str, meshes: str, devices: str, *processes: str) -> None:
    jax.config.update("jax_num_cpu_devices", int(devices))
    if processes:
        address, count, index = processes
        jax.distributed.initialize(
            coordinator_address=address, num_processes=int(count), process_id=int(index)
        )

    import jax.numpy as jnp
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather

    import esljax as esl
    from esljax.sharding import choose_mesh, replicate, shard_members

    key = jax.random.key(0)
    data = esl.datasets.digits()
    network = esl.FlaxLoss(esl.models.mlp(64, 32, 10), data.train, batch_size=256, l2=1e-4)
    weights = np.asarray(network.init(members=16, key=key))
    trap = esl.Quadratic(jnp.linspace(1.0, 3.0, 5))
    points = np.asarray(jax.random.normal(key, (16, 5)))
    sliced = esl.SlicedTransport(10, jax.random.key(1))
    transports = {
        "exact": esl.ExactTransport(),
        "gaussian": esl.GaussianTransport(),
        "sliced": sliced,
        "sinkhorn": esl.SinkhornTransport(1.0),
    }
    velocities = {
        "affine": (esl.GaussianTransport(), esl.AffineVelocity(), trap),
        "transport": (esl.ExactTransport(), esl.TransportVelocity(esl.ExactTransport()), None),
    }
    results = {}

    def simulate(potential, rates, start, mesh, checkpoints=None):
        rule = esl.Langevin(esl.Knots(rates), 0.01)
        return esl.simulate(
            potential,
            rule,
            start,
            steps=20,
            snapshots=10,
            key=key,
            mesh=mesh,
            checkpoints=checkpoints,
        )

    def gap(rates, potential, start, transport, mesh):
        return esl.speed_limit(
            simulate(potential, rates, start, mesh), transport=transport, jackknife=0
        ).gap

    def numbers(report) -> list[float]:
        names = (
            "entropy_production",
            "length_squared",
            "w2_squared",
            "debiased_entropy_production",
            "debiased_w2_squared",
        )
        errors = (
            []
            if report.standard_error is None
            else [report.standard_error.gap, report.standard_error.gap_upper]
        )
        return [
            float(x) for x in [*(getattr(report, name) for name in names), *errors] if x is not None
        ]

    for size in map(int, meshes.split(",")):
        mesh = esl.member_mesh(size)
        rates = jnp.array([0.1, 0.2, 0.3])
        paths = {
            "network": simulate(network, rates, weights, mesh),
            "trap": simulate(trap, rates, points, mesh),
        }
        for name, path in paths.items():
            assert path.positions.sharding.shard_shape(path.positions.shape)[1] == 16 // size
            results[f"{size} positions {name}"] = process_allgather(path.positions, tiled=True)
            results[f"{size} energies {name}"] = process_allgather(path.energies, tiled=True)
        for name, transport in transports.items():
            if processes and name in ("sliced", "sinkhorn"):
                continue  # what crosses processes is the same for all
            full = name == "exact"  # compiling the resampling once is enough
            report = esl.speed_limit(
                paths["trap"], transport=transport, jackknife=8 * full, debias=full
            )
            results[f"{size} report {name}"] = np.array(numbers(report))
            assert str(report)
            assert report.diagnose() is not None
        for name, (transport, velocity, potential) in velocities.items():
            full = name == "affine"
            report = esl.speed_limit(
                paths["trap"],
                transport=transport,
                velocity=velocity,
                potential=potential,
                jackknife=4 * full,
                debias=full,
            )
            if full:
                bare = [report.gap, report.debiased_length_squared, report.entropy_production_bound]
                errors = [report.standard_error.gap, report.standard_error.debiased_length_squared]
                results[f"{size} debiased affine"] = np.array([*bare, *errors])
            results[f"{size} velocity {name}"] = np.array(
                [report.entropy_production, report.length_squared, report.w2_squared]
            )
        report = esl.speed_limit(paths["network"], transport=esl.ExactTransport(), jackknife=0)
        results[f"{size} network exact"] = np.array(
            [report.entropy_production, report.length_squared, report.w2_squared]
        )
        for name in ("exact",) if processes else ("exact", "gaussian", "sliced"):
            slope = jax.jit(
                jax.grad(
                    functools.partial(
                        gap, potential=trap, start=points, transport=transports[name], mesh=mesh
                    )
                )
            )
            results[f"{size} gradient {name}"] = np.asarray(slope(rates))
        slope = jax.jit(
            jax.grad(
                functools.partial(
                    gap, potential=network, start=weights, transport=esl.ExactTransport(), mesh=mesh
                )
            )
        )
        results[f"{size} gradient network"] = np.asarray(slope(rates))
        # A recording is on no devices in particular; a run in an objective is on those that the
        # optimization gets.
        recording = esl.from_snapshots(results[f"{size} positions trap"])
        report = esl.speed_limit(
            recording, transport=esl.GaussianTransport(), jackknife=0, mesh=mesh
        )
        assert len(report.gap.sharding.device_set) == size
        results[f"{size} report recorded"] = np.array(
            [report.entropy_production, report.length_squared, report.w2_squared]
        )

        traced = []

        def objective(rates, key, size=size, traced=traced):
            path = simulate(trap, jnp.exp(rates), jax.random.normal(key, (16, 5)), None)
            traced.append(size)
            assert path.mesh.size == size
            return esl.speed_limit(path, transport=esl.GaussianTransport(), jackknife=0).gap

        optimum = esl.optimize(
            objective, jnp.log(rates), key=key, iterations=2, rounds=1, mesh=mesh
        )
        results[f"{size} optimum"] = np.asarray(optimum.controls)
        # The judge, the shapes and the step. Arrays that come back from the devices with another
        # placement would compile again.
        assert len(traced) == 3

    if processes:
        saved = simulate(
            trap,
            rates,
            points,
            esl.member_mesh(),
            esl.Checkpoints(Path(out).parent / "checkpoints", every=0),
        )
        results["2 saved"] = process_allgather(saved.positions, tiled=True)
    if not processes:
        # Controls from other devices come to those of the run.
        moved = simulate(trap, replicate(rates, esl.member_mesh(4)), points, esl.member_mesh(8))
        np.testing.assert_array_equal(moved.positions, results["8 positions trap"])
        # An array with a placement keeps it; one without goes everywhere.
        assert choose_mesh(None, jax.device_put(points, jax.devices()[1])) is None
        assert choose_mesh(None, jax.numpy.asarray(points)).size == len(jax.devices())
        mesh = esl.member_mesh()
        with jax.set_mesh(mesh):
            for path in (
                simulate(trap, rates, points, None),
                jax.jit(lambda start: simulate(trap, rates, start, None))(points),
            ):
                assert path.positions.sharding.shard_shape(path.positions.shape)[1] == 2
                np.testing.assert_array_equal(path.positions, results["8 positions trap"])
        # A result of `jit` knows its devices by its arrays alone; it is measured on them, or on
        # others.
        for there in (None, esl.member_mesh(3)):
            report = esl.speed_limit(
                path, transport=esl.GaussianTransport(), jackknife=0, mesh=there
            )
            assert len(report.gap.sharding.device_set) == (8 if there is None else 3)
            np.testing.assert_allclose(
                report.entropy_production, results["8 report recorded"][0], rtol=1e-6
            )
        # An argument of `jit` stays on its mesh. Under a mesh that is set, a gradient need not be
        # compiled.
        spread = shard_members(points, mesh)
        path = jax.jit(lambda start: simulate(trap, rates, start, None))(spread)
        assert path.mesh.size == 8

        def final(rates, mesh):
            return jnp.sum(simulate(trap, rates, points, mesh).final)

        with jax.set_mesh(mesh):
            slope = jax.grad(final)(rates, None)
        np.testing.assert_allclose(slope, jax.grad(final)(rates, mesh), rtol=1e-6)
        # Runs on different devices, and a projection left on another one, are measured together.
        directions = jax.device_put(jnp.eye(5)[:, :2], jax.devices()[5])
        paths = [simulate(trap, rates, points, esl.member_mesh(size)) for size in (8, 4)]
        report = esl.speed_limit(
            paths, transport=esl.ProjectedTransport(esl.GaussianTransport(), directions)
        )
        assert float(report.standard_error.gap) < 1e-5 < float(report.gap)

        def measure(path):
            return esl.speed_limit(path, transport=esl.SinkhornTransport(1.0, chunk=4), jackknife=0)

        results["collectives of a sinkhorn report"] = collectives(measure, path)
        results["refusals"] = []
        for set_mesh in (mesh, jax.make_mesh((8,), ("members",))):
            with jax.set_mesh(set_mesh):
                try:
                    simulate(trap, rates, points, esl.member_mesh(4))
                except esl.InputError as error:
                    results["refusals"].append(str(error))
        start = shard_members(weights, mesh)
        # A run needs no message between devices, its gradient one sum at the end, and distances
        # only the turn of the history.
        path = jax.jit(lambda start: simulate(network, rates, start, mesh))(start)
        results["collectives of a run"] = collectives(
            lambda start: simulate(network, rates, start, mesh).positions, start
        )

        def final(rates, start):
            return jnp.sum(simulate(network, rates, start, mesh).final)

        results["collectives of a gradient"] = collectives(jax.grad(final), rates, start)

        def measure(path):
            return esl.speed_limit(path, transport=esl.ExactTransport(), jackknife=8, debias=True)

        results["collectives of distances"] = collectives(measure, path)
    if not processes or processes[2] == "0":
        np.savez(out, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
