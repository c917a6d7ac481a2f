"""The library: a mapping that keeps what it was given, or says why not and changes nothing."""

import shutil
import sqlite3
from collections.abc import Callable, Mapping
from datetime import timedelta
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
from adaptlib.experts.codec import pack, write_directory
from adaptlib.experts.sources import slug
from library_store import AmbiguousDigest, Digest, Ref
from tests.tiny import lora, make_expert, same_expert, state

GONE = "sha256:" + "0" * 64


def test_it_is_a_mapping(library: Library) -> None:
    experts = {f"e{i}": make_expert(i, kind=("lora", "sparse")[i % 2]) for i in range(4)}
    for name, expert in experts.items():
        library.add(expert, name)
    assert isinstance(library, Mapping)
    assert list(library) == sorted(experts)
    assert len(library) == 4
    assert set(library.keys()) == set(experts)
    assert all(same_expert(library[name], expert) for name, expert in experts.items())
    assert all(same_expert(value, experts[name]) for name, value in library.items())
    assert "e0" in library
    assert "other" not in library
    assert 5 not in library
    assert library.get("other") is None
    with pytest.raises(KeyError, match=r"^no expert named 'other'"):
        library["other"]


def test_adding_twice_changes_nothing(library: Library) -> None:
    first = library.add(make_expert(), "one")
    before = state(library)
    second = library.add(make_expert(), "one")
    assert (first.new, second.new) == (True, False)
    assert first.digest == second.digest == library.digest("one")
    assert state(library) == before


def test_the_digest_is_of_the_content_and_not_of_the_name(library: Library) -> None:
    one = library.add(make_expert(), "one")
    assert library.add(make_expert(), "team/other:v2").digest == one.digest
    assert library.add(make_expert(task="t"), "card").digest != one.digest
    assert library.add(make_expert(1), "weights").digest != one.digest
    assert len(list(library.store.objects())) == 2 + 1 + 2  # one blob serves two cards


def test_names_tags_and_digests_find_the_same(library: Library) -> None:
    digest = library.add(make_expert(), "team/sql:v1").digest
    bare = digest.removeprefix("sha256:")
    for name in ("team/sql", "team/sql:v1", digest, bare, bare[:7], digest[:15]):
        assert library.digest(name) == digest
        assert name in library
    assert list(library) == ["team/sql:v1"]
    latest = library.add(make_expert(1), "team/sql").digest
    assert list(library) == ["team/sql"]
    assert library.digest("team/sql") == latest
    assert library.tags() == {"team/sql": latest, "team/sql:v1": digest}
    for absent in (bare[:6], "team", "team/sql:v9", "sha256:", GONE, "UPPER", "", "../x"):
        assert absent not in library
        with pytest.raises(NotFoundError):
            library.digest(absent)


def test_a_digest_of_what_is_no_expert_finds_nothing(library: Library) -> None:
    added = library.add(make_expert(), "one")
    library.save_record("clusterings", "c", {"experts": {"one": added.digest}})
    others = {str(d) for d in library.store.objects()} - {added.digest}
    assert len(others) == 2
    for digest in others:
        assert digest not in library
        with pytest.raises(NotFoundError):
            library.digest(digest)


def test_an_ambiguous_prefix_is_a_usage_error(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = "0" * 7
    found = tuple(Digest(prefix + str(i) * 57) for i in range(2))

    def resolve(_: str) -> Digest:  # two objects that share seven digits cannot be made here
        raise AmbiguousDigest("two start so", candidates=found)

    monkeypatch.setattr(library.store, "resolve", resolve)
    with pytest.raises(UsageError, match="two start so"):
        library.digest(prefix)


def test_did_you_mean(library: Library) -> None:
    with pytest.raises(NotFoundError) as caught:
        library["poem"]
    assert "empty" in str(caught.value.hint)
    library.add(make_expert(), "poems")
    library.add(make_expert(1), "sums")
    with pytest.raises(NotFoundError, match=r"no expert named 'poem'; did you mean poems\?"):
        library["poem"]


def test_a_taken_name_is_a_conflict_and_nothing_changes(library: Library) -> None:
    library.add(make_expert(), "one")
    before = state(library)
    with pytest.raises(ConflictError, match="the name one is taken") as caught:
        library.add(make_expert(1), "one")
    assert "--replace" in str(caught.value.hint)
    assert state(library) == before
    replaced = library.add(make_expert(1), "one", replace=True)
    assert replaced.new
    assert same_expert(library["one"], make_expert(1))
    assert [entry.reason for entry in library.log("one")] == ["add", "add"]


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
        lambda: library.save_record("clusterings", name, {}),
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


def test_rename_moves_all_tags_and_keeps_the_digest(library: Library) -> None:
    a = library.add(make_expert(0), "sql").digest
    b = library.add(make_expert(1), "sql:v1").digest
    library.add(make_expert(2), "poems:v7")
    assert library.rename("sql", "text-to-sql") == a
    assert library.tags() == {
        "poems:v7": library.digest("poems"),
        "text-to-sql": a,
        "text-to-sql:v1": b,
    }
    assert library.rename("text-to-sql:v1", "old") == b
    assert library.digest("old") == b
    assert "text-to-sql:v1" not in library
    assert "mv to text-to-sql" in library.log("sql")[-1].reason
    before = state(library)
    with pytest.raises(ConflictError):
        library.rename("text-to-sql", "old")
    with pytest.raises(NotFoundError):
        library.rename("absent", "new")
    assert state(library) == before


def test_rename_of_several_tags_does_not_mix_with_another_name(library: Library) -> None:
    library.add(make_expert(0), "a")
    library.add(make_expert(1), "a:v1")
    library.add(make_expert(2), "b:v9")
    before = state(library)
    with pytest.raises(ConflictError, match="b:v9 is taken"):
        library.rename("a", "b")
    assert state(library) == before


def test_remove_takes_a_tag_or_a_whole_name_and_keeps_the_history(library: Library) -> None:
    a = library.add(make_expert(0), "sql").digest
    b = library.add(make_expert(1), "sql:v1").digest
    library.tag("sql", "sql:v2")
    assert library.remove("sql:v1") == b
    assert set(library.tags()) == {"sql", "sql:v2"}
    assert library.remove("sql") == a
    assert dict(library) == {}
    assert [str(e.new) if e.new else None for e in library.log("sql")] == [
        a,
        b,
        a,
        None,
        None,
        None,
    ]
    assert library.digest(a) == a  # still there, by digest, until gc
    for name, error in (("sql", NotFoundError), (a, UsageError), (a[7:20], UsageError)):
        with pytest.raises(error):
            library.remove(name)


def test_tag(library: Library) -> None:
    a, b = (library.add(make_expert(i), f"e{i}").digest for i in range(2))
    assert library.tag("e0", "e0:v1") == a
    assert library.tag(b[:20], "best") == b
    library.tag("e0", "e0:v1")  # again is no error
    before = state(library)
    with pytest.raises(ConflictError, match="best is taken"):
        library.tag("e0", "best")
    assert state(library) == before
    library.tag("e0", "best", replace=True)
    assert library.digest("best") == a
    assert library.log("best")[-1].reason == "tag of e0"


def test_the_log_says_who_moved_what(library: Library) -> None:
    digest = library.add(make_expert(), "one").digest
    library.remove("one")
    first, last = library.log("one")
    assert (first.old, str(first.new), first.reason) == (None, digest, "add")
    assert (str(last.old), last.new, last.reason) == (digest, None, "rm")
    assert first.time <= last.time
    assert library.log("never") == []


def test_summaries_need_no_index_and_believe_no_broken_one(local: Library) -> None:
    for i in range(4):
        local.add(make_expert(i, kind=("lora", "sparse")[i % 2], task=f"t{i}"), f"e{i}")
    index = local.path / "index.db"  # type: ignore[operator]
    wanted = local.summaries()
    assert wanted["e1"][1].kind == "sparse"
    assert (wanted["e2"][1].task, wanted["e2"][1].rank, wanted["e2"][1].modules) == ("t2", 2, 2)
    manifest = local.manifest("e2")
    assert (wanted["e2"][1].params, wanted["e2"][1].bytes) == (manifest.params, manifest.blob.size)
    assert wanted["e2"][0] == local.digest("e2")

    def other_schema() -> None:
        index.unlink()
        with sqlite3.connect(index) as database:
            database.execute("CREATE TABLE summary (digest TEXT, summary TEXT)")
            database.execute("INSERT INTO summary VALUES (?, 5)", [local.digest("e0")])
            database.execute("PRAGMA user_version = 1")
        database.close()

    def directory() -> None:
        index.unlink()
        index.mkdir()

    damages: list[Callable[[], Any]] = [
        index.unlink,
        lambda: index.write_bytes(b""),
        lambda: index.write_bytes(b"garbage" * 1000),
        lambda: index.write_bytes(index.read_bytes()[:2000]),
        other_schema,
        directory,
    ]
    for damage in damages:
        damage()
        assert local.summaries() == wanted
        if index.is_file():
            assert local.summaries() == wanted
    shutil.rmtree(index)
    assert local.summaries() == wanted
    assert index.is_file()


def test_what_is_derived_can_go(local: Library, tmp_path: Path, save_llama: Any) -> None:
    save_llama(tmp_path / "model")
    deltas = {"model.layers.0.self_attn.q_proj": lora(0, d_out=16, d_in=16)}
    for i in range(2):
        local.add(Expert(str(tmp_path / "model"), deltas, {"i": i}), f"e{i}")
    before, summaries = state(local), local.summaries()
    root = local.path
    assert root is not None
    assert (root / "derived").is_dir()
    shutil.rmtree(root / "derived")
    (root / "index.db").unlink()
    again = Library.open(root)
    assert again.summaries() == summaries
    assert not again.add(Expert(str(tmp_path / "model"), deltas, {"i": 0}), "e0").new
    assert state(again) == before


def test_records_are_kept_with_their_experts(library: Library) -> None:
    digest = library.add(make_expert(), "one").digest
    document = {"k": 2, "experts": {"one": digest}, "clusters": {"0": ["one"]}}
    library.save_record("clusterings", "mine", document)
    library.save_record("clusterings", "mine", document)
    assert library.load_record("clusterings", "mine") == document
    assert list(library) == ["one"]  # a record is no expert
    assert "clusterings/mine" not in library
    library.remove("one")
    assert library.gc(grace=timedelta(0)).removed == ()
    assert library.verify(deep=True).ok
    assert library.digest(digest) == digest
    with pytest.raises(NotFoundError, match="no clusterings named 'other'; there are: mine"):
        library.load_record("clusterings", "other")
    with pytest.raises(UsageError, match="no kind of record"):
        library.save_record("experts", "x", {})


def test_gc_removes_what_no_name_leads_to(library: Library) -> None:
    library.add(make_expert(0), "stays")
    gone = library.add(make_expert(1), "goes").digest
    before = state(library)["objects"]
    library.remove("goes")
    assert library.gc().removed == ()  # within the grace period
    assert len(library.gc(grace=timedelta(0), dry_run=True).removed) == 2
    assert state(library)["objects"] == before
    result = library.gc(grace=timedelta(0))
    assert len(result.removed) == 2
    assert gone not in library
    assert library.verify(deep=True).ok
    assert result.id is not None
    assert library.restore(result.id) == 2
    assert state(library)["objects"] == before
    with pytest.raises(NotFoundError, match="no trash"):
        library.restore("../objects")


def flip(library: Library, digest: str) -> None:
    path = library.path / "objects" / "sha256" / digest[7:9] / digest[7:]  # type: ignore[operator]
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("what", ["blob", "manifest"])
def test_verify_names_the_experts_that_a_flipped_byte_spoils(
    local: Library, deep: bool, what: str
) -> None:
    local.add(make_expert(0), "intact")
    digest = local.add(make_expert(1), "spoiled").digest
    local.tag("spoiled", "again")
    assert local.verify(deep=deep).ok
    flip(local, local.manifest("spoiled").blob.digest if what == "blob" else digest)
    report = local.verify(deep=deep)
    assert [p.kind for p in report.problems] == ["corrupt"]
    assert [str(ref) for ref in report.problems[0].refs] == ["again", "spoiled"]
    assert same_expert(local["intact"], make_expert(0))
    with pytest.raises(Exception, match=r"(?i)corrupt|does not hash|digest"):
        local["spoiled"]


def test_deep_verify_reads_what_others_put_there(library: Library) -> None:
    """A store may be written by another program, or an older adaptlib."""
    library.add(make_expert(), "good")
    packed = pack(Expert("b", {"m": LoRADelta(NAN, torch.ones(3, 2))}))
    blob = library.store.put(packed.blob())
    manifest = library.store.put(packed.manifest(str(blob)).encode())
    library.store.move(Ref("bad"), manifest, expect=None)
    assert library.verify().ok
    report = library.verify(deep=True)
    assert [str(ref) for problem in report.problems for ref in problem.refs] == ["bad"]
    assert "NaN" in report.problems[0].detail


def test_add_takes_directories_and_names_them(library: Library, tmp_path: Path) -> None:
    write_directory(pack(make_expert()), tmp_path / "My Expert")
    added = library.add(tmp_path / "My Expert", task="t", description="d")
    assert added.name == "my-expert"
    card = library["my-expert"].card
    assert (card["task"], card["description"]) == ("t", "d")
    assert library.add(str(tmp_path / "My Expert"), "x").name == "x"


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
