"""What actors do to one store at the same time, and what must hold whatever the order."""

from library_store import GcAborted, LocalStore, ObjectNotFound, Ref, RefConflict
from tests.store.schedule import Scenario
from tests.store.steps import (
    HOUR,
    JUNK,
    LEAF,
    NONE,
    OTHER,
    PARENT,
    A,
    B,
    C,
    abandoned,
    at,
    both,
    collected,
    damaged,
    gc,
    has,
    kept,
    logged,
    look,
    move,
    no_trash,
    old,
    one_wins,
    put,
    put_and_read,
    quarantine,
    removed_once,
    rename,
    repair,
    reports_nothing,
    restore,
    scratched,
    sound,
    succeeds,
    verify,
    whole,
)

CONFLICT = (RefConflict,)
GONE = (ObjectNotFound,)
ABORTED = (GcAborted,)
add = both(put(LEAF, PARENT), move(B, PARENT))

PAIRS: dict[str, Scenario] = {
    "put, gc": Scenario(
        lambda s: old(s, LEAF), [put(LEAF), gc()], sound(has(0, LEAF)), whole, ABORTED
    ),
    "put and move, gc": Scenario(
        lambda s: old(s, JUNK), [add, gc()], sound(succeeds(0, 1), at(0, B, PARENT), logged), whole
    ),
    "put again and move, gc": Scenario(
        lambda s: old(s, LEAF, PARENT, JUNK),
        [add, gc()],
        sound(succeeds(0), at(0, B, PARENT), logged),
        whole,
        ABORTED,
    ),
    "move to garbage, gc": Scenario(
        lambda s: old(s, LEAF, PARENT),
        [move(B, PARENT), gc()],
        sound(at(0, B, PARENT), logged),
        whole,
        (*GONE, *ABORTED),
    ),
    "put and move, gc of all": Scenario(
        lambda s: old(s, JUNK),
        [both(put(LEAF), move(B, LEAF)), gc(NONE)],
        sound(at(0, B, LEAF), logged),
        whole,
        (*GONE, *ABORTED),
    ),
    "move, move": Scenario(
        lambda s: old(s, LEAF, OTHER),
        [move(A, LEAF), move(A, OTHER)],
        sound(one_wins, at(0, A, LEAF), at(1, A, OTHER), logged),
        whole,
        CONFLICT,
    ),
    "move, remove": Scenario(
        lambda s: (kept(s), old(s, OTHER)),
        [move(A, OTHER, PARENT), move(A, None, PARENT)],
        sound(one_wins, at(0, A, OTHER), at(1, A, None), logged),
        whole,
        CONFLICT,
    ),
    "mv, gc": Scenario(
        kept,
        [rename, gc(NONE)],
        sound(succeeds(0, 1), at(0, B, PARENT), at(0, A, None), logged),
        whole,
    ),
    "restore, gc": Scenario(
        collected, [restore, gc()], sound(succeeds(0, 1), has(0, LEAF, PARENT), no_trash), whole
    ),
    "restore, gc of all": Scenario(
        collected, [restore, gc(NONE)], sound(removed_once), whole, (*GONE, *ABORTED)
    ),
    "restore, put": Scenario(
        collected,
        [restore, add],
        sound(succeeds(0, 1), at(1, B, PARENT), logged, no_trash),
        whole,
    ),
    "restore, restore": Scenario(
        collected, [restore, restore], sound(has(0, LEAF, PARENT), no_trash), whole, GONE
    ),
    "quarantine, put": Scenario(
        damaged, [quarantine, put(LEAF)], sound(succeeds(1), has(1, LEAF)), None, GONE
    ),
    "put, put": Scenario(damaged, [put_and_read, put_and_read], sound(succeeds(0, 1)), switches=3),
    "quarantine, gc": Scenario(kept, [quarantine, gc(NONE)], sound(succeeds(0, 1)), whole),
    "restore, gc at work": Scenario(
        kept, [restore, gc()], sound(succeeds(1), removed_once), whole, GONE
    ),
    "verify, gc": Scenario(
        kept, [verify, gc(NONE)], sound(succeeds(0, 1), reports_nothing(0)), whole
    ),
    "gc, gc": Scenario(kept, [gc(NONE), gc(NONE)], sound(removed_once), whole, ABORTED),
    "last tag, another tag": Scenario(
        kept,
        [move(A, None, PARENT), both(put(OTHER), move(C, OTHER))],
        sound(succeeds(0, 1), at(0, A, None), at(1, C, OTHER), logged),
        whole,
    ),
    "last tag, look": Scenario(
        kept, [move(A, None, PARENT), look], sound(succeeds(0, 1), logged), whole
    ),
    "a/b:c becomes a:b, look": Scenario(
        lambda s: (old(s, LEAF, OTHER), move(Ref("team/a/b", "c"), LEAF)(s)),
        [
            both(move(Ref("team/a/b", "c"), None, LEAF), move(Ref("team/a", "b"), OTHER)),
            look,
        ],
        sound(succeeds(0, 1)),
        whole,
    ),
    "a:b becomes a/b:c, look": Scenario(
        lambda s: (old(s, LEAF, OTHER), move(Ref("team/a", "b"), LEAF)(s)),
        [
            both(move(Ref("team/a", "b"), None, LEAF), move(Ref("team/a/b", "c"), OTHER)),
            look,
        ],
        sound(succeeds(0, 1)),
        whole,
    ),
    "last tag and another, look": Scenario(
        kept,
        [both(move(A, None, PARENT), put(OTHER), move(C, OTHER)), LocalStore.refs],
        sound(succeeds(0, 1), logged),
        whole,
        switches=3,
    ),
    "a:b, a/b:c": Scenario(
        lambda s: old(s, LEAF, OTHER),
        [move(Ref("team/a", "b"), LEAF), move(Ref("team/a/b", "c"), OTHER)],
        sound(one_wins),
        whole,
        CONFLICT,
    ),
    "takeover": Scenario(
        abandoned,
        [move(A, LEAF), move(A, OTHER)],
        sound(one_wins, at(0, A, LEAF), at(1, A, OTHER), logged),
        whole,
        CONFLICT,
    ),
    "remove, gc that remembers": Scenario(
        kept,
        [move(A, None, PARENT), gc(NONE, HOUR)],
        sound(succeeds(0, 1), has(0, PARENT, LEAF), logged),
        whole,
    ),
    "move and back, gc that remembers": Scenario(
        lambda s: (kept(s), old(s, OTHER)),
        [both(move(A, OTHER, PARENT), move(A, PARENT, OTHER)), gc(HOUR, HOUR)],
        sound(has(0, OTHER), logged),
        whole,
        (*GONE, *ABORTED),
    ),
    "repair, gc that remembers": Scenario(
        scratched, [repair, gc(HOUR, HOUR)], sound(has(0, OTHER), logged), whole, ABORTED
    ),
    "repair, move": Scenario(
        lambda s: scratched(s),
        [repair, move(A, OTHER, PARENT)],
        sound(succeeds(0, 1), logged),
        whole,
    ),
    "repair, put": Scenario(damaged, [repair, put(LEAF)], sound(succeeds(0, 1), has(1, LEAF))),
}

LYING_PAIRS: dict[str, Scenario] = {
    "lies: move to garbage, gc": Scenario(
        lambda s: old(s, LEAF, PARENT),
        [move(B, PARENT), gc()],
        sound(at(0, B, PARENT), logged),
        typed=(*GONE, *ABORTED),
        lies=True,
    ),
    "lies: put again and move, gc": Scenario(
        lambda s: old(s, LEAF, PARENT, JUNK),
        [add, gc()],
        sound(at(0, B, PARENT), logged),
        typed=(*GONE, *ABORTED),
        lies=True,
    ),
    "lies: mv, gc": Scenario(
        kept,
        [rename, gc(NONE)],
        sound(at(0, B, PARENT), logged),
        typed=(*GONE, *ABORTED),
        lies=True,
    ),
    "lies: move, gc": Scenario(
        lambda s: (kept(s), old(s, OTHER)),
        [move(A, OTHER, PARENT), gc(NONE)],
        sound(at(0, A, OTHER), logged),
        typed=(*GONE, *ABORTED),
        lies=True,
    ),
    "lies: gc, gc": Scenario(
        kept, [gc(NONE), gc(NONE)], sound(removed_once), whole, ABORTED, lies=True
    ),
    "lies: restore, gc": Scenario(
        collected, [restore, gc(NONE)], sound(removed_once), whole, (*GONE, *ABORTED), lies=True
    ),
    "lies: move, move": Scenario(
        lambda s: old(s, LEAF, OTHER),
        [move(A, LEAF), move(A, OTHER)],
        sound(),
        whole,
        CONFLICT,
        lies=True,
    ),
    "lies: move, remove": Scenario(
        lambda s: (kept(s), old(s, OTHER)),
        [move(A, OTHER, PARENT), move(A, None, PARENT)],
        sound(),
        whole,
        CONFLICT,
        lies=True,
    ),
    "lies: remove, remove": Scenario(
        kept,
        [move(A, None, PARENT), move(A, None, PARENT)],
        sound(),
        whole,
        CONFLICT,
        lies=True,
    ),
    "lies: last tag, another tag": Scenario(
        kept,
        [move(A, None, PARENT), both(put(OTHER), move(C, OTHER))],
        sound(succeeds(0, 1), at(0, A, None), at(1, C, OTHER)),
        whole,
        lies=True,
    ),
    "lies: last tag of one, of two": Scenario(
        lambda s: (kept(s), move(B, PARENT)(s)),
        [move(A, None, PARENT), move(B, None, PARENT)],
        sound(succeeds(0, 1), at(0, A, None), at(1, B, None), logged),
        whole,
        lies=True,
    ),
    "lies: last tag, look": Scenario(
        kept, [move(A, None, PARENT), look], sound(succeeds(0, 1), logged), whole, lies=True
    ),
    "lies: a:b, a/b:c": Scenario(
        lambda s: old(s, LEAF, OTHER),
        [move(Ref("team/a", "b"), LEAF), move(Ref("team/a/b", "c"), OTHER)],
        sound(),
        whole,
        CONFLICT,
        lies=True,
    ),
}

TRIPLES: dict[str, Scenario] = {
    "put again and move, move, gc": Scenario(
        lambda s: old(s, LEAF, PARENT, OTHER),
        [add, both(put(OTHER), move(A, OTHER)), gc()],
        sound(succeeds(0, 1), at(0, B, PARENT), at(1, A, OTHER), logged),
        whole,
        ABORTED,
    ),
    "mv, remove, gc": Scenario(
        kept,
        [rename, move(A, None, PARENT), gc(NONE)],
        sound(logged),
        whole,
        (*CONFLICT, *GONE, *ABORTED),
    ),
    "restore, put and move, gc": Scenario(
        collected,
        [restore, add, gc()],
        sound(succeeds(0, 1), at(1, B, PARENT), has(0, LEAF, PARENT), logged),
        whole,
        ABORTED,
    ),
    "put again and move, gc, gc": Scenario(
        lambda s: old(s, LEAF, PARENT, JUNK),
        [add, gc(), gc()],
        sound(succeeds(0), at(0, B, PARENT), logged, removed_once),
        whole,
        ABORTED,
    ),
    "quarantine, put, put": Scenario(
        damaged, [quarantine, put(LEAF), put(LEAF)], sound(succeeds(1, 2)), None, GONE
    ),
    "lies: put again and move, move, gc": Scenario(
        lambda s: (kept(s), old(s, OTHER)),
        [both(put(OTHER), move(B, OTHER)), move(A, None, PARENT), gc(NONE)],
        sound(at(0, B, OTHER), at(1, A, None), logged),
        typed=(*GONE, *ABORTED),
        lies=True,
    ),
    "lies: mv, gc, gc": Scenario(
        kept,
        [rename, gc(NONE), gc(NONE)],
        sound(at(0, B, PARENT), logged),
        typed=(*GONE, *ABORTED),
        lies=True,
    ),
    "lies: mv, restore, gc": Scenario(
        lambda s: (collected(s), put(LEAF, PARENT)(s), move(A, PARENT, OTHER)(s)),
        [rename, restore, gc(NONE)],
        sound(at(0, B, PARENT), logged),
        typed=(*GONE, *ABORTED),
        lies=True,
    ),
    "lies: move to garbage, move, gc": Scenario(
        lambda s: (kept(s), old(s, OTHER)),
        [move(A, OTHER, PARENT), both(put(JUNK), move(A, JUNK, PARENT)), gc(NONE)],
        sound(),
        typed=(*CONFLICT, *GONE, *ABORTED),
        lies=True,
    ),
    "takeover by three": Scenario(
        abandoned,
        [move(A, LEAF), move(A, OTHER), both(put(LEAF), move(B, LEAF))],
        sound(one_wins, succeeds(2), at(2, B, LEAF), logged),
        whole,
        CONFLICT,
    ),
}
