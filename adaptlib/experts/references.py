"""What the objects of a library refer to."""

from collections.abc import Iterator
from typing import Any

import msgspec

from adaptlib.errors import CorruptError
from adaptlib.experts.codec import SCHEMA
from library_store import Digest, InvalidDigest


class _Document(msgspec.Struct):
    """What matters here of a manifest or a record; the rest is passed over."""

    schema: Any = None
    blob: Any = None
    experts: Any = None
    tensors: Any = None


_DECODE = msgspec.json.Decoder(_Document).decode


def children(digest: Digest, data: bytes) -> Iterator[Digest]:
    """What a kept object refers to: a manifest its blob, a record its experts and its tensors, a
    blob nothing. CorruptError where it looks like one of these and is not."""
    document = _document(digest, data)
    if document.schema == SCHEMA:
        yield _blob(digest, document)[0]
    elif isinstance(document.experts, dict):
        for text in document.experts.values():
            yield _parse(digest, text)
        if document.tensors is not None:
            yield _parse(digest, document.tensors)


def blob_sizes(digest: Digest, data: bytes) -> dict[Digest, int]:
    """What a manifest says of the size of its blob; nothing for any other object."""
    document = _document(digest, data)
    return dict([_blob(digest, document)]) if document.schema == SCHEMA else {}


def _blob(digest: Digest, document: _Document) -> tuple[Digest, int]:
    blob = document.blob
    if not isinstance(blob, dict) or not isinstance(blob.get("size"), int):
        raise CorruptError(f"{digest.short} is a manifest without a blob: {blob!r:.80}")
    return _parse(digest, blob.get("digest")), blob["size"]


def _parse(digest: Digest, text: object) -> Digest:
    try:
        return Digest.parse(str(text))
    except InvalidDigest as error:
        raise CorruptError(f"{digest.short} refers to what is no object: {error}") from error


def _document(digest: Digest, data: bytes) -> _Document:
    if not data.startswith(b'{"') or b"\0" in data[:8]:
        return _Document()
    try:
        return _DECODE(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise CorruptError(f"{digest.short} is no manifest and no record: {error}") from error
