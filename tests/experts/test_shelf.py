"""A shelf gives what its library gives, and keeps what was used last within its budget."""

from pathlib import Path

import jaxtyping
import pytest
import torch

from adaptlib.errors import NotFoundError, UsageError
from adaptlib.experts import Expert, Library, LoRADelta
from adaptlib.experts.shelf import Shelf
from tests.tiny import make_expert, same_expert

ONE = 2 * (2 * 5 + 3 * 2) * 4  # bytes of make_expert: two modules of rank 2, d_in 5, d_out 3


@pytest.fixture
def filled(library: Library) -> Library:
    for i in range(5):
        library.add(make_expert(i), f"e{i}")
    return library


def test_it_is_the_library(filled: Library) -> None:
    shelf = Shelf(filled, budget=1 << 20)
    assert list(shelf) == list(filled)
    assert len(shelf) == 5
    assert "e3" in shelf
    assert "e9" not in shelf
    assert shelf.loaded == ()  # asking what is there loads nothing
    for name in shelf:
        assert same_expert(shelf[name], filled[name])
    assert shelf[filled.digest("e2")] is shelf["e2"]
    assert shelf.bytes == 5 * ONE
    with pytest.raises(NotFoundError, match="did you mean e1"):
        shelf["e11"]
    assert shelf.get("nobody") is None


def test_the_least_recently_used_goes_first(filled: Library) -> None:
    shelf = Shelf(filled, budget=3 * ONE)
    digests = {name: filled.digest(name) for name in filled}

    def held() -> list[str]:
        return [next(n for n, d in digests.items() if d == digest) for digest in shelf.loaded]

    first = shelf["e0"]
    for name in ("e1", "e2"):
        shelf[name]
    assert held() == ["e0", "e1", "e2"]
    assert shelf["e0"] is first
    assert held() == ["e1", "e2", "e0"]
    shelf["e3"]
    assert held() == ["e2", "e0", "e3"]
    shelf["e4"]
    assert held() == ["e0", "e3", "e4"]
    assert shelf["e0"] is first
    again = shelf["e1"]
    assert held() == ["e4", "e0", "e1"]
    assert same_expert(again, make_expert(1))


def test_random_use_against_a_list(filled: Library) -> None:
    names, order, used = list(filled), [], torch.randint(5, (200,)).tolist()
    shelf = Shelf(filled, budget=2 * ONE + ONE // 2)
    for i in used:
        shelf[names[i]]
        order = [*(name for name in order if name != names[i]), names[i]][-2:]
        assert shelf.loaded == tuple(filled.digest(name) for name in order)
        assert shelf.bytes <= shelf.budget


def test_a_large_one_makes_room_for_itself(library: Library) -> None:
    for i in range(3):
        library.add(make_expert(i), f"e{i}")
    library.add(Expert("org/base", {"m": LoRADelta(torch.ones(2, 30), torch.ones(20, 2))}), "big")
    shelf = Shelf(library, budget=3 * ONE + 100)
    for name in ("e0", "e1", "e2", "big"):
        shelf[name]
    assert shelf.loaded == (library.digest("big"),)
    assert shelf.bytes == 400


def test_a_replaced_expert_is_never_stale(filled: Library) -> None:
    shelf = Shelf(filled, budget=1 << 20)
    before = shelf["e0"]
    filled.add(make_expert(7), "e0", replace=True)
    after = shelf["e0"]
    assert same_expert(before, make_expert(0))
    assert same_expert(after, make_expert(7))
    filled.remove("e0")
    with pytest.raises(NotFoundError):
        shelf["e0"]


def test_two_names_of_one_expert_are_one(filled: Library) -> None:
    filled.tag("e0", "again")
    shelf = Shelf(filled, budget=ONE)
    assert shelf["again"] is shelf["e0"]
    assert shelf.bytes == ONE


def test_a_budget_too_small_says_how_much_is_wanted(filled: Library) -> None:
    shelf = Shelf(filled, budget=ONE - 1)
    with pytest.raises(UsageError, match=f"e1 takes {ONE} bytes on cpu; .* is {ONE - 1}") as error:
        shelf["e1"]
    assert f"budget={ONE}" in str(error.value.hint)
    assert shelf.loaded == ()
    with pytest.raises(UsageError, match="1 byte or more; got 0"):
        Shelf(filled, budget=0)


def test_what_is_loaded_stays_where_a_next_one_is_too_large(filled: Library) -> None:
    filled.add(Expert("org/base", {"m": LoRADelta(torch.ones(2, 90), torch.ones(20, 2))}), "big")
    shelf = Shelf(filled, budget=2 * ONE)
    shelf["e0"]
    with pytest.raises(UsageError, match="big takes 880 bytes"):
        shelf["big"]
    assert shelf.loaded == (filled.digest("e0"),)


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="wants /proc (Linux)")
def test_on_the_cpu_an_expert_is_its_file_mapped(local: Library) -> None:
    wide = {"m": LoRADelta(torch.randn(16, 5000), torch.randn(3000, 16))}
    blob = local.add(Expert("org/base", wide), "wide").manifest.blob.digest.removeprefix("sha256:")
    delta = Shelf(local, budget=1 << 30)["wide"].deltas["m"]
    assert isinstance(delta, LoRADelta)
    places = [tensor.data_ptr() for tensor in (delta.a, delta.b)]
    spans = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if blob in line:
            begin, _, end = line.split()[0].partition("-")
            spans.append((int(begin, 16), int(end, 16)))
    assert all(any(begin <= place < end for begin, end in spans) for place in places)
    delta.a.zero_()  # the mapping is private: the file stays
    assert local.verify().ok


def test_another_device_gets_a_copy(filled: Library) -> None:
    shelf = Shelf(filled, budget=2 * ONE, device="meta")  # a device that every machine has
    for name in ("e0", "e1", "e2"):
        delta = shelf[name].deltas["layers.0.proj"]
        assert isinstance(delta, LoRADelta)
        assert delta.a.device.type == delta.b.device.type == "meta"
    assert shelf["e2"].card == filled["e2"].card
    assert len(shelf.loaded) == 2
    with pytest.raises(UsageError, match="bytes on meta"):
        Shelf(filled, budget=1, device="meta")["e0"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")
def test_on_a_gpu(filled: Library) -> None:
    filled.add(make_expert(9, kind="sparse"), "sparse")
    shelf = Shelf(filled, budget=1 << 20, device="cuda")
    for name in filled:
        assert all(
            d.apply(torch.ones(5, device="cuda")).is_cuda for d in shelf[name].deltas.values()
        )


def test_looking_up_does_not_read_every_ref(local: Library, monkeypatch) -> None:
    # as for users: the tests' type checks iterate over a library, which is a Mapping
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for i in range(3):
        local.add(make_expert(i), f"e{i}")
    scans = []
    scan = type(local.store)._scan_refs
    monkeypatch.setattr(type(local.store), "_scan_refs", lambda s: scans.append(1) or scan(s))
    shelf = Shelf(local, budget=1 << 20)
    for name in ("e0", "e1", "e2", "e0"):
        shelf[name]
    assert not scans
