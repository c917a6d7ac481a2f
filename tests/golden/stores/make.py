"""Makes a small library with whatever adaptlib is imported, and writes down what is in it.

    git worktree add /tmp/old COMMIT
    PYTHONPATH=/tmp/old python tests/golden/stores/make.py tests/golden/stores/N-COMMIT

It runs with every version since the first that had a Library, so it asks for what came later only
where that is there. `experts` is also what today's code adds again, to be compared.
"""

import hashlib
import inspect
import json
import os
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

SHAPES = {"model.layers.0.self_attn.q_proj": (8, 8), "model.layers.0.self_attn.v_proj": (4, 8)}


def numbers(start: int, *shape: int) -> Any:
    """A tensor of numbers that every machine and version makes alike."""
    import torch

    count = 1
    for side in shape:
        count *= side
    return torch.tensor([((start + i) * 7919 % 1009) / 512 - 1 for i in range(count)]).view(shape)


def experts() -> dict[str, Any]:
    """Experts by name: LoRA in two dtypes, sparse, one to be removed, and one with gates where
    this version has them."""
    import torch

    from adaptlib.experts import Expert, LoRADelta, SparseDelta

    def lora(start: int, dtype: Any) -> dict[str, Any]:
        return {
            module: LoRADelta(
                numbers(start, 2, d_in).to(dtype), numbers(start + 500, d_out, 2).to(dtype), 0.5
            )
            for module, (d_out, d_in) in SHAPES.items()
        }

    sparse = {
        module: SparseDelta(torch.tensor([1, 5, 9, 30]), numbers(900, 4), (d_out, d_in))
        for module, (d_out, d_in) in SHAPES.items()
    }
    card = {"task": "poems of the sea", "description": "writes poems", "metrics": {"loss": 0.25}}
    made = {
        "poems": Expert("org/base", lora(1, torch.float32), card),
        "team/sql": Expert("org/base", lora(2, torch.bfloat16), {"task": "sql"}),
        "sums": Expert("org/base", sparse, {"task": "sums"}),
        "gone": Expert("org/base", lora(3, torch.float16), {}),
    }
    if "gates" in inspect.signature(Expert).parameters:
        gates = {module: numbers(7, d_in) for module, (_, d_in) in SHAPES.items()}
        made["gated"] = Expert("org/base", lora(4, torch.float32), {}, gates)
    return made


def tensors_of(expert: Any) -> dict[str, list[Any]]:
    """Dtype, shape and SHA-256 of each tensor."""
    import torch

    found: dict[str, list[Any]] = {}
    for module, delta in expert.deltas.items():
        parts = ("a", "b") if hasattr(delta, "a") else ("index", "values")
        for part in parts:
            tensor = getattr(delta, part)
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            about = [str(tensor.dtype), list(tensor.shape), hashlib.sha256(data).hexdigest()]
            found[f"{module}.{part}"] = about
    for module, gate in getattr(expert, "gates", {}).items():
        found[f"{module}.gate"] = [str(gate.dtype), hashlib.sha256(gate.numpy()).hexdigest()]
    return found


def make(root: Path) -> dict[str, Any]:
    """A library that was used: added to, tagged, tagged anew, removed from, collected, saved in."""
    from adaptlib.experts import Library

    library = Library.open(root, create=True)
    added = {name: library.add(one, name) for name, one in experts().items()}
    library.tag("poems", "poems:v1")
    library.tag("team/sql", "best")
    library.tag("sums", "best", replace=True)
    library.remove("gone")
    if hasattr(library, "pin"):
        library.pin("team/sql", "kept")
    never = {"grace": timedelta(0), "history": timedelta(0)}
    known = inspect.signature(library.gc).parameters
    collected = library.gc(**{word: span for word, span in never.items() if word in known})
    records = save(library)
    library.summaries()
    derive(library)
    names = sorted({entry.split(":")[0] for entry in [*library.tags(), "gone"]})
    return {
        "digests": {name: one.digest for name, one in added.items()},
        "tags": library.tags(),
        "names": library.names(),
        "records": records,
        "gc": {"id": collected.id, "removed": [str(digest) for digest in collected.removed]},
        "objects": sorted(str(digest) for digest in library.store.objects()),
        "logs": {
            name: [
                [e.when, str(e.ref), e.old and str(e.old), e.new and str(e.new), e.reason]
                for e in library.log(name)
            ]
            for name in names
        },
        "tensors": {name: tensors_of(library[name]) for name in library.tags()},
    }


def save(library: Any) -> list[str]:
    """A clustering and a router, as this version keeps them; the refs they are kept under."""
    saved: list[str] = []
    held = {name: library[name] for name in ("poems", "team/sql")}
    try:
        from adaptlib.clustering.mbc import cluster
        from adaptlib.clustering.saved import save_clustering

        save_clustering(library, "mine", cluster(held, k=1))
    except ImportError:
        document = {  # as `adaptlib cluster --save` wrote it then
            "schema": "adaptlib.clustering/1",
            "method": "mbc",
            "k": 1,
            "seed": 0,
            "features": "factors",
            "clusters": {"0": sorted(held)},
            "experts": {name: library.digest(name) for name in held},
        }
        try:
            from adaptlib.experts.records import save_record

            save_record(library.store, "clusterings", "mine", document)
        except ImportError:
            library.save_record("clusterings", "mine", document)
    saved.append("clusterings/mine")
    try:
        from adaptlib.routing import Arrow
        from adaptlib.routing.saved import save_router
    except ImportError:
        return saved
    save_router(library, "mine", Arrow.fit(held, top_k=2))
    return [*saved, "routers/mine"]


def derive(library: Any) -> None:
    """Everything in derived/ that this version makes."""
    try:
        from adaptlib.experts.sketches import sketches

        sketches(library)
    except ImportError:
        pass
    try:
        from adaptlib.experts.prototypes import catalogue

        catalogue(library)
    except ImportError:
        pass


def main(out: Path) -> None:
    os.environ |= {"HF_HOME": tempfile.mkdtemp(), "HF_HUB_OFFLINE": "1"}
    expected = make(out / "library")
    (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
