"""Which experts a command is about: names, one base model, each expert once."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adaptlib.experts.library import Library


def select(library: "Library", names: list[str], base: str | None) -> list[str]:
    """The names given, or all; of `base` only, where one is given. An expert that goes by several
    of the names is there once. NotFoundError where none is left."""
    from adaptlib.errors import NotFoundError

    chosen: dict[str, str] = {}
    for name in names or library:
        chosen.setdefault(library.digest(name), name)
    if not chosen:
        raise NotFoundError(
            "the library is empty", hint="adaptlib add SOURCE, or adaptlib init --demo"
        )
    if base is None:
        return list(chosen.values())
    of_base = [name for name in chosen.values() if library.manifest(name).base == base]
    if not of_base:
        known = sorted({library.manifest(name).base for name in chosen.values()})
        raise NotFoundError(
            f"no expert of base model {base!r} here; there are: {', '.join(known)}",
            hint=f"--base {known[0]}",
        )
    return of_base


def one_base(library: "Library", names: list[str]) -> tuple[str, str | None]:
    """The base model (id, revision) that all of `names` are for. UsageError where they are for
    several; a revision that only some cards know counts for all."""
    from adaptlib.errors import UsageError

    pins: dict[tuple[str, str | None], list[str]] = {}
    for name in names:
        manifest = library.manifest(name)
        pins.setdefault((manifest.base, manifest.card["base"].get("revision")), []).append(name)
    known = {pin: held for pin, held in pins.items() if pin[1] is not None}
    bases = {base for base, _ in pins}
    if len(bases) > 1:
        parts = [f"{base} ({len(held)}: {held[0]}, ...)" for (base, _), held in pins.items()]
        raise UsageError(
            f"these experts are for {len(bases)} base models: {'; '.join(parts)}",
            hint=f"choose those of one: --base {next(iter(pins))[0]}",
        )
    if len(known) > 1:
        parts = [f"{revision} ({held[0]}, ...)" for (_, revision), held in known.items()]
        raise UsageError(
            f"these experts are for several revisions of {bases.pop()}: {'; '.join(parts)}",
            hint="choose those of one with --experts a,b,c, or say which model: --model DIRECTORY",
        )
    return next(iter(known or pins))
