"""The pieces of ott that the transports use."""

import functools
import types
import warnings

import jax


@functools.cache
def ott() -> types.SimpleNamespace:
    """What is used of ott, imported on first use: it takes longer to load than jax, and announces the retirement of a library."""
    # The first use may be inside a trace; constants made by an import must not become part of it.
    with jax.ensure_compile_time_eval(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "JAXopt is no longer maintained", DeprecationWarning)
        from ott.geometry.geometry import Geometry
        from ott.tools.unreg import hungarian
    return types.SimpleNamespace(Geometry=Geometry, hungarian=hungarian)
