"""The pieces of ott that the transports use."""

import functools
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
        from ott.geometry.geometry import Geometry
        from ott.tools.unreg import hungarian
    return types.SimpleNamespace(Geometry=Geometry, hungarian=hungarian)
