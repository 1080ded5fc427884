"""The runner needs no more than a board has, and answers frame by frame."""

from __future__ import annotations

import ast
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from slimkit_remote import board

SOURCE = Path(board.__file__).read_text()


def test_it_is_valid_in_python_3_8() -> None:
    assert ast.parse(SOURCE, feature_version=(3, 8)).body


def test_it_imports_nothing_but_the_standard_library() -> None:
    script = f"import sys\nexec({SOURCE!r}, {{'__name__': 'board'}})\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert not {"torch", "slimkit", "numpy", "onnxruntime"} & set(done.stdout.split())


def test_arrays_keep_order_shape_and_kind() -> None:
    arrays = [np.arange(n, dtype=kind).reshape(1, -1) for n, kind in enumerate(("f4", "i8", "?"))]
    arrays += [np.float32(n) for n in range(12)]
    data = board.packed(arrays)
    found = board.unpacked(board.Body(io.BytesIO(data + b"next"), len(data)))
    assert len(found) == len(arrays)
    for a, b in zip(found, arrays, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def frame(head: dict[str, object], body: bytes = b"") -> bytes:
    text = json.dumps(head).encode()
    return board.HEAD.pack(len(text), len(body)) + text + body


def answers(*frames: bytes) -> list[dict[str, object]]:
    sink, found = io.BytesIO(), []
    board.serve(io.BytesIO(b"".join(frames)), sink)
    sink.seek(0)
    while front := sink.read(board.HEAD.size):
        length, size = board.HEAD.unpack(front)
        found.append(json.loads(sink.read(length)))
        sink.read(size)
    return found


def test_it_says_first_that_it_listens() -> None:
    done = subprocess.run([sys.executable, "-c", SOURCE], input=b"", capture_output=True)
    assert (done.stdout, done.stderr) == (board.READY, b"")


def test_files_are_written_and_removed_at_the_end(tmp_path: Path) -> None:
    request = {"do": "send", "folder": str(tmp_path), "files": {"a": 3, "b/c": 2}}
    assert answers(frame(request, b"12345"), frame({"do": "hello"}))[0] == {}
    assert list(tmp_path.iterdir()) == []


def test_a_failed_request_leaves_the_next_one_whole(tmp_path: Path) -> None:
    request = {"do": "send", "folder": str(tmp_path / "none"), "files": {"a": 3}}
    first, second = answers(frame(request, b"123"), frame({"do": "hello"}))
    assert first["error"] == "files"
    assert second["threads"] >= 1


def test_a_stream_that_ends_inside_a_file_is_no_answer(tmp_path: Path) -> None:
    request = {"do": "send", "folder": str(tmp_path), "files": {"a": 10}}
    assert answers(frame(request, b"0123456789")[:-4]) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("warm_up", "conv"), [(0, 0.003), (1, 0.002)])
def test_operator_times_are_medians_over_runs(warm_up: int, conv: float) -> None:
    events = [
        {"name": "session_initialization", "ts": 0, "dur": 9},
        *({"name": "model_run", "ts": ts, "dur": 9} for ts in (10, 20, 30)),
    ]
    # two convolutions a run: 30, then 1 + 2, then 0 + 1 microseconds
    for ts, dur in ((11, 15), (12, 15), (21, 1), (22, 2), (31, 0), (32, 1)):
        args = {"op_name": "Conv"}
        events.append({"name": "c_kernel_time", "ts": ts, "dur": dur, "args": args})
    found = board.kernels(events, warm_up)
    assert found["operators"] == {"Conv": 2}
    assert found["ms"]["Conv"] == pytest.approx(conv)
