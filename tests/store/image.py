"""What is on a simulated disk."""

from dataclasses import dataclass
from typing import Final

ROOT: Final = 1
"""The inode of `/`."""


@dataclass(frozen=True, slots=True)
class Image:
    """What is on a disk: the entries of directories and the (bytes, mtime) of files, by inode.

    The dicts are never changed: whoever changes a directory puts another dict in its place.
    """

    directories: dict[int, dict[str, int]]
    files: dict[int, tuple[bytes, int]]

    def tree(self) -> dict[str, tuple[bytes, int] | None]:
        """Every path with what is there; None for a directory. Equal trees are equal disks."""
        found: dict[str, tuple[bytes, int] | None] = {}
        waiting = [("", ROOT)]
        while waiting:
            above, inode = waiting.pop()
            for name, child in self.directories[inode].items():
                path = f"{above}/{name}"
                if child in self.directories:
                    found[path] = None
                    waiting.append((path, child))
                else:
                    found[path] = self.files[child]
        return found


EMPTY: Final = Image({ROOT: {"srv": 2}, 2: {}}, {})
