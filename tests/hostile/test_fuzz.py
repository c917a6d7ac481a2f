"""The fuzzer: nothing is found, and something would be."""

import pytest

from adaptlib.experts import tensors
from tests.hostile import fuzz_header
from tests.soak import FACTOR, report

INPUTS = 20_000 * FACTOR


def test_no_input_raises_a_strange_error_or_is_read_otherwise_by_safetensors() -> None:
    result = fuzz_header.run(INPUTS, seed=FACTOR)
    assert result.findings == []
    assert sum(result.outcomes.values()) == INPUTS
    for target in fuzz_header.TARGETS:  # both ways are taken, or it would show nothing
        assert result.outcomes[f"{target}: accepted"] > INPUTS // 200
        assert result.outcomes[f"{target}: CorruptError"] > INPUTS // 200
    report("hostile.fuzz", inputs=INPUTS, seconds=round(result.seconds, 1))


def test_one_seed_is_one_run() -> None:
    first, second = (fuzz_header.run(500, seed=7) for _ in range(2))
    assert first.outcomes == second.outcomes
    assert first.outcomes != fuzz_header.run(500, seed=8).outcomes


def confused(*_: object) -> str:
    raise KeyError("a bug")


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("_check_metadata", lambda *_: None),
        ("_integer", int),
        ("brief", confused),
    ],
)
def test_a_weaker_reader_is_found_out(
    name: str, broken: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, name, broken)
    assert fuzz_header.run(20_000, seed=0, most=1).findings
