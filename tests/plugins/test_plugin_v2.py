"""Plugins under TensorRT 8.6's interface: what they answer when it builds, and after they were serialized.

TensorRT is played by host_v2.cpp; that its own registry takes these plugins was tried with 8.6.1.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qpass.plugins import Library
from qpass.plugins.compile import source_folder
from tests.plugins.shells import cuda_include

Ask = Callable[[str, str, str, str], str]
FLOAT, HALF, INT8 = 0, 1, 2  # of TensorRT's DataType


@pytest.fixture(scope="module")
def ask(shells8: Library, tmp_path_factory: pytest.TempPathFactory) -> Ask:
    host = tmp_path_factory.mktemp("host") / "libhost.so"
    include = cuda_include()
    command = ["g++", "-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-isystem", str(include)]
    command += [f"-I{source_folder() / 'minimal' / '8'}", str(Path(__file__).with_name("host_v2.cpp")), "-o", str(host)]
    subprocess.run([*command, "-ldl"], check=True)
    code = "import ctypes, sys; h, *a = sys.argv[1:]; sys.exit(ctypes.CDLL(h).host(*(x.encode() for x in a)))"

    def asked(op: str, fields: str, inputs: str, outputs: str) -> str:
        run = [sys.executable, "-c", code, str(host), str(shells8.path), op, fields, inputs, outputs]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        assert done.returncode in (0, 3), done.stderr
        return done.stdout + done.stderr

    return asked


GEMM = "has_per_token_scaling=1 has_per_channel_scaling=1 output_type=1 int8_dims=0,2,32,64,0,0"
"""A Gemm whose output the model says is float32."""


def test_packed_weights_come_as_int32(ask: Ask) -> None:
    inputs = "INT8:2x16x64 INT32:512 FLOAT:2x16x1 FLOAT:32"
    told = ask("SmoothQuantGemm", f"{GEMM} has_bias=0", inputs, "FLOAT:2x16x32")
    assert told.splitlines()[0] == "qpass SmoothQuantGemm 1"
    assert f"outputs 1\noutput 0 type {FLOAT} dims 2 16 32\ntakes 1 1 1 1 1\n" in told
    # the shells have no kernels: 801 is what each of them returns, after all checks have passed
    assert told.count("enqueue 1\n") == 2
    assert "there is no kernel in this library" in told
    assert "SmoothQuantGemm(q int8[2, 16, 64], weight int8[32, 64]" in told
    assert told.count("takes 1 1 1 1 1") == 2, "after serialization too"
    assert "short 0" in told
    assert "the engine is of other plugins than these" in told
    plain = ask("SmoothQuantGemm", f"{GEMM} has_bias=0", inputs.replace("INT32:512", "INT8:32x64"), "FLOAT:2x16x32")
    assert "takes 1 0 1 1 1" in plain, "what is said to be a view must be one"


def test_tensorrt_chooses_the_output_type(ask: Ask) -> None:
    inputs = "INT8:16x64 INT32:512 FLOAT:16x1 FLOAT:32"
    half = ask("SmoothQuantGemm", f"{GEMM} has_bias=0", inputs, "HALF:16x32")
    assert f"output 0 type {FLOAT} dims 16 32\ntakes 1 1 1 1 1" in half
    assert "its output" not in half, "it adopts the type that it is asked for"
    assert "takes 1 1 1 1 0" in ask("SmoothQuantGemm", f"{GEMM} has_bias=0", inputs, "INT8:16x32")
    both = ask("SmoothQuantGemm", f"{GEMM} has_bias=1", f"{inputs} HALF:32", "HALF:16x32")
    assert "takes 1 1 1 1 1 1" in both
    assert "bias" not in both.partition("enqueue")[0]
    mixed = ask("SmoothQuantGemm", f"{GEMM} has_bias=1", f"{inputs} HALF:32", "FLOAT:16x32")
    assert "takes 1 1 1 1 1 0" in mixed, "bias and output are of one type"


def test_types_of_activations_go_together(ask: Ask) -> None:
    told = ask("QuantizePerToken", "has_smoother=0", "HALF:8x64", "INT8:8x64 FLOAT:8x1")
    assert f"output 0 type {INT8} dims 8 64\noutput 1 type {FLOAT} dims 8 1\ntakes 1 1 1" in told
    assert "takes 0 1 1" in ask("QuantizePerToken", "has_smoother=0", "INT8:8x64", "INT8:8x64 FLOAT:8x1")
    outputs = "INT8:8x64 FLOAT:8x1"
    assert "takes 1 1 1 1" in ask("QuantizePerToken", "has_smoother=1", "HALF:8x64 FLOAT:64", outputs)
    assert "takes 1 0 1 1" in ask("QuantizePerToken", "has_smoother=1", "HALF:8x64 HALF:64", outputs)


def test_zero_points_of_three_groups(ask: Ask) -> None:
    """Their bytes are padded to whole int32s; the dims are those of the int8 numbers."""
    inputs = "HALF:5x384 INT32:1584 FLOAT:33x3 INT32:25"
    fields = "quant_algo=2 group_size=128 weight_type_id=2 int8_dims=0,2,33,192,0,2,33,3"
    told = ask("WeightOnlyGroupwiseQuantMatmul", fields, inputs, "HALF:5x33")
    assert "dims 5 33\ntakes 1 1 1 1 1" in told, told
    assert "zero int8[33, 3]" in told
    wrong = ask("WeightOnlyGroupwiseQuantMatmul", fields.replace("2,33,3", "2,33"), inputs, "HALF:5x33")
    assert "its int8_dims is no list of ranks and dims" in wrong


def test_shapes_that_do_not_fit(ask: Ask) -> None:
    told = ask("QuantizePerToken", "has_smoother=0", "HALF:8x64 HALF:64", "INT8:8x64 FLOAT:8x1")
    assert "dims none" in told
    assert "the node has 2 inputs and 2 outputs, but its attributes say 1 and 2" in told
    told = ask("QuantizePerToken", "has_smoother=0", "HALF:8x64", "INT8:8x32 FLOAT:8x1")
    assert "its output q is int8[8, 32]" in told
    assert "attribute has_smoother is missing" in ask("QuantizePerToken", "", "HALF:8x64", "INT8:8x64 FLOAT:8x1")
