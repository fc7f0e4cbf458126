"""What engines are measured on: shapes, and inputs of these shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, helper

from qpass.calibrate.sources import NpzFiles
from qpass.calibrate.synthetic import Synthetic
from qpass.engine import dims
from qpass.engine.profiles import Profile, Shape, check, profiles_of
from qpass.engine.run import Engine
from qpass.errors import QpassError
from qpass.runtime import Input, inputs_of

Array = NDArray[Any]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Point:
    """Inputs that all engines are measured on. An engine gets them in its own dtypes, see `fit`.

    Args:
        batch: None where no dim is known to be the batch.
    """

    feeds: dict[str, Array]
    batch: int | None = None

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: x.shape for name, x in self.feeds.items()}

    def __str__(self) -> str:
        return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in self.shapes.items())


def of_file(path: Path, inputs: Mapping[str, Input]) -> Point:
    """The arrays of an .npz file.

    Raises:
        QpassError: it cannot be read, or its arrays are not the inputs.
    """
    found = NpzFiles([path]).read(0)
    if missing := [name for name in inputs if name not in found]:
        raise QpassError(f"{path} has no array '{missing[0]}'; the inputs are {', '.join(inputs)}")
    for name, x in found.items():
        check("inputs", name, x.shape, inputs)
    shapes = {name: found[name].shape for name in inputs}
    dims.sizes("inputs", shapes, inputs)
    return Point({name: found[name] for name in inputs}, dims.batch(shapes, inputs))


def made_up(proto: ModelProto, shapes: Shapes) -> Point:
    """Made-up inputs of a model, as those that it is verified on."""
    return Point(Synthetic(proto, batches=1, shapes=shapes).read(0), dims.batch(shapes, required(proto)))


def outline(engine: Engine) -> ModelProto:
    """A model of an engine's inputs and nothing else; dims have their names where its sidecar has."""
    names = engine.facts.get("dims", {})
    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(dtype), names.get(name, [d if d >= 0 else None for d in shape])
        )
        for name, (dtype, shape) in engine.inputs.items()
    ]
    return helper.make_model(helper.make_graph([], engine.path.name, inputs, []))


def required(proto: ModelProto) -> dict[str, Input]:
    """The inputs that have no default."""
    return {name: i for name, i in inputs_of(proto).items() if not i.optional}


def complete(said: Shapes, inputs: Mapping[str, Input], usual: Shapes | None = None) -> dict[str, Shape]:
    """The shapes of all inputs at a point of which `said` gives some.

    Args:
        usual: shapes of what is not said, not even by a dim of that name; by default it is guessed as in
            `qpass.engine.profiles`.

    Raises:
        QpassError: a shape fits no input, or they contradict each other.
    """
    for name, shape in said.items():
        check("shapes", name, shape, inputs)
    known, sums = dims.sizes("shapes", said, inputs), dims.sums(inputs.values())
    if usual is None:
        usual = {n: p.opt for n, p in profiles_of(inputs, {}, said, {}).items()}
    for name, shape in usual.items():
        for dim, size in zip(inputs[name].shape or (), shape, strict=True):
            if isinstance(dim, str) and dim not in sums:
                known.setdefault(dim, size)
    dims.complete("shapes", known, sums)
    return {n: said.get(n) or _shape(i, known, usual.get(n)) for n, i in inputs.items()}


def _shape(given: Input, known: Mapping[str, int], usual: Shape | None) -> Shape:
    """The dims that are fixed, those of known names, and where there is no name the usual ones."""
    shape = given.shape or ()
    rest = usual if usual is not None else (0,) * len(shape)  # none of a fixed shape is asked for
    return tuple(
        d if isinstance(d, int) else size if d is None else known[d] for d, size in zip(shape, rest, strict=True)
    )


def spanned(
    points: Sequence[Shapes], inputs: Mapping[str, Input], least: Shapes, usual: Shapes, most: Shapes
) -> tuple[Shapes, Shapes, Shapes]:
    """The smallest, usual and largest shapes of engines for these points: those given, else what spans the points, the
    first of which is the usual one. A dim that is a sum spans the sums of what its parts span."""
    if not points:
        return least, usual, most
    return (
        _end("min", min, points, inputs, least),
        _end("opt", min, points[:1], inputs, usual),
        _end("max", max, points, inputs, most),
    )


def _end(
    flag: str, end: Callable[[Iterable[int]], int], points: Sequence[Shapes], inputs: Mapping[str, Input], given: Shapes
) -> Shapes:
    """The smallest or largest shapes of points; `given` goes before them, also for other dims of the same names."""
    for name, shape in given.items():
        check(flag, name, shape, inputs)
    known, sums = dims.sizes(flag, given, inputs), dims.sums(inputs.values())
    of_points = [dims.sizes("shapes", p, inputs) for p in points]
    for dim in of_points[0].keys() - sums.keys():
        known.setdefault(dim, end(sizes[dim] for sizes in of_points))
    dims.complete(flag, known, sums)
    ends = {n: tuple(map(end, zip(*(p[n] for p in points), strict=True))) for n in inputs}
    return {n: given.get(n) or _shape(i, known, ends[n]) for n, i in inputs.items()}


def check_within(points: Iterable[Shapes], profiles: Mapping[str, Profile]) -> None:
    """Raise QpassError where a point is outside of what engines are to be built for."""
    for point in points:
        for name, p in profiles.items():
            if not all(a <= d <= b for a, d, b in zip(p.min, point[name], p.max, strict=True)):
                shape = "x".join(map(str, point[name]))
                raise QpassError(f"--shapes {name}:{shape} is not within what is built, {p}; widen --min and --max")


def fit(point: Point, engine: Engine) -> dict[str, Array]:
    """The feeds as an engine takes them: floats in its float types, integers in its integer types.

    Raises:
        QpassError: the engine does not take such inputs.
    """
    wanted = {name: dtype for name, (dtype, _) in engine.inputs.items()}
    feeds = dict(point.feeds)
    for name in feeds.keys() & wanted.keys():
        x, dtype = feeds[name], wanted[name]
        same_kind = (_is_float(x.dtype) and _is_float(dtype)) or (x.dtype.kind in "iu" and dtype.kind in "iu")
        if same_kind and x.dtype != dtype:
            feeds[name] = cast = x.astype(dtype)
            if not _is_float(dtype) and not np.array_equal(cast, x):
                raise QpassError(f"the input '{name}' has values that {engine.path.name} cannot take as {dtype}")
    try:
        return engine.check(feeds)
    except QpassError as error:
        raise QpassError(f"{engine.path.name} cannot be measured at {point}: {error}") from error


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype == ml_dtypes.bfloat16
