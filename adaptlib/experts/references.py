"""What the objects of a library refer to."""

from collections.abc import Iterator

from adaptlib.experts.codec import SCHEMA
from adaptlib.experts.tensors import parse_json
from library_store import Digest


def children(_: Digest, data: bytes) -> Iterator[Digest]:
    """What a kept object refers to: a manifest its blob, a record its experts and its tensors, a
    blob nothing."""
    if not data.startswith(b'{"') or b"\0" in data[:8]:
        return
    document = parse_json("object", data)
    if document.get("schema") == SCHEMA:
        yield Digest.parse(document["blob"]["digest"])
    elif isinstance(document.get("experts"), dict):
        for digest in document["experts"].values():
            yield Digest.parse(digest)
        if "tensors" in document:
            yield Digest.parse(document["tensors"])


def blob_sizes(_: Digest, data: bytes) -> dict[Digest, int]:
    """What a manifest says of the size of its blob; nothing for any other object."""
    if not data.startswith(b'{"') or b"\0" in data[:8]:
        return {}
    document = parse_json("object", data)
    if document.get("schema") != SCHEMA:
        return {}
    return {Digest.parse(document["blob"]["digest"]): int(document["blob"]["size"])}
