"""The pieces of ott that the transports use."""

import functools
import sys
import types
import warnings

import jax


@functools.cache
def ott() -> types.SimpleNamespace:
    """Import the used parts of ott on first use, and without its warning.

    It takes longer to load than jax, and announces the retirement of a library.
    """
    # The first use may be inside a trace, of which constants made by an import must not be a part.
    with jax.ensure_compile_time_eval(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "JAXopt is no longer maintained", DeprecationWarning)
        try:
            return _parts()
        except ImportError:
            raise
        except Exception:
            # ott draws with matplotlib if there is one, and matplotlib does not start with every
            # setting of a user. Without it, ott computes the same.
            _forget("ott", "matplotlib")
            sys.modules["matplotlib"] = None  # pyright: ignore[reportArgumentType]
            try:
                return _parts()
            finally:
                _forget("matplotlib")


def _parts() -> types.SimpleNamespace:
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.acceleration import AndersonAcceleration, Momentum
    from ott.solvers.linear.sinkhorn import Sinkhorn

    return types.SimpleNamespace(
        Geometry=Geometry,
        LinearProblem=LinearProblem,
        AndersonAcceleration=AndersonAcceleration,
        Momentum=Momentum,
        Sinkhorn=Sinkhorn,
    )


def _forget(*packages: str) -> None:
    """Forget what imports that failed have left, so that they can be tried again."""
    for name in list(sys.modules):
        if name.partition(".")[0] in packages:
            del sys.modules[name]
