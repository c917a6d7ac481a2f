"""Safetensors: what we write is what safetensors writes, and what we read we have checked."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptlib.errors import CorruptError, NotFoundError, RefusedError
from adaptlib.experts.codec import to_raw, to_tensor
from adaptlib.experts.tensors import encode, map_file, parse_json, read_tensors, release
from tests.tiny import entry, safetensors_bytes, same_tensor

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}


def read(data: bytes) -> dict[str, Any]:
    return read_tensors("file.safetensors", memoryview(bytearray(data)))


def written(tensors: dict[str, torch.Tensor]) -> bytes:
    raw = read(safetensors.torch.save(tensors))
    return b"".join(encode(raw))


def draw_tensor(seed: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-100, 100, shape, generator=generator)
    return (values > 0) if dtype is torch.bool else values.to(dtype)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"w": torch.arange(6.0).reshape(2, 3)},
        {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 4), "one": torch.ones(1, 1, 1)},
        {"ключ.重み": torch.ones(2), 'quote"back\\slash/': torch.zeros(3), "é́": torch.ones(1)},
        {"b": torch.ones(3, dtype=torch.bfloat16), "a": torch.ones(5, dtype=torch.bfloat16)},
        {name: draw_tensor(0, dtype, (3, 5)) for name, dtype in DTYPES.items()},
    ],
    ids=["none", "one", "small", "unicode", "order", "dtypes"],
)
def test_the_bytes_are_those_that_safetensors_writes(tensors: dict[str, torch.Tensor]) -> None:
    assert written(tensors) == safetensors.torch.save(tensors)


def test_what_is_written_has_no_bytes_of_its_own() -> None:
    data = b"".join(encode(read(safetensors.torch.save({"a": torch.tensor([1.0])}))))
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    padded = header + b" " * (-len(header) % 8)
    assert data == len(padded).to_bytes(8, "little") + padded + b"\x00\x00\x80\x3f"


def test_order_and_metadata_do_not_change_the_bytes() -> None:
    a, b = torch.arange(3.0), torch.arange(4.0)
    plain = written({"a": a, "b": b})
    backwards = safetensors_bytes(
        {"b": entry(0, 16), "__metadata__": {"format": "pt", "x": "y"}, "a": entry(16, 28)},
        b.numpy().tobytes() + a.numpy().tobytes(),
    )
    with_metadata = safetensors.torch.save({"b": b, "a": a}, metadata={"format": "pt", "k": "v"})
    assert b"".join(encode(read(backwards))) == plain
    assert b"".join(encode(read(with_metadata))) == plain


shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
names = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=20).filter(
    lambda name: name.isprintable() and name != "__metadata__"
)
specs = st.dictionaries(
    names, st.tuples(st.sampled_from(list(DTYPES.values())), shapes, st.integers(0, 99)), max_size=5
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(specs)
def test_any_tensors_come_back_and_give_the_bytes_of_safetensors(spec: dict[str, Any]) -> None:
    tensors = {n: draw_tensor(seed, dtype, shape) for n, (dtype, shape, seed) in spec.items()}
    ours = b"".join(encode(read(safetensors.torch.save(tensors))))
    assert ours == safetensors.torch.save(tensors)
    for name, raw in read(ours).items():
        if raw.dtype in ("BOOL", "U8", "I8", "I16"):
            assert raw.shape == tuple(tensors[name].shape)
        else:
            assert same_tensor(to_tensor(raw), tensors[name])


@pytest.mark.parametrize("name", ["", "a\x1b[31m", "a" * 513])
def test_what_could_not_be_read_again_is_not_written(name: str) -> None:
    with pytest.raises(RefusedError, match="tensor name"):
        list(encode({name: to_raw(torch.ones(1))}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_finite_sees_one_bad_number_in_many(dtype: torch.dtype, bad: float) -> None:
    good = torch.full((1_100_000,), torch.finfo(dtype).max, dtype=dtype)
    good[::2] = -good[::2]
    assert to_raw(good).finite()
    good[1_050_000] = bad
    assert not to_raw(good).finite()


def test_a_file_is_mapped_and_private(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    view = map_file(path)
    view[0] = ord("x")
    assert path.read_bytes() == b"abc"
    (tmp_path / "none").write_bytes(b"")
    assert len(map_file(tmp_path / "none")) == 0


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RefusedError, match="pipe is not a regular file"):
        map_file(tmp_path / "pipe")
    with pytest.raises(RefusedError, match="not a regular file"):
        map_file(tmp_path)
    with pytest.raises(NotFoundError, match="gone is not there"):
        map_file(tmp_path / "gone")


def test_json_is_strict() -> None:
    assert parse_json("f", b'{"a": [1, 2.5, null, "\xc3\xa9"]}') == {"a": [1, 2.5, None, "é"]}
    with pytest.raises(RefusedError, match="f has the key 'a' twice"):
        parse_json("f", b'{"b": {"a": 1, "a": 1}}')
    for text in ("NaN", "[Infinity]", "{", "", "\ufeff{}", "[" * 100_000):
        with pytest.raises(CorruptError, match=r"^f "):
            parse_json("f", text.encode())


def test_what_is_released_is_read_again_and_takes_no_memory(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(40 * 1024 * 1024)
    (tmp_path / "file").write_bytes(content)
    view = map_file(tmp_path / "file", writable=False)
    part = view[12_345:-6_789]

    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))

    before = resident()
    digest = hashlib.sha256(part).digest()
    filled = resident()
    release(part)
    assert filled - before > 30_000 > resident() - before
    assert (
        hashlib.sha256(part).digest() == digest == hashlib.sha256(content[12_345:-6_789]).digest()
    )


def test_what_can_be_written_to_is_never_released(tmp_path: Path) -> None:
    """It would lose what was written."""
    (tmp_path / "file").write_bytes(bytes(10_000))
    view = map_file(tmp_path / "file")
    view[5000] = 7
    release(view)
    assert view[5000] == 7
    for other in (memoryview(bytes(10)), memoryview(bytearray(10)), memoryview(b"")):
        release(other)
