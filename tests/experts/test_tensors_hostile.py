"""Safetensors files from strangers: each lie is found, named, and costs nothing."""

import io
import json
import pickle
import time
import tracemalloc
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptlib.errors import AdaptlibError, CorruptError, RefusedError
from adaptlib.experts.tensors import encode, read_tensors
from tests.tiny import entry, safetensors_bytes


def read(data: bytes) -> dict[str, Any]:
    return read_tensors("file.safetensors", memoryview(bytearray(data)))


VALID = safetensors.torch.save(
    {"m.lora_a": torch.arange(10.0).reshape(2, 5), "m.lora_b": torch.ones(3, 2)}
)


def test_every_truncation_is_corrupt_and_names_the_file() -> None:
    for cut in range(len(VALID)):
        with pytest.raises(CorruptError, match=r"file\.safetensors"):
            read(VALID[:cut])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.sampled_from("ridx"), st.integers(0, len(VALID) - 1), st.binary(max_size=4)),
        min_size=1,
        max_size=4,
    )
)
def test_a_mutated_file_is_our_error_or_a_file_that_can_be_written_again(changes: Any) -> None:
    data = bytearray(VALID)
    for how, place, piece in changes:
        place = min(place, len(data))
        if how == "r":  # replace
            data[place : place + len(piece)] = piece
        elif how == "i":  # insert
            data[place:place] = piece
        elif how == "d":  # delete
            del data[place : place + len(piece)]
        else:  # copy what is there to somewhere else
            data[place:place] = data[place : place + 40]
    try:
        tensors = read(bytes(data))
    except AdaptlibError as error:
        assert "file.safetensors" in str(error)  # noqa: PT017
        return
    again = b"".join(encode(tensors))
    assert {n: (t.dtype, t.shape, bytes(t.data)) for n, t in read(again).items()} == {
        n: (t.dtype, t.shape, bytes(t.data)) for n, t in tensors.items()
    }


def torch_save() -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.ones(2)}, file)
    return file.getvalue()


LIE = "is larger than can be|cannot be|takes"


HOSTILE: dict[str, tuple[bytes, type[AdaptlibError], str]] = {
    "nothing": (b"", CorruptError, "0 bytes"),
    "seven bytes": (b"\x01" * 7, CorruptError, "7 bytes"),
    "header longer than the file": ((100).to_bytes(8, "little") + b"{}", CorruptError, "truncated"),
    "huge header length": (b"\xff" * 8 + b"{}", CorruptError, "header"),
    "header over the limit": (
        (17 << 20).to_bytes(8, "little") + b" " * (17 << 20),
        RefusedError,
        "at most",
    ),
    "no JSON": (safetensors_bytes(b"{nope"), CorruptError, "not JSON"),
    "not UTF-8": (safetensors_bytes(b'{"\xff":1}'), CorruptError, "not JSON"),
    "UTF-16": (safetensors_bytes('{"a":{}}'.encode("utf-16")), CorruptError, "no { at its"),
    "no object": (safetensors_bytes([]), CorruptError, "not a JSON object"),
    "nested bomb": (safetensors_bytes(b"[" * 200_000), CorruptError, "no { at its"),
    "nested objects": (safetensors_bytes(b'{"a":' * 50_000), CorruptError, "not JSON"),
    "NaN literal": (safetensors_bytes(b'{"a":NaN}'), CorruptError, "NaN"),
    "Infinity literal": (safetensors_bytes(b'{"a":-Infinity}'), CorruptError, "Infinity"),
    "too many digits": (
        safetensors_bytes(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}"),
        CorruptError,
        "not JSON",
    ),
    "name twice": (
        safetensors_bytes(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
            bytes(8),
        ),
        RefusedError,
        "'a' twice",
    ),
    "key twice": (
        safetensors_bytes(b'{"a":{"dtype":"F32","dtype":"F16","data_offsets":[0,4]}}', bytes(4)),
        RefusedError,
        "'dtype' twice",
    ),
    "overlap": (
        safetensors_bytes({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
        CorruptError,
        "begins at 4, expected 8",
    ),
    "same bytes twice": (
        safetensors_bytes({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)),
        CorruptError,
        "begins at 0",
    ),
    "hole": (
        safetensors_bytes({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)),
        CorruptError,
        "begins at 8, expected 4",
    ),
    "hole at the start": (safetensors_bytes({"a": entry(4, 8)}, bytes(8)), CorruptError, "at 4"),
    "trailing bytes": (safetensors_bytes({"a": entry(0, 4)}, bytes(5)), CorruptError, "5 bytes"),
    "data missing": (safetensors_bytes({"a": entry(0, 8)}, bytes(4)), CorruptError, "4 bytes"),
    "offsets backwards": (safetensors_bytes({"a": entry(8, 4, [1])}, bytes(8)), CorruptError, LIE),
    "wrong size": (safetensors_bytes({"a": entry(0, 8, [3])}, bytes(8)), CorruptError, "12 bytes"),
    "negative shape": (
        safetensors_bytes({"a": entry(0, 4, [-1, -1])}, bytes(4)),
        CorruptError,
        "cannot be",
    ),
    "huge shape": (safetensors_bytes({"a": entry(0, 4, [2**62])}, bytes(4)), CorruptError, LIE),
    "shape of many digits": (
        safetensors_bytes({"a": entry(0, 4, [10**4000] * 8)}, bytes(4)),
        CorruptError,
        "cannot be",
    ),
    "empty but huge": (safetensors_bytes({"a": entry(0, 0, [0, 2**62, 2**62])}), CorruptError, LIE),
    "true as a side": (
        safetensors_bytes({"a": entry(0, 4, [True])}, bytes(4)),
        CorruptError,
        "cannot be",
    ),
    "a side of 1.0": (
        safetensors_bytes({"a": entry(0, 4, [1.0])}, bytes(4)),  # type: ignore[list-item]
        CorruptError,
        "cannot be",
    ),
    "shape is text": (
        safetensors_bytes({"a": {"dtype": "F32", "shape": "", "data_offsets": [0, 4]}}, bytes(4)),
        CorruptError,
        "cannot be",
    ),
    "no shape": (safetensors_bytes({"a": {"dtype": "F32"}}), CorruptError, "lacks"),
    "entry is a list": (safetensors_bytes({"a": [1]}), CorruptError, "lacks"),
    "three offsets": (
        safetensors_bytes(
            {"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4, 4]}}, bytes(4)
        ),
        CorruptError,
        "lacks",
    ),
    "unknown dtype": (
        safetensors_bytes({"a": entry(0, 1, [1], "F8_E4M3")}, bytes(1)),
        RefusedError,
        "F8_E4M3",
    ),
    "dtype is a list": (
        safetensors_bytes({"a": {"dtype": [], "shape": [], "data_offsets": [0, 4]}}, bytes(4)),
        RefusedError,
        "dtype",
    ),
    "nine axes": (
        safetensors_bytes({"a": entry(0, 4, [1] * 9)}, bytes(4)),
        CorruptError,
        "cannot be",
    ),
    "name of 513": (safetensors_bytes({"a" * 513: entry(0, 4)}, bytes(4)), RefusedError, "513"),
    "no name": (safetensors_bytes({"": entry(0, 4)}, bytes(4)), RefusedError, "empty"),
    "name with a newline": (
        safetensors_bytes({"a\nb": entry(0, 4)}, bytes(4)),
        RefusedError,
        "printable",
    ),
    "name that is half a pair": (
        safetensors_bytes(
            b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)
        ),
        RefusedError,
        "printable",
    ),
    "torch.save": (torch_save(), RefusedError, "pickle"),
    "pickle 2": (pickle.dumps({"a": list(range(99))}, 2), RefusedError, "pickle"),
    "pickle 4": (pickle.dumps({"a": list(range(99))}, 4), RefusedError, "pickle"),
    "pickle 5": (pickle.dumps({"a": list(range(99))}, 5), RefusedError, "pickle"),
}


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case.replace(" ", "-"))
def test_hostile_files_are_refused_by_name(case: str) -> None:
    data, error, words = HOSTILE[case]
    with pytest.raises(error, match=words) as caught:
        read(data)
    assert "file.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "header",
    [
        json.dumps({str(i): entry(0, 0, [0]) for i in range(65_537)}).encode(),
        b"{" + b",".join(b'"%d":{"data\\u005foffsets":[0,0]}' % i for i in range(450_000)) + b"}",
        b"{" + b",".join(b'"%d":0' % i for i in range(1_400_000)) + b"}",
        b'{"a":[' + b",".join([b"[]"] * 5_000_000) + b"]}",
    ],
    ids=["honest", "escaped", "flat", "lists"],
)
def test_a_million_tensors_cost_no_time_and_no_memory(header: bytes) -> None:
    data = safetensors_bytes(header)
    tracemalloc.start()
    try:
        begin = time.perf_counter()
        with pytest.raises(RefusedError, match="65,536 tensors"):
            read(data)
        took, (_, peak) = time.perf_counter() - begin, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert took < 1
    assert peak < 5 * len(data)


def test_the_limit_itself_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptlib.experts.tensors.MAX_TENSORS", 64)
    assert len(read(safetensors_bytes({str(i): entry(0, 0, [0]) for i in range(64)}))) == 64
    with pytest.raises(RefusedError, match="64 tensors"):
        read(safetensors_bytes({str(i): entry(0, 0, [0]) for i in range(65)}))
