"""Which axes of the arrays of a network may be permuted together, read off its traced program.

Every operation either treats the entries along an axis alike, and then passes the axis on (a
nonlinearity), joins it to another one (a sum, a contracted product) or ends it (a reduction), or it
knows them by their place (a window, a slice, an output). Axes that are joined must be permuted
together; those that are known by their place must not be. An operation that is not listed here
counts as knowing places, so that what is found is never too much, and may be too little.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.interpreters import partial_eval


class Found(NamedTuple):
    """Axes that turn together."""

    size: int
    """How many units they index."""
    axes: tuple[tuple[int, int, int | None], ...]
    """For each the array's place, its axis, and how many numbers lie side by side for each unit;
    None if the axis indexes the units alone."""


def coupled(
    function: Callable[[list[Any]], Any], arrays: Sequence[jax.ShapeDtypeStruct]
) -> list[Found]:
    """Return the groups of axes of `arrays` whose permutation leaves `function(arrays)` alone."""
    traced = jax.make_jaxpr(function)(list(arrays))
    # What no output needs knows no places: running statistics are updated and dropped.
    wanted = [True] * len(traced.jaxpr.outvars)
    program, needed = partial_eval.dce_jaxpr(traced.jaxpr, wanted)
    axes = _Axes()
    # Arrays that no output needs stay as they are.
    given = [
        [axes.new(length, not need) for length in array.shape]
        for array, need in zip(arrays, needed, strict=True)
    ]
    followed = [value for value, need in zip(given, needed, strict=True) if need]
    outputs = _run(axes, program, _of_constants(axes, traced.consts), followed)
    for value in outputs:
        axes.fix(*value)
    groups: dict[int, list[tuple[int, int, int | None]]] = {}
    for place, value in enumerate(given):
        for axis, atoms in enumerate(value):
            leaves = axes.leaves(atoms)
            for i, leaf in enumerate(leaves):
                behind = math.prod(axes.size[other] for other in leaves[i + 1 :])
                inner = None if len(leaves) == 1 else behind
                groups.setdefault(leaf, []).append((place, axis, inner))
    return [
        Found(axes.size[leaf], tuple(found))
        for leaf, found in groups.items()
        if not axes.fixed[leaf]
    ]


# An axis is a list of atoms, from the outermost to the innermost: reshaping merges and splits axes.
# Axes of length 1 have none.
Atoms = list[int]
Value = list[Atoms]


class _Axes:
    """Atoms that are joined (union-find), split into parts, or fixed in their order."""

    def __init__(self):
        self.parent: list[int] = []
        self.size: list[int] = []
        self.fixed: list[bool] = []
        self.parts: list[Atoms | None] = []

    def new(self, size: int, fixed: bool = False) -> Atoms:
        """One new axis."""
        if size == 1:
            return []
        self.parent.append(len(self.parent))
        self.size.append(size)
        self.fixed.append(fixed)
        self.parts.append(None)
        return [len(self.parent) - 1]

    def leaves(self, atoms: Atoms) -> Atoms:
        """The roots of the atoms that are not split."""
        found: Atoms = []
        for atom in atoms:
            while self.parent[atom] != atom:
                atom = self.parent[atom]
            parts = self.parts[atom]
            found += [atom] if parts is None else self.leaves(parts)
        return found

    def fix(self, *axes: Atoms) -> None:
        for atoms in axes:
            for leaf in self.leaves(atoms):
                self.fixed[leaf] = True

    def split(self, leaf: int, outer: int) -> None:
        """Split an atom that is a leaf into two, of which the first has size `outer`."""
        fixed = self.fixed[leaf]
        self.parts[leaf] = self.new(outer, fixed) + self.new(self.size[leaf] // outer, fixed)

    def join(self, one: Atoms, other: Atoms) -> None:
        """Let two axes of one length be permuted together."""
        a, b = self.leaves(one), self.leaves(other)
        while a and b:
            first, second = a.pop(0), b.pop(0)
            if first == second:
                continue
            if self.size[first] == self.size[second]:
                self.parent[second] = first
                self.fixed[first] = self.fixed[first] or self.fixed[second]
                # One atom may stand twice in what is left.
                a, b = self.leaves(a), self.leaves(b)
                continue
            large, small = sorted((first, second), key=lambda x: -self.size[x])
            if self.size[large] % self.size[small]:
                self.fix([first, second], a, b)
                return
            self.split(large, self.size[small])
            a, b = self.leaves([first, *a]), self.leaves([second, *b])
        self.fix(a, b)

    def reshaped(self, value: Value, shape: Sequence[int]) -> Value:
        """The axes of an array in another shape; where they do not fit, all are fixed."""
        rest = self.leaves([atom for atoms in value for atom in atoms])
        result: Value = []
        for length in shape:
            axis, left = [], length
            while left > 1:
                if not rest:
                    return self.all_fixed(value, shape)
                leaf = rest.pop(0)
                if self.size[leaf] > left:
                    if self.size[leaf] % left:
                        return self.all_fixed(value, shape)
                    self.split(leaf, left)
                    # The same atom may stand elsewhere, here and in what is done.
                    rest = self.leaves([leaf, *rest])
                    leaf = rest.pop(0)
                if left % self.size[leaf]:
                    return self.all_fixed(value, shape)
                left //= self.size[leaf]
                axis.append(leaf)
            result.append(axis)
        return result

    def part(self, atoms: Atoms, parts: int, length: int) -> Atoms:
        """The axis of any of so many equal parts of an axis: parts turn alike, in their order."""
        number, units = self.reshaped([atoms], (parts, length))
        self.fix(number)
        return units

    def all_fixed(self, value: Value, shape: Sequence[int]) -> Value:
        self.fix(*value)
        return [self.new(length, True) for length in shape]


def _of_constants(axes: _Axes, constants: Sequence[Any]) -> list[Value]:
    """The axes of arrays that do not move: fixed, unless all entries are equal."""
    values = []
    for constant in constants:
        plain = np.size(constant) > 0 and bool(np.all(constant == np.ravel(constant)[0]))
        values.append([axes.new(length, not plain) for length in np.shape(constant)])
    return values


def _run(axes: _Axes, program: Any, constants: list[Value], given: list[Value]) -> list[Value]:
    """Follow the axes through a program; the axes of its outputs."""
    known: dict[Any, Value] = {}
    known.update(zip(program.constvars, constants, strict=True))
    known.update(zip(program.invars, given, strict=True))

    def read(atom):
        if hasattr(atom, "val"):  # a literal in the program
            return _of_constants(axes, [atom.val])[0]
        return known[atom]

    for equation in program.eqns:
        inputs = [read(atom) for atom in equation.invars]
        shapes = [tuple(atom.aval.shape) for atom in equation.outvars]
        rule = _RULES.get(equation.primitive.name)
        if equation.primitive.name in _ELEMENTWISE:
            outputs = _elementwise(axes, inputs, shapes)
        elif rule is not None:
            outputs = rule(axes, equation, inputs, shapes)
        else:
            outputs = _inside(axes, equation, inputs, shapes)
        known.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in program.outvars]


# --- Rules ----------------------------------------------------------------------------------------

_WORDS = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp conj
    convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor
    ge gt imag integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter
    not optimization_barrier or pow real reduce_precision rem round rsqrt select_n sign sin sinh
    sqrt square stop_gradient sub tan tanh xor
"""
_ELEMENTWISE = frozenset(_WORDS.split())


def _elementwise(axes: _Axes, inputs: list[Value], shapes: list[tuple]) -> list[Value]:
    if len(shapes) > 1:  # several arrays that pass by each other
        return inputs
    result: Value = [[] for _ in shapes[0]]
    for value in inputs:
        if len(value) == len(result):  # others are single numbers
            for i, atoms in enumerate(value):
                # An axis of length 1 goes with any other.
                if result[i] and atoms:
                    axes.join(result[i], atoms)
                result[i] = result[i] or atoms
    return [result]


def _unknown(axes: _Axes, equation: Any, inputs: list[Value], shapes: list[tuple]) -> list[Value]:
    for value in inputs:
        axes.fix(*value)
    return [[axes.new(length, True) for length in shape] for shape in shapes]


def _inside(axes: _Axes, equation: Any, inputs: list[Value], shapes: list[tuple]) -> list[Value]:
    """An operation that is a program of its own, such as `jit`; else an unknown one."""
    given = [atom.aval.shape for atom in equation.invars]
    for inner in equation.params.values():
        program, constants = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
        # A program of other shapes is applied to entries, as that of a general reduction.
        if hasattr(program, "eqns") and [x.aval.shape for x in program.invars] == given:
            return _run(axes, program, _of_constants(axes, constants), inputs)
    return _unknown(axes, equation, inputs, shapes)


def _broadcast(axes: _Axes, equation: Any, inputs: list[Value], shapes: list[tuple]) -> list[Value]:
    placed = dict(zip(equation.params["broadcast_dimensions"], inputs[0], strict=True))
    lengths = dict(
        zip(equation.params["broadcast_dimensions"], equation.invars[0].aval.shape, strict=True)
    )
    return [
        [
            placed[i] if lengths.get(i) == length else axes.new(length)
            for i, length in enumerate(shapes[0])
        ]
    ]


def _reshape(axes: _Axes, equation: Any, inputs: list[Value], shapes: list[tuple]) -> list[Value]:
    if equation.params.get("dimensions") is not None:
        return _unknown(axes, equation, inputs, shapes)
    return [axes.reshaped(inputs[0], shapes[0])]


def _transpose(axes: _Axes, equation: Any, inputs: list[Value], shapes: list[tuple]) -> list[Value]:
    return [[inputs[0][i] for i in equation.params["permutation"]]]


def _squeeze(axes: _Axes, equation: Any, inputs: list[Value], shapes: list[tuple]) -> list[Value]:
    gone = equation.params["dimensions"]
    return [[atoms for i, atoms in enumerate(inputs[0]) if i not in gone]]


def _expand(axes: _Axes, equation: Any, inputs: list[Value], shapes: list[tuple]) -> list[Value]:
    given = iter(inputs[0])
    added = equation.params["dimensions"]
    return [[[] if i in added else next(given) for i in range(len(shapes[0]))]]


def _reduce(axes: _Axes, equation: Any, inputs: list[Value], shapes: list[tuple]) -> list[Value]:
    gone = equation.params["axes"]
    return [[atoms for i, atoms in enumerate(inputs[0]) if i not in gone]]


def _place_of(axes: _Axes, equation: Any, inputs: list[Value], shapes: list[tuple]) -> list[Value]:
    axes.fix(*(inputs[0][i] for i in equation.params["axes"]))
    return _reduce(axes, equation, inputs, shapes)


def _along_one(axis: str) -> Callable[..., list[Value]]:
    """Operations that know places along one axis and treat the others alike."""

    def rule(axes, equation, inputs, shapes):
        chosen = equation.params[axis]
        # One axis may be an integer of NumPy.
        chosen = {int(i) for i in np.atleast_1d(chosen)}
        for value in inputs:
            axes.fix(*(value[i] for i in chosen))
        first = inputs[0]
        for value in inputs[1:]:
            for i, (one, other) in enumerate(zip(first, value, strict=True)):
                if i not in chosen:
                    axes.join(one, other)
        return [
            [axes.new(shape[i], True) if i in chosen else first[i] for i in range(len(shape))]
            for shape in shapes
        ]

    return rule


def _windowed(axes: _Axes, equation: Any, inputs: list[Value], shapes: list[tuple]) -> list[Value]:
    """Operations on windows: an axis passes if its windows are single entries in their order."""
    parameters = equation.params
    rank = len(inputs[0])
    ones = (1,) * rank
    result = []
    for i in range(rank):
        alone = all(
            (parameters.get(name) or ones)[i] == 1
            for name in ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
        )
        alone = alone and tuple((parameters.get("padding") or ((0, 0),) * rank)[i]) == (0, 0)
        if not alone:
            axes.fix(inputs[0][i])
        result.append(inputs[0][i] if alone else axes.new(shapes[0][i], True))
    return [result]


def _kept_whole(
    axes: _Axes, equation: Any, inputs: list[Value], shapes: list[tuple]
) -> list[Value]:
    """Slices and pads: an axis passes if its length stays, or one of its equal parts is taken."""
    before, result = equation.invars[0].aval.shape, []
    for i, length in enumerate(shapes[0]):
        if before[i] == length and not _shifted(equation, i):
            result.append(inputs[0][i])
        elif _is_part(equation, i, before[i], length):
            result.append(axes.part(inputs[0][i], before[i] // length, length))
        else:
            axes.fix(inputs[0][i])
            result.append(axes.new(length, True))
    return [result]


def _is_part(equation: Any, i: int, before: int, length: int) -> bool:
    """Whether a slice takes one of the equal parts of an axis, as the gates of a cell lie."""
    if equation.primitive.name != "slice" or length == 0 or before % length:
        return False
    strides = equation.params["strides"]
    return (strides is None or strides[i] == 1) and not (
        equation.params["start_indices"][i] % length
    )


def _shifted(equation: Any, i: int) -> bool:
    padding = equation.params.get("padding_config")
    return padding is not None and tuple(padding[i]) != (0, 0, 0)


def _split(axes: _Axes, equation: Any, inputs: list[Value], shapes: list[tuple]) -> list[Value]:
    along = equation.params["axis"]
    if len(set(shapes)) > 1:
        return _along_one("axis")(axes, equation, inputs, shapes)
    (value,) = inputs
    part = axes.part(value[along], len(shapes), shapes[0][along])
    return [[*value[:along], part, *value[along + 1 :]] for _ in shapes]


def _concatenate(
    axes: _Axes, equation: Any, inputs: list[Value], shapes: list[tuple]
) -> list[Value]:
    """Parts of one length turn alike: what they turn with would else have no axis of its own."""
    along = equation.params["dimension"]
    if len({atom.aval.shape for atom in equation.invars}) > 1:
        return _along_one("dimension")(axes, equation, inputs, shapes)
    first = inputs[0]
    for value in inputs[1:]:
        for one, other in zip(first, value, strict=True):
            axes.join(one, other)
    behind = axes.new(len(inputs), True) + first[along]
    return [[*first[:along], behind, *first[along + 1 :]]]


def _iota(axes: _Axes, equation: Any, inputs: list[Value], shapes: list[tuple]) -> list[Value]:
    along = equation.params["dimension"]
    return [[axes.new(length, i == along) for i, length in enumerate(shapes[0])]]


def _dot(axes: _Axes, equation: Any, inputs: list[Value], shapes: list[tuple]) -> list[Value]:
    (left, right), (left_batch, right_batch) = equation.params["dimension_numbers"]
    one, other = inputs
    for i, j in zip((*left, *left_batch), (*right, *right_batch), strict=True):
        axes.join(one[i], other[j])
    free_left = [one[i] for i in range(len(one)) if i not in (*left, *left_batch)]
    free_right = [other[j] for j in range(len(other)) if j not in (*right, *right_batch)]
    return [[one[i] for i in left_batch] + free_left + free_right]


def _convolution(
    axes: _Axes, equation: Any, inputs: list[Value], shapes: list[tuple]
) -> list[Value]:
    numbers = equation.params["dimension_numbers"]
    image, kernel = inputs
    (batch, channels, *around), (out, in_, *window) = numbers.lhs_spec, numbers.rhs_spec
    groups = equation.params["feature_group_count"]
    axes.fix(*(image[i] for i in around), *(kernel[i] for i in window))
    lengths = equation.invars[1].aval.shape
    # The channels of groups lie behind each other; within a group they turn alike in all.
    ahead, inside = axes.reshaped([image[channels]], (groups, lengths[in_]))
    group_of_kernel, _ = axes.reshaped([kernel[out]], (groups, lengths[out] // groups))
    axes.join(ahead, group_of_kernel)
    axes.join(inside, kernel[in_])
    if equation.params["batch_group_count"] != 1:
        axes.fix(image[batch], kernel[out])
    result: Value = [[]] * len(image)
    out_batch, out_channels, *out_around = numbers.out_spec
    result[out_batch], result[out_channels] = image[batch], kernel[out]
    for i in out_around:
        result[i] = axes.new(shapes[0][i], True)
    return [result]


def _gather(axes: _Axes, equation: Any, inputs: list[Value], shapes: list[tuple]) -> list[Value]:
    """Rows of a table: axes that are taken whole pass, the others are known by their place."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    table, indices = inputs
    lengths = equation.invars[0].aval.shape
    dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    left = [i for i in range(len(table)) if i not in dropped]
    result: Value = [[]] * len(shapes[0])
    for place, i in zip(numbers.offset_dims, left, strict=True):
        whole = sizes[i] == lengths[i]
        result[place] = table[i] if whole else axes.new(shapes[0][place], True)
        if not whole:
            axes.fix(table[i])
    axes.fix(*(table[i] for i in dropped), *indices)
    for place, length in enumerate(shapes[0]):
        if place not in numbers.offset_dims:
            result[place] = axes.new(length, True)
    return [result]


def _scan(axes: _Axes, equation: Any, inputs: list[Value], shapes: list[tuple]) -> list[Value]:
    """A loop: what it carries turns alike before and after, and steps keep their order."""
    program, length = equation.params["jaxpr"], equation.params["length"]
    # By shapes: versions of jax count in different ways. What is of no step keeps its own.
    held = _alike(equation.invars, program.jaxpr.invars)
    carried = _alike(equation.outvars, program.jaxpr.outvars)
    constants = held - carried
    along = inputs[held:]
    axes.fix(*(value[0] for value in along))
    steps = [value[1:] for value in along]
    given = inputs[:held] + steps
    outputs = _run(axes, program.jaxpr, _of_constants(axes, program.consts), given)
    for before, after in zip(inputs[constants:held], outputs, strict=False):
        for one, other in zip(before, after, strict=True):
            axes.join(one, other)
    return outputs[:carried] + [[axes.new(length, True), *value] for value in outputs[carried:]]


def _alike(outside: Sequence[Any], within: Sequence[Any]) -> int:
    """How many variables of a loop have the same shape in each step as outside of it."""
    pairs = zip(outside, within, strict=True)
    return sum(one.aval.shape == other.aval.shape for one, other in pairs)


def _cond(axes: _Axes, equation: Any, inputs: list[Value], shapes: list[tuple]) -> list[Value]:
    """A choice between programs: what all return in one place turns alike."""
    first, *others = (
        _run(axes, branch.jaxpr, _of_constants(axes, branch.consts), inputs[1:])
        for branch in equation.params["branches"]
    )
    for other in others:
        for value, same in zip(first, other, strict=True):
            for one, another in zip(value, same, strict=True):
                axes.join(one, another)
    return first


_RULES = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "expand_dims": _expand,
    "reduce_sum": _reduce,
    "reduce_max": _reduce,
    "reduce_min": _reduce,
    "reduce_prod": _reduce,
    "reduce_and": _reduce,
    "reduce_or": _reduce,
    "argmax": _place_of,
    "argmin": _place_of,
    "concatenate": _concatenate,
    "split": _split,
    "sort": _along_one("dimension"),
    "rev": _along_one("dimensions"),
    "cumsum": _along_one("axis"),
    "cumprod": _along_one("axis"),
    "cummax": _along_one("axis"),
    "cummin": _along_one("axis"),
    "cumlogsumexp": _along_one("axis"),
    "reduce_window_sum": _windowed,
    "reduce_window_max": _windowed,
    "reduce_window_min": _windowed,
    "slice": _kept_whole,
    "dynamic_slice": _kept_whole,
    "pad": _kept_whole,
    "iota": _iota,
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "gather": _gather,
    "scan": _scan,
    "cond": _cond,
    "while": _unknown,
}
