"""Bytes by content: immutable objects under their SHA-256, and refs that point to them.

    store = LocalStore.create("library")
    digest = store.put(b"bytes")
    store.move(Ref("greeting"), digest, expect=None)
    store.get(store.ref(Ref("greeting")))

Standard library only. Errors: see `library_store.errors`.
"""

from library_store._collect import PARENT_LIMIT
from library_store.digest import Digest
from library_store.errors import (
    AmbiguousDigest,
    GcAborted,
    InvalidDigest,
    InvalidName,
    NotAStore,
    ObjectCorrupt,
    ObjectNotFound,
    RefConflict,
    RefCorrupt,
    RefNotFound,
    StoreError,
    StoreExists,
    StoreLocked,
    UnknownFormat,
)
from library_store.local import LocalStore
from library_store.memory import MemoryStore
from library_store.names import Ref
from library_store.records import Children, GcResult, LogEntry, Problem, Repair, Report, Sizes
from library_store.store import Store

__all__ = [
    "PARENT_LIMIT",
    "AmbiguousDigest",
    "Children",
    "Digest",
    "GcAborted",
    "GcResult",
    "InvalidDigest",
    "InvalidName",
    "LocalStore",
    "LogEntry",
    "MemoryStore",
    "NotAStore",
    "ObjectCorrupt",
    "ObjectNotFound",
    "Problem",
    "Ref",
    "RefConflict",
    "RefCorrupt",
    "RefNotFound",
    "Repair",
    "Report",
    "Sizes",
    "Store",
    "StoreError",
    "StoreExists",
    "StoreLocked",
    "UnknownFormat",
]
