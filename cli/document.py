"""The parts that all JSON documents of the command line are made of."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

Digest = Annotated[str, Meta(pattern="^sha256:[0-9a-f]{64}$")]
Count = Annotated[int, Meta(ge=0)]
Kind = Literal["lora", "sparse"]


class Part(Struct, forbid_unknown_fields=True, kw_only=True):
    """Something within a document."""


class Document(Part, tag_field="schema"):
    """Something that is printed whole, with the name of its schema."""


class Error(Part):
    """What went wrong: the exit code, a sentence, and what to type next."""

    code: Annotated[int, Meta(ge=1, le=255)]
    message: str
    hint: str | None


class ErrorDocument(Document, tag="adaptlib.error/1"):
    """What any command writes on stderr, in the place of its own document, where it fails."""

    error: Error
