"""What a library does not take: it says why, and nothing in it changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptlib.errors import (
    AdaptlibError,
    BaseMismatchError,
    ConflictError,
    CorruptError,
    NotFoundError,
    RefusedError,
    UsageError,
)
from adaptlib.experts import Expert, Library, LoRADelta
from adaptlib.experts.records import save_record
from adaptlib.experts.sources import slug
from library_store import Ref
from tests.tiny import lora, make_expert, state

GONE = "sha256:" + "0" * 64


BAD_NAMES = [
    "", "../x", "/etc/x", "a/../b", "a//b", "a/", "Upper", "a b", "é", "a:", "a:b:c", ".hidden",
    "sha256", "con", "x.lock", "a\x00b", "x" * 65, "/".join("abcdefghi"), "clusterings/x",
    "routers",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_with_tricks_is_refused_and_nothing_changes(library: Library, name: str) -> None:
    library.add(make_expert(), "one")
    before = state(library)
    calls: list[Callable[[], Any]] = [
        lambda: library.add(make_expert(1), name),
        lambda: library.rename("one", name),
        lambda: library.tag("one", name),
        lambda: save_record(library.store, "clusterings", name, {}),
    ]
    for call in calls[: 3 if name in ("clusterings/x", "routers", "sha256") else 4]:
        with pytest.raises(UsageError):
            call()
    assert state(library) == before


NAN = torch.tensor([[float("nan")] * 5] * 2)


REFUSED: dict[str, tuple[Callable[[], Expert], type[AdaptlibError]]] = {
    "nan": (lambda: Expert("b", {"m": LoRADelta(NAN, torch.ones(3, 2))}), RefusedError),
    "nan scale": (
        lambda: Expert("b", {"m": LoRADelta(lora(0).a, lora(0).b, float("nan"))}),
        RefusedError,
    ),
    "nan in the card": (lambda: make_expert(metric=float("nan")), RefusedError),
    "a tensor in the card": (lambda: make_expert(metric=torch.ones(1)), RefusedError),
    "task is no text": (lambda: make_expert(task=["a"]), CorruptError),
    "another base in the card": (lambda: make_expert(base="a/b", x=1), CorruptError),
    "unprintable module": (lambda: Expert("b", {"a\nb": lora(0)}), RefusedError),
    "long module": (lambda: Expert("b", {"m" * 600: lora(0)}), RefusedError),
    "no base": (lambda: Expert("", {"m": lora(0)}), CorruptError),
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.replace(" ", "-"))
def test_what_could_not_be_read_again_is_not_kept(library: Library, case: str) -> None:
    library.add(make_expert(7), "there")
    before = state(library)
    make, error = REFUSED[case]
    expert = make()
    if case == "another base in the card":
        expert = Expert("org/one", expert.deltas, {"base": {"id": "org/two"}})
    with pytest.raises(error):
        library.add(expert, "new")
    assert state(library) == before


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda p: p / "absent", NotFoundError),
        (lambda p: p, NotFoundError),
        (lambda p: "~nobody-here/x", NotFoundError),
        (lambda p: p / "a.safetensors", UsageError),
        (lambda p: p / "a.bin", RefusedError),
        (lambda p: p / "a.PT", RefusedError),
    ],
)
def test_add_says_what_is_wrong_with_a_source(
    library: Library, tmp_path: Path, make: Callable[[Path], Any], error: type[AdaptlibError]
) -> None:
    for name in ("a.safetensors", "a.bin", "a.PT"):
        (tmp_path / name).write_bytes(b"x")
    before = state(library)
    with pytest.raises(error):
        library.add(make(tmp_path))
    assert state(library) == before


@pytest.mark.parametrize(
    "text",
    ["My Expert", "...", "", "con", "a..b", "x.lock", "sha256", "é", "A" * 300, "-x-", "nul.txt"],
)
def test_slug_gives_a_name(text: str) -> None:
    assert Ref(slug(text)).name == slug(text)


def llama_expert(model: str, *, rank: int = 2, d_in: int = 16, last: str = "q_proj") -> Expert:
    modules = ["model.layers.0.self_attn.q_proj", f"model.layers.1.self_attn.{last}"]
    return Expert(
        model, {m: lora(i, rank=rank, d_out=16, d_in=d_in) for i, m in enumerate(modules)}
    )


def test_add_pins_the_base_that_is_at_hand(
    library: Library, tmp_path: Path, save_llama: Any
) -> None:
    from adaptlib.experts import BaseModel

    model = save_llama(tmp_path / "model")
    added = library.add(llama_expert(str(tmp_path / "model")), "fits")
    assert added.notes == ()
    pin = library["fits"].card["base"]
    assert pin == {
        "id": str(tmp_path / "model"),
        "revision": None,
        "digest": BaseModel.of(model).digest,
    }
    absent = library.add(llama_expert("org/absent"), "unchecked")
    assert "not on this machine" in absent.notes[0]
    assert library["unchecked"].card["base"]["digest"] is None
    told = library.add(llama_expert("org/absent"), "told", base=str(tmp_path / "model"))
    assert "says it is for org/absent; pinned to" in told.notes[0]
    assert library["told"].base == str(tmp_path / "model")


def test_an_expert_that_changes_nothing_is_said_to(library: Library) -> None:
    a, b, zero = torch.ones(2, 5), torch.ones(3, 2), torch.zeros(3, 2)
    says = "every update in it is zero"
    for name, delta in {"b": LoRADelta(a, zero), "scale": LoRADelta(a, b, 0.0)}.items():
        assert says in library.add(Expert("org/base", {"m": delta}), name).notes[-1]
    some = Expert("org/base", {"m": LoRADelta(a, zero), "n": LoRADelta(a, b)})
    assert not any(says in note for note in library.add(some, "some").notes)


def test_an_expert_is_pinned_when_it_is_added_again_with_its_base(
    library: Library, tmp_path: Path, save_llama: Any
) -> None:
    expert = llama_expert(str(tmp_path / "later"))
    early = library.add(expert, "one")
    save_llama(tmp_path / "later")
    again = library.add(expert, "one")
    assert again.digest != early.digest
    assert "now pinned" in again.notes[-1]
    assert library.add(expert, "one").new is False
    with pytest.raises(ConflictError):
        library.add(expert, "one", task="another card")


@pytest.mark.parametrize(
    ("expert", "words"),
    [
        (lambda m: Expert(m, {"x.y": lora(0)}), "matches no module"),
        (lambda m: llama_expert(m, last="qkv"), "matches only 1 of its 2 modules"),
        (lambda m: llama_expert(m, d_in=17), r"has shape \(16, 16\) there, the expert has"),
        (
            lambda m: Expert(m, llama_expert(m).deltas, {"base": {"digest": GONE}}),
            "pinned to another base model",
        ),
    ],
    ids=["none", "some", "shape", "pin"],
)
def test_add_refuses_what_does_not_fit_its_base(
    library: Library, tmp_path: Path, save_llama: Any, expert: Any, words: str
) -> None:
    save_llama(tmp_path / "model")
    before = state(library)
    with pytest.raises(BaseMismatchError, match=words):
        library.add(expert(str(tmp_path / "model")), "new")
    assert state(library) == before


def test_open_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError, match=f"no library at {tmp_path}/x \\(--library\\)"):
        Library.open(tmp_path / "x")
    monkeypatch.setenv("ADAPTLIB_LIBRARY", str(tmp_path / "y"))
    with pytest.raises(NotFoundError, match="ADAPTLIB_LIBRARY"):
        Library.open()
    Library.open(tmp_path / "x", create=True).add(make_expert(), "one")
    assert list(Library.open(tmp_path / "x", create=True)) == ["one"]
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    for taken in ("file", "file/below", "full"):
        with pytest.raises(ConflictError):
            Library.open(tmp_path / taken, create=True)
    assert (tmp_path / "full" / "mine.txt").read_text() == "x"
