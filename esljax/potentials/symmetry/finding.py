"""The symmetry of a model, derived from its program and then tried."""

import dataclasses
from collections import Counter

from esljax._checks import check_positive, door, refuse
from esljax.potentials.base import AbstractPotential
from esljax.potentials.symmetry.group import Symmetry
from esljax.potentials.symmetry.parts import Group
from esljax.potentials.symmetry.trying import Trials, found_in, model_of


@door
def of(potential: AbstractPotential, *, tolerance: float = 1e-5) -> Symmetry:
    """Return the symmetry of a model: which of its units may be permuted, and which may flip signs.

    Follows the axes of all arrays through the traced model: axes that are joined turn together, and
    those that some operation knows by their place stay. Hidden units of dense and convolutional
    layers are found so, the heads of attention and the numbers within them, streams that residual
    layers share, and tables. Every group is then tried on random members and inputs, and so are
    signs: units may flip if no output moves, as behind tanh, and not behind relu or gelu.

    What is found is a symmetry; it need not be all of it: the numbers within each head turn alike,
    and rescalings, which are no isometries, do not count.

    **Args:** `potential`: a `FlaxLoss`, or one `Driven` from such. `tolerance`: the largest change
    of outputs, relative to the largest output, that counts as rounding.
    **Returns:** `Symmetry`, which knows the shapes of the arrays.
    **Raises:** `InputError` for a potential without a model, and for a model without symmetry.

    **Example:**

        >>> import esljax as esl
        >>> data = esl.datasets.two_moons(samples=50)
        >>> potential = esl.FlaxLoss(esl.models.mlp(2, 3, 2), data.train)
        >>> symmetry = esl.symmetry.of(potential)
        >>> [(group.name, group.signed) for group in symmetry.groups], symmetry.sizes
        ([('layers/0', True)], (3,))
        >>> symmetry.exact
        True
    """
    _, keys = model_of(potential)
    check_positive("tolerance", tolerance)
    taken, groups = Counter(), []
    for size, axes in found_in(potential):
        name = axes[0].key.rpartition("/")[0] or axes[0].key
        taken[name] += 1
        name = name if taken[name] == 1 else f"{name}.{taken[name]}"
        alone = any(axis.inner is None for axis in axes)
        groups.append(Group(name, axes, False, None if alone else size))
    kept, missed = [], []
    trials = Trials(potential, Symmetry(tuple(groups), keys)) if groups else None
    for k, group in enumerate(groups):
        moved = {s: trials.moved(k, s) for s in (True, False)} if trials else {}
        signed = [s for s, by in moved.items() if by <= tolerance]
        if signed:
            kept.append(dataclasses.replace(group, signed=signed[0]))
        else:
            missed.append(f"group {group.name!r} moves outputs by {moved[False]:.1e} of them")
    if not kept:
        was = "has none that are found"
        if missed:
            was += f" within `tolerance` {tolerance:g}: {', '.join(missed[:3])}"
        raise refuse("potential", "have units that may change places", was)
    return Symmetry(tuple(kept), keys)
