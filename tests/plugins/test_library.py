"""One declaration: what the C++ of an op says is what its Python says; and the library's own checks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qpass.errors import QpassError
from qpass.ops import REGISTRY, Op
from qpass.ops.base import Attr, Tensor
from qpass.ops.examples import example, signatures
from qpass.ops.shapes import Case as ShapeCase
from qpass.plugins import DeviceTensor, Library
from tests.plugins.shells import compile_shells, cuda_include

BUILT_IN = [name for name, op in REGISTRY.items() if type(op).__module__.startswith("qpass.")]


def declared(tensor: Tensor) -> dict[str, Any]:
    """A tensor of Python's declaration in the library's words."""
    shape: Any = tensor.shape
    if isinstance(shape, ShapeCase):
        shape = {"attribute": shape.attribute, "shapes": {str(k): v for k, v in shape.shapes.items()}}
    when = tensor.when and {"attribute": tensor.when.attribute, "mask": tensor.when.mask, "on": tensor.when.on}
    return {"name": tensor.name, "kind": tensor.kind, "shape": shape, "when": when}


def test_every_op_is_there(shells: Library, shells8: Library) -> None:
    assert list(shells.ops) == BUILT_IN
    assert shells8.description["ops"] == shells.description["ops"], "one declaration for both interfaces"
    assert (shells.interface, shells8.interface) == ("IPluginV3", "IPluginV2DynamicExt")
    assert {*shells.ops["Dequantize"].types} - {*shells8.ops["Dequantize"].types} == {"bfloat16"}


@pytest.mark.parametrize("name", BUILT_IN)
def test_one_declaration(name: str, shells: Library) -> None:
    op, compiled = REGISTRY[name], shells.ops[name]
    assert dict(compiled.fields) == {a.name: a.type.__name__ for a in op.attributes}
    assert list(compiled.fields) == [a.name for a in op.attributes]
    assert list(compiled.inputs) == [declared(i) for i in op.inputs]
    assert list(compiled.outputs) == [declared(o) for o in op.outputs]
    assert compiled.version == "1"


IN_REGISTRY = """
import json, sys
import tensorrt_rtx_bindings as trt
registry = trt.get_plugin_registry()
assert registry.load_library(sys.argv[1])
found = {c.name: [[f.name, str(f.type)] for f in c.field_names] for c in registry.all_creators
         if (c.plugin_namespace, c.plugin_version) == ("qpass", "1")}
print(json.dumps(found))
"""


def test_creator_fields_in_tensorrt(shells: Library, tmp_path: Path) -> None:
    """TensorRT-RTX loads the library, and sees the attributes that Python declares."""
    libs = pytest.importorskip("tensorrt_rtx_libs", reason="tensorrt-rtx-cu13-libs is not installed")
    folder = Path(next(iter(libs.__path__)))
    for file in folder.glob("*.so.1"):
        (tmp_path / file.name).symlink_to(file)
        (tmp_path / file.name.removesuffix(".1")).symlink_to(file)
    env = dict(os.environ) | {"LD_LIBRARY_PATH": str(tmp_path)}
    told = subprocess.run(
        [sys.executable, "-c", IN_REGISTRY, shells.path], env=env, capture_output=True, text=True, check=False
    )
    assert not told.returncode, told.stderr
    kinds = {int: "INT32", float: "FLOAT32"}
    wanted = {n: [[a.name, kinds[a.type]] for a in REGISTRY[n].attributes] for n in BUILT_IN}
    seen = {n: [[f, k.rpartition(".")[2]] for f, k in fields] for n, fields in json.loads(told.stdout).items()}
    assert seen == wanted


def present(op: Op, attrs: dict[str, Attr], lead: tuple[int, ...]) -> tuple[list[DeviceTensor], list[DeviceTensor]]:
    """Inputs and outputs of an example, at no address."""
    case = example(op, attrs, np.dtype(np.float16), lead=lead)
    inputs = [DeviceTensor(0, x.dtype, x.shape) for x in case.inputs if x is not None]
    outputs = [DeviceTensor(0, d, tuple(int(i or 0) for i in s or ())) for d, s in op.infer(case.kinds, case.attrs)]
    return inputs, outputs


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 0)])
def test_shapes_fit_in_every_signature(name: str, lead: tuple[int, ...], shells: Library) -> None:
    """C++ solves the shapes that Python infers: a call gets past the checks, up to the kernel that is not there."""
    op = REGISTRY[name]
    for attrs in signatures(op):
        inputs, outputs = present(op, attrs, lead)
        with pytest.raises(QpassError, match=rf"{name}\(.*there is no kernel"):
            shells.node(name, attrs).run(inputs, outputs)


@pytest.mark.parametrize("name", BUILT_IN)
def test_wrong_calls_are_refused(name: str, shells: Library) -> None:
    """One dim, one dtype, one tensor off: the check says so before any kernel is asked."""
    op = REGISTRY[name]
    attrs = list(signatures(op))[-1]
    inputs, outputs = present(op, attrs, (2, 3))
    node = shells.node(name, attrs)
    last = outputs[-1]
    longer = DeviceTensor(0, last.dtype, (*last.shape[:-1], last.shape[-1] + 1))
    with pytest.raises(QpassError, match="its output"):
        node.run(inputs, [*outputs[:-1], longer])
    other = DeviceTensor(0, np.dtype(np.float64 if inputs[0].dtype != np.int8 else np.float32), inputs[0].shape)
    with pytest.raises(QpassError, match=op.inputs[0].name):
        node.run([other, *inputs[1:]], outputs)
    with pytest.raises(QpassError, match="by its attributes"):
        node.run([*inputs, inputs[0]], outputs)


def test_broadcasting_residual(shells: Library) -> None:
    op = REGISTRY["RmsnormQuantization"]
    attrs = op.attributes_for({"x", "residual", "gamma"}, {"q", "scale", "sum"}, {})
    f16 = np.dtype(np.float16)
    node = shells.node(op.name, attrs)

    def call(x: tuple[int, ...], residual: tuple[int, ...], lead: tuple[int, ...]) -> None:
        tensors = [DeviceTensor(0, f16, (*x, 64)), DeviceTensor(0, f16, (*residual, 64)), DeviceTensor(0, f16, (64,))]
        outputs = [
            DeviceTensor(0, np.dtype(np.int8), (*lead, 64)),
            DeviceTensor(0, np.dtype(np.float32), (*lead, 1)),
            DeviceTensor(0, f16, (*lead, 64)),
        ]
        with pytest.raises(QpassError) as refused:
            node.run(tensors, outputs)
        assert "there is no kernel" in str(refused.value), refused.value

    call((2, 3), (2, 3), (2, 3))
    call((1, 3), (2, 3), (2, 3))
    call((2, 3), (3,), (2, 3))
    call((4, 1), (2, 1, 3), (2, 4, 3))


def test_a_residual_that_cannot_broadcast(shells: Library) -> None:
    op = REGISTRY["RmsnormQuantization"]
    node = shells.node(op.name, op.attributes_for({"x", "residual", "gamma"}, {"q", "scale"}, {}))
    f16, i8, f32 = np.dtype(np.float16), np.dtype(np.int8), np.dtype(np.float32)
    inputs = [DeviceTensor(0, f16, (3, 64)), DeviceTensor(0, f16, (2, 64)), DeviceTensor(0, f16, (64,))]
    with pytest.raises(QpassError, match=r"residual is float16\[2, 64\], which does not fit"):
        node.run(inputs, [DeviceTensor(0, i8, (3, 64)), DeviceTensor(0, f32, (3, 1))])


OWN = """
#include "op.h"
using namespace qpass;
struct Own : Op {
  using Op::Op;
  int run(const Call&, cudaStream_t) const override { return 801; }
};
const Own mask("Mask", {}, {{"mask", Kind::kInt8, "... K"}, {"x", Kind::kT, "... K"}}, {{"y", Kind::kT, "... K"}});
const Own halve("Halve", {}, {{"x", Kind::kInt8, "N K"}}, {{"y", Kind::kInt8, "N K/2"}});
const Own lost("Lost", {}, {{"x", Kind::kInt8, "N K"}}, {{"y", Kind::kInt8, "N M"}});
const Register registered[] = {Register(mask), Register(halve), Register(lost)};
"""


def test_ops_of_ones_own(tmp_path: Path) -> None:
    """T is the type of the first input that is declared T, outputs may have parts of dims; nonsense is refused."""
    if shutil.which("g++") is None or cuda_include() is None:
        pytest.skip("no g++, or no CUDA headers: pip install nvidia-cuda-runtime")
    library = compile_shells(tmp_path, extra=OWN)
    i8, f16 = np.dtype(np.int8), np.dtype(np.float16)
    calls: dict[str, tuple[list[tuple[np.dtype[Any], tuple[int, ...]]], tuple[np.dtype[Any], tuple[int, ...]], str]] = {
        "Mask": ([(i8, (2, 4)), (f16, (2, 4))], (f16, (2, 4)), "there is no kernel"),
        "Halve": ([(i8, (2, 4))], (i8, (2, 2)), "there is no kernel"),
        "Lost": ([(i8, (2, 4))], (i8, (2, 4)), "its output y"),
    }
    for name, (inputs, output, said) in calls.items():
        with pytest.raises(QpassError, match=said):
            library.node(name, {}).run([DeviceTensor(0, *i) for i in inputs], [DeviceTensor(0, *output)])


HOST = """
#include <cstdint>
#include <cstdio>
#include <dlfcn.h>
#ifdef TEN  // ILogger and ILoggerFinder before TensorRT 11: no base, and their one function first
struct Base {};
#else
struct Base {
  virtual int32_t language() const noexcept { return 0; }
  virtual void* information() const noexcept { return nullptr; }
  virtual ~Base() noexcept = default;
};
#endif
struct Logger : Base {
  virtual void log(int32_t severity, const char* text) noexcept { std::printf("%d %s\\n", severity, text); }
};
struct Finder : Base {
  virtual Logger* findLogger() { static Logger logger; return &logger; }
};
extern "C" int32_t getInferLibVersion() noexcept { return VERSION; }
struct Fields { int32_t count; const void* fields; };
#ifdef EIGHT
#define GET "getPluginCreators"
struct Creator {  // of IPluginCreator
  virtual int32_t version() const noexcept = 0;
  virtual const char* name() const noexcept = 0;
  virtual const char* plugin_version() const noexcept = 0;
  virtual const void* field_names() noexcept = 0;
  virtual void* create(const char* name, const Fields* fields, int32_t = 0) noexcept = 0;
};
#else
#define GET "getCreators"
struct Creator {  // of IPluginCreatorV3One: behind IVersionedInterface's four comes createPlugin
  virtual int32_t language() const noexcept = 0;
  virtual void* information() const noexcept = 0;
  virtual ~Creator() noexcept = default;
  virtual void* create(const char* name, const Fields* fields, int32_t phase) noexcept = 0;
};
#endif
extern "C" int host(const char* path) {
  static Finder finder;
  void* library = dlopen(path, RTLD_NOW);
  if (!library) return 1;
  reinterpret_cast<void (*)(void*)>(dlsym(library, "setLoggerFinder"))(&finder);
  int32_t count = 0;
  auto creators = reinterpret_cast<Creator* const* (*)(int32_t&)>(dlsym(library, GET))(count);
  Fields none{0, nullptr};
  void* plugin = creators[0]->create("x", &none, 0);
  std::fflush(stdout);
  return plugin ? 2 : 0;
}
"""


@pytest.mark.parametrize(
    ("version", "flags"), [(8601, ["-DTEN", "-DEIGHT"]), (101600, ["-DTEN"]), (110100, []), (10701, [])]
)
def test_errors_reach_the_logger_of_every_tensorrt(
    version: int, flags: list[str], shells: Library, shells8: Library, tmp_path: Path
) -> None:
    """TensorRT 10's logger has another layout than 11's and RTX's: the wrong one would end the process."""
    (tmp_path / "host.cpp").write_text(HOST)
    host = tmp_path / "libhost.so"
    command = ["g++", "-std=c++17", "-shared", "-fPIC", f"-DVERSION={version}", *flags, "-o", str(host)]
    subprocess.run([*command, str(tmp_path / "host.cpp"), "-ldl"], check=True)
    code = "import ctypes, sys; sys.exit(ctypes.CDLL(sys.argv[1]).host(sys.argv[2].encode()))"
    library = shells8 if version == 8601 else shells
    done = subprocess.run([sys.executable, "-c", code, host, library.path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1 qpass: QuantizeTensor: its attribute has_smoother is missing, or is no number\n"


def test_what_a_library_lacks(shells: Library, tmp_path: Path) -> None:
    with pytest.raises(QpassError, match="a kernel that does nothing could not be launched, error 801"):
        shells.launch_us(0)
    with pytest.raises(QpassError, match="has no op Nothing; it has QuantizeTensor"):
        shells.node("Nothing", {})
    with pytest.raises(QpassError, match="SmoothQuantGemm needs its attribute 'output_type'"):
        shells.node("SmoothQuantGemm", {})
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(QpassError, match=r"text\.so cannot be loaded"):
        _ = Library(tmp_path / "text.so").ops
