"""What engines are measured on: shapes, and inputs of these shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, helper

from qpass.calibrate.sources import NpzFiles
from qpass.calibrate.synthetic import Synthetic
from qpass.engine.profiles import Profile, Shape, check, profiles_of
from qpass.engine.run import Engine
from qpass.errors import QpassError
from qpass.runtime import Input, inputs_of

Array = NDArray[Any]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Point:
    """Inputs that all engines are measured on. An engine gets them in its own dtypes, see `fit`."""

    feeds: dict[str, Array]

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: x.shape for name, x in self.feeds.items()}

    @property
    def batch(self) -> int:
        """The first dim of the first input; 1 where that has none."""
        return next((shape[0] for shape in self.shapes.values() if shape), 1)

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
    return Point({name: found[name] for name in inputs})


def made_up(proto: ModelProto, shapes: Shapes) -> Point:
    """Made-up inputs of a model, as those that it is verified on."""
    return Point(Synthetic(proto, batches=1, shapes=shapes).read(0))


def outline(engine: Engine) -> ModelProto:
    """A model of an engine's inputs and nothing else."""
    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(dtype), [d if d >= 0 else None for d in shape]
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
        usual: shapes of what is not said; by default dims of one name are the same, and what is left is guessed as in
            `qpass.engine.profiles`.

    Raises:
        QpassError: a shape fits no input.
    """
    for name, shape in said.items():
        check("shapes", name, shape, inputs)
    known = {n: p.opt for n, p in profiles_of(inputs, {}, said, {}).items()} if usual is None else dict(usual)
    fixed = {n: tuple(d for d in i.shape or () if isinstance(d, int)) for n, i in inputs.items()}
    return {n: said.get(n) or known.get(n) or fixed[n] for n in inputs}


def spanned(points: Sequence[Shapes], least: Shapes, usual: Shapes, most: Shapes) -> tuple[Shapes, Shapes, Shapes]:
    """The smallest, usual and largest shapes of engines for these points: those given, else what spans the points, the
    first of which is the usual one."""
    names = points[0] if points else {}
    low = {n: tuple(map(min, zip(*(p[n] for p in points), strict=True))) for n in names}
    high = {n: tuple(map(max, zip(*(p[n] for p in points), strict=True))) for n in names}
    return {**low, **least}, {**names, **usual}, {**high, **most}


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
