"""Paths of a simulated disk."""


class TextPath(str):
    """What the store uses of `pathlib.Path`, several times as fast: most of what a check of a state
    did was to take paths apart. Absolute ones only."""

    __slots__ = ()

    def __truediv__(self, other: str) -> "TextPath":
        return TextPath(f"{self}/{other}")

    def joinpath(self, *others: str) -> "TextPath":
        return TextPath("/".join((self, *others)))

    @property
    def parent(self) -> "TextPath":
        return TextPath(self.rpartition("/")[0])

    @property
    def parents(self) -> "list[TextPath]":
        parts = self.split("/")
        return [TextPath("/".join(parts[:count])) for count in range(len(parts) - 1, 1, -1)]

    @property
    def name(self) -> str:
        return self.rpartition("/")[2]

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.split("/")) if self else ()

    def with_name(self, name: str) -> "TextPath":
        return self.parent / name

    def relative_to(self, base: str) -> "TextPath":
        if self == base:
            return TextPath("")
        if not self.startswith(f"{base}/"):
            raise ValueError(f"{self} is not below {base}")
        return TextPath(self[len(base) + 1 :])

    def as_posix(self) -> str:
        return str(self)

    def absolute(self) -> "TextPath":
        return self
