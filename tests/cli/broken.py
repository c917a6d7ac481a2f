"""The library that trials on a failing disk start from."""

import os
import shutil
from datetime import timedelta
from pathlib import Path

from adaptlib.experts import Expert, Library, write_peft
from adaptlib.experts.codec import Packed, pack, write_directory
from adaptlib.experts.derived import training_run
from adaptlib.experts.sketches import keep_sketch, sketch_expert
from tests import tiny

OLD = 30 * 86400  # seconds: older than what gc keeps


def make(root: Path) -> str:
    """A library with names, tags, garbage and trash, and what can be added to it. Returns the id
    of the gc that filled the trash."""
    root.mkdir(parents=True)
    tiny.save_llama(root / "model")
    (root / "base").mkdir()
    (root / "model" / "config.json").rename(root / "base" / "config.json")
    shutil.rmtree(root / "model")
    library = Library.open(root / "library", create=True)
    write_directory(pack(tiny.make_expert(0, task="poems of the sea")), root / "kept")
    library.add(root / "kept", "poems")
    library.tag("poems", "poems:v1")
    library.tag("poems", "best")
    library.add(tiny.make_expert(1, kind="sparse"), "sums")
    _bury(library, pack(tiny.make_expert(7)))
    gc_id = library.gc(grace=timedelta(0), history=timedelta(0)).id
    assert gc_id is not None
    _bury(library, pack(tiny.make_expert(8)))
    run = training_run(root / "library", "ab12")
    run.mkdir(parents=True)
    (run / "cpu-1.safetensors").write_bytes(b"12345")
    for path in (run / "cpu-1.safetensors", run):
        _age(path)
    write_directory(pack(tiny.make_expert(3)), root / "one")
    write_directory(pack(tiny.make_expert(4, kind="sparse")), root / "two")
    _write_adapter(root / "peft")
    assert len(library.summaries()) == 3  # which makes the index
    return gc_id


def _bury(library: Library, packed: Packed) -> None:
    """An expert that has no name and no history, and its sketch."""
    assert library.path is not None
    manifest = packed.manifest(str(library.store.put(packed.blob())))
    digest = library.store.put(manifest.encode())
    keep_sketch(library.path, str(digest), packed.shapes, sketch_expert(packed))
    for one in (manifest.blob.digest.removeprefix("sha256:"), digest.hex):
        path = library.path / "objects/sha256" / one[:2] / one
        _age(path)


def _age(path: Path) -> None:
    then = path.stat().st_mtime - OLD
    os.utime(path, (then, then))


def _write_adapter(directory: Path) -> None:
    """A PEFT directory for the base model beside it."""
    deltas = {f"model.layers.{i}.self_attn.q_proj": tiny.lora(i, d_out=16, d_in=16) for i in (0, 1)}
    write_peft(Expert("base", deltas), directory)
    (directory / "README.md").write_text("---\nlicense: mit\n---\n")
