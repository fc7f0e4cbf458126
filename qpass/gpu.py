"""The GPU through pycuda: memory, streams, events, and CUDA graphs, which pycuda lacks.

pycuda is imported when a GPU is first asked for. The primary context is used, as CUDA's runtime API does inside the
plugins.
"""

from __future__ import annotations

import atexit
import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qpass.errors import QpassError

Array = NDArray[Any]

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED: memory that Python frees meanwhile does not spoil the capture


@cache
def driver() -> Any:
    """pycuda.driver, with the first GPU's primary context current.

    Raises:
        QpassError: pycuda is not installed, or there is no GPU; says what to do.
    """
    try:
        import pycuda.driver as cuda
    except ImportError as error:
        if "libcuda" in str(error):
            raise QpassError(
                "there is no NVIDIA driver on this machine (libcuda.so.1 is missing), so no GPU"
            ) from error
        raise QpassError("running on a GPU needs pycuda: pip install 'qpass[gpu]'") from error
    try:
        cuda.init()
        if not cuda.Device.count():
            raise QpassError("there is no CUDA GPU on this machine")
        context = cuda.Device(0).retain_primary_context()
        context.push()
        atexit.register(_leave, context, cuda.Error)
    except cuda.Error as error:
        raise QpassError(f"there is no usable CUDA GPU on this machine: {error}") from error
    return cuda


def _leave(context: Any, refused: type[Exception]) -> None:
    """At the process's end: pycuda aborts it where a context is left."""
    with suppress(refused):
        context.pop()


def device() -> Any:
    """The GPU: name(), compute_capability(), multiprocessor_count …"""
    return driver().Device(0)


def capability() -> str:
    """Its compute capability, such as "90"."""
    major, minor = device().compute_capability()
    return f"{major}{minor}"


_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_…


def capabilities() -> tuple[str, ...]:
    """Compute capabilities of all GPUs that CUDA shows to this process, the one that it uses first; none without any.

    The driver is asked, without pycuda, which builds do not need; nvidia-smi is not there on Jetson, and elsewhere
    knows nothing of CUDA_VISIBLE_DEVICES.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count, device = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    found = []
    for ordinal in range(count.value):
        parts = [ctypes.c_int(), ctypes.c_int()]
        failed = cuda.cuDeviceGet(ctypes.byref(device), ordinal)
        for part, attribute in zip(parts, (_MAJOR, _MINOR), strict=True):
            failed = failed or cuda.cuDeviceGetAttribute(ctypes.byref(part), attribute, device)
        if not failed:
            found.append("".join(str(p.value) for p in parts))
    return tuple(found)


def l2_bytes() -> int:
    """Size of its L2 cache."""
    return int(device().get_attribute(driver().device_attribute.L2_CACHE_SIZE))


def free_bytes() -> int:
    """Memory that nothing has taken."""
    return int(driver().mem_get_info()[0])


@contextmanager
def explained() -> Iterator[None]:
    """Turn what CUDA raises meanwhile into a QpassError. A decorator, too.

    A failure of a kernel is sticky: whatever this process asks of the GPU after it fails, too.
    """
    try:
        yield
    except QpassError:
        raise
    except driver().MemoryError as error:
        raise QpassError(f"the GPU is out of memory: {error}; use smaller shapes, or end what else is on it") from error
    except driver().Error as error:
        raise QpassError(f"CUDA: {error}; compute-sanitizer, put before the command, names the kernel") from error


class Buffer:
    """GPU memory, given back with the object.

    Raises:
        QpassError: there is not so much.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        cuda = driver()
        try:
            self._allocation = cuda.mem_alloc(max(size, 1))
        except cuda.MemoryError as error:
            raise QpassError(
                f"the GPU is out of memory: {size} bytes were asked for, {free_bytes()} free; "
                "use smaller shapes, or end what else is on it"
            ) from error
        self.address = int(self._allocation)

    def fill(self, byte: int, start: int = 0, size: int | None = None) -> None:
        size = self.size - start if size is None else size
        if size:
            driver().memset_d8(self.address + start, byte, size)

    def upload(self, array: Array, start: int = 0) -> None:
        if array.nbytes:
            driver().memcpy_htod(self.address + start, _bytes(np.ascontiguousarray(array)))

    def download(self, dtype: np.dtype[Any], shape: tuple[int, ...], start: int = 0) -> Array:
        array = np.empty(shape, dtype)
        if array.nbytes:
            driver().memcpy_dtoh(_bytes(array), self.address + start)
        return array


def _bytes(array: Array) -> NDArray[np.uint8]:
    """The same memory as plain bytes: bfloat16 has no buffer format."""
    return array.reshape(-1).view(np.uint8)


def synchronize() -> None:
    """Wait for everything on the GPU.

    Raises:
        QpassError: something enqueued before has failed.
    """
    with explained():
        driver().Context.synchronize()


class Stopwatch:
    """Times what a stream does, by CUDA events."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._start, self._end = driver().Event(), driver().Event()

    def time(self, work: Callable[[], None]) -> float:
        """µs on the GPU of what `work` enqueues; waits for its end.

        Raises:
            QpassError: something enqueued has failed.
        """
        with explained():
            self._start.record(self._stream)
            work()
            self._end.record(self._stream)
            self._end.synchronize()
            return float(self._start.time_till(self._end)) * 1e3


class Graph:
    """What `work` enqueues on a stream, captured once and launched as one.

    Args:
        work: called with the stream, a pycuda.driver.Stream; may only enqueue.
        stream: to capture and launch on; by default one of its own.

    Raises:
        QpassError: the driver could not capture it.
    """

    def __init__(self, work: Callable[[Any], None], stream: Any = None) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self.stream = driver().Stream() if stream is None else stream
        handle = ctypes.c_void_p(self.stream.handle)
        graph, self._executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", handle, _RELAXED)
        try:
            work(self.stream)
        finally:
            self._call("cuStreamEndCapture", handle, ctypes.byref(graph))
        self._call("cuGraphInstantiateWithFlags", ctypes.byref(self._executable), graph, ctypes.c_ulonglong(0))
        self._call("cuGraphDestroy", graph)

    def launch(self) -> None:
        self._call("cuGraphLaunch", self._executable, ctypes.c_void_p(self.stream.handle))

    def __del__(self) -> None:
        if getattr(self, "_executable", None):
            self._driver.cuGraphExecDestroy(self._executable)

    def _call(self, name: str, *arguments: Any) -> None:
        if error := getattr(self._driver, name)(*arguments):
            raise QpassError(f"CUDA graphs: {name} failed with error {error}")
