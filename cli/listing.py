"""adaptlib list: what is in the library."""

from . import out
from .options import JsonOption, LibraryOption, QuietOption

EXAMPLES = ("adaptlib list", "adaptlib ls -q", "adaptlib list --json")


def list_experts(
    library: LibraryOption = None, json: JsonOption = False, quiet: QuietOption = False
) -> None:
    """List the experts."""
    from adaptlib.experts.library import Library

    summaries = Library.open(library).summaries()
    if json:
        out.document(
            "list",
            experts=[
                {
                    "name": name,
                    "digest": digest,
                    "kind": s.kind,
                    "base": s.base,
                    "task": s.task,
                    "rank": s.rank,
                    "modules": s.modules,
                    "params": s.params,
                    "bytes": s.bytes,
                }
                for name, (digest, s) in summaries.items()
            ],
        )
        return
    if quiet:
        for name in summaries:
            out.line(name)
        return
    if not summaries:
        out.note("The library is empty.\n  Next: adaptlib add SOURCE, or adaptlib init --demo")
        return
    out.table(
        [
            ("NAME", "left"),
            ("KIND", "left"),
            ("RANK", "right"),
            ("SIZE", "right"),
            ("DIGEST", "left"),
            ("BASE", "cut"),
        ],
        [
            [
                out.cut(name, 40),
                s.kind,
                str(s.rank or ""),
                out.size(s.bytes),
                digest.removeprefix("sha256:")[:7],
                s.base,
            ]
            for name, (digest, s) in summaries.items()
        ],
    )
    total = sum(s.bytes for _, s in summaries.values())
    out.note(f"{out.count(len(summaries), 'expert')}, {out.size(total)}")
