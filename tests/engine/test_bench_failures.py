"""`qpass bench` where engines cannot be built, loaded or run: who is blamed, and what is measured all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qpass import pipeline
from qpass.engine import builder
from qpass.engine.bench import Building, Method, Report, bench
from qpass.errors import QpassError
from tests.engine.fake_gpu import L2, FakeGpu, quick, write_engine


def test_memory_that_does_not_suffice(fake: FakeGpu, tmp_path: Path) -> None:
    files = [write_engine(tmp_path / f"{n}.engine", [1.0], memory=m << 30) for n, m in (("a", 5), ("b", 5), ("c", 1))]
    report = bench(files, method=quick(runs=1))
    assert [t is not None for t in report.points[0].timings] == [True, False, True]
    why = report.engines[1].error or ""
    assert "b.engine cannot be loaded" in why
    assert "out of memory" in why
    assert why.endswith("bench fewer presets or smaller shapes at a time")
    assert report.points[0].errors == (None, why, None)
    assert report.remarks() == [f"b failed: {why}"]
    fake.free = L2
    with pytest.raises(QpassError, match=r"the GPU is out of memory: 2097152 bytes .*use smaller shapes"):
        bench(write_engine(tmp_path / "c.engine", [1.0], memory=0), method=quick(runs=1))


def test_an_engine_that_fails_alone(fake: FakeGpu, tmp_path: Path) -> None:
    with pytest.raises(
        QpassError, match=r"no engine could be measured: a failed at x 2x4: .*TensorRT does not say why"
    ):
        bench(write_engine(tmp_path / "a.engine", [1.0], fails=True), method=quick(runs=1))


@pytest.mark.parametrize("after", [0, 2, 12])
def test_an_engine_that_fails_among_others(fake: FakeGpu, tmp_path: Path, after: int) -> None:
    """In its warm-up, or in its turns, after which the others take theirs anew."""
    files = [write_engine(tmp_path / f"{n}.engine", [us]) for n, us in (("a", 9.0), ("b", 5.0), ("c", 3.0))]
    write_engine(files[1], [5.0], fails=True, after=after)
    method = Method(8, cuda_graph=False, warm_up_seconds=0.0, warm_up_runs=1)
    report = bench(files, method=method, shapes=[{"x": (1, 4)}, {"x": (2, 4)}])
    assert report.failed
    assert report.complete
    done = [[[round(us) for us in t.runs] if t is not None else None for t in p.timings] for p in report.points]
    assert done[-1] == [[9] * 8, None, [3] * 8]
    assert str(report.points[-1].times_baseline(2)) == "3.00x"
    assert (report.points[-1].times_baseline(1), report.points[-1].items_per_second(1)) == (None, None)
    assert "b failed at x 2x4: b.engine failed: TensorRT does not say why" in report.remarks()
    assert (done[0][1] is None) == (after < 9)


def test_a_baseline_that_fails(fake: FakeGpu, tmp_path: Path) -> None:
    files = [write_engine(tmp_path / "a.engine", [9.0], fails=True), write_engine(tmp_path / "b.engine", [5.0])]
    report = bench(files, method=quick(runs=1))
    assert report.points[0].times_baseline(1) is None
    assert report.points[0].items_per_second(1) is not None
    assert report.remarks()[-1] == "there is nothing to compare with, since a failed"


def test_a_kernel_that_fails_for_good(fake: FakeGpu, tmp_path: Path) -> None:
    """It is said which engine's it was, and nothing of it is put down to the others."""
    files = [write_engine(tmp_path / f"{n}.engine", [5.0]) for n in "abc"]
    write_engine(files[1], [5.0], breaks="an illegal access", after=4)
    seen: list[Report] = []
    shapes = [{"x": (rows, 4)} for rows in (1, 2, 4)]
    report = bench(files, method=quick(runs=4, cuda_graph=False), shapes=shapes, save=seen.append)
    assert [p.errors for p in report.points] == [
        (None, None, None),
        (
            "not measured: CUDA had failed",
            "CUDA: an illegal access; compute-sanitizer, put before the command, names the kernel",
            "not measured: CUDA had failed",
        ),
    ]
    assert report.points[1].timings == (None, None, None)
    assert not report.complete
    assert report.remarks()[0] == (
        "CUDA works no more in this process since b ran at x:2x4, and nothing was measured after that; "
        "bench the others without it"
    )
    assert [len(r.points) for r in seen] == [1, 2, 2]


def test_a_preset_that_cannot_be_built(
    block: Path, built: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    build, rewrite = builder.build_files, pipeline.rewrite

    def building(path: Path, output: Path, **keywords: Any) -> Any:
        if "w8a8" in output.name:
            raise QpassError("TensorRT built no engine")
        return build(path, output, **keywords)

    def rewriting(path: Path, output: Path, **keywords: Any) -> Any:
        if "w4a16" in output.name:
            raise QpassError("the model has no Linear")
        return rewrite(path, output, **keywords)

    monkeypatch.setattr(builder, "build_files", building)
    monkeypatch.setattr(pipeline, "rewrite", rewriting)
    report = bench(block, Building(["w4a16-g128", "w8a8", "w8a16"], backend="tensorrt"), quick(runs=1))
    assert [s.error for s in report.engines] == [
        None,
        "it could not be rewritten: the model has no Linear",
        "it could not be built: TensorRT built no engine",
        None,
    ]
    assert [t is not None for t in report.points[0].timings] == [True, False, False, True]
    assert "w8a8 failed: it could not be built: TensorRT built no engine" in report.remarks()


def test_plugins_are_loaded_once(fake: FakeGpu, tmp_path: Path) -> None:
    """TensorRT refuses a library the second time, so engines of one process share it; two libraries cannot be."""
    library, other = tmp_path / "plugins.so", tmp_path / "other.so"
    files = [write_engine(tmp_path / f"{n}.engine", [1.0], library=library) for n in "ab"]
    assert len(bench(files, method=quick(runs=1)).engines) == 2
    other.write_text("others")
    with pytest.raises(QpassError, match=r"does not take those of .*other\.so too; name one library"):
        bench(write_engine(tmp_path / "c.engine", [1.0], library=other))
