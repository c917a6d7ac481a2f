"""What attaching a library costs, each time in a process of its own: seconds and anonymous memory.

Memory is anonymous memory alone (RssAnon of /proc/self/status): the library's files are mapped, and
what is mapped from a file is the system's to drop. The kernel keeps no peak of it, so a thread reads
it every half millisecond, through ten passes, so that what a pass needs is seen. For passes, in which no file is mapped, the
kernel's own peak (VmHWM, begun anew) less the mapped pages stands beside it in the JSON. malloc is told to give back what is freed (MALLOC_*_THRESHOLD_), or the peak would be that of
the pieces it keeps.
"""

import gc
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from routing_sides import Setting

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
PASSES = 10


def status(*fields: str) -> tuple[int, ...]:
    text = Path("/proc/self/status").read_text()
    return tuple(1024 * int(text.partition(f"{f}:")[2].split()[0]) for f in fields)


class Peak:
    """The highest RssAnon in the block above what it was before, in bytes."""

    anon = 0
    bound = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before, mapped = status("RssAnon", "RssFile")
        done = threading.Event()
        highest = before

        def look() -> None:
            nonlocal highest
            while not done.wait(0.0005):
                highest = max(highest, *status("RssAnon"))

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.anon = max(highest, *status("RssAnon")) - before
            self.bound = status("VmHWM")[0] - mapped - before


def attach(library: str, tok: int, setting: "Setting") -> dict[str, float]:
    import adaptlib

    model, ids = setting.model(), setting.ids(tok)
    model(input_ids=ids)
    times = [time.perf_counter()]
    opened = adaptlib.Library.open(library)
    experts = {name: opened[name] for name in opened}
    times.append(time.perf_counter())
    router = adaptlib.Arrow.fit(experts, top_k=setting.top_k)
    times.append(time.perf_counter())
    routed = adaptlib.attach(model, experts, router)
    times.append(time.perf_counter())
    routed(input_ids=ids)
    times.append(time.perf_counter())
    parts = [after - before for before, after in itertools.pairwise(times)]
    names = ("read", "fit", "attach", "first pass")
    return dict(zip(names, parts, strict=True)) | {"all": sum(parts[:3])}


def memory(library: str, tok: int, setting: "Setting") -> dict[str, float]:
    """Of passes of the base, and of reading, fitting, attaching and passes of the routed model."""
    import adaptlib

    model, ids = setting.model(), setting.ids(tok)
    for _ in range(2):  # what is loaded at first use, and what matrix products keep for good
        _once(library, model, ids)
    gc.collect()
    base, adapted, held = Peak(), Peak(), Peak()
    with base.watched():
        for _ in range(PASSES):
            model(input_ids=ids)
    before = status("RssAnon")[0]
    with adapted.watched():
        opened = adaptlib.Library.open(library)
        experts = {name: opened[name] for name in opened}
        router = adaptlib.Arrow.fit(experts, top_k=setting.top_k)
        handle = adaptlib.attach(model, experts, router)
        params = sum(expert.params for expert in experts.values())
    del experts, router, opened  # nobody needs them any more: `handle` has copies
    gc.collect()
    kept = status("RssAnon")[0] - before
    with held.watched():
        for _ in range(PASSES):
            handle(input_ids=ids)
    return {
        "base": base.anon,
        "experts": params * setting.dtype.itemsize,
        "attaching": adapted.anon,
        "kept": kept,
        "passes": kept + held.anon,
        "base bound": base.bound,
        "passes bound": kept + held.bound,
    }


def _once(library: str, model: Any, ids: Any) -> None:
    """A pass with one expert, and one without."""
    import adaptlib

    opened = adaptlib.Library.open(library)
    name = next(iter(opened))
    few = {name: opened[name]}
    with adaptlib.attach(model, few, adaptlib.Arrow.fit(few)) as routed:
        routed(input_ids=ids)
    model(input_ids=ids)


def fresh(what: str, library: Path, tok: int, threads: int, setting: "Setting") -> dict[str, float]:
    """`attach` or `memory` in a process of its own."""
    sizes = {name: size for name, size in vars(setting).items() if isinstance(size, int)}
    command = [sys.executable, __file__, what, library, str(tok), str(threads), json.dumps(sizes)]
    environment = dict(os.environ) | (MALLOC if what == "memory" else {})
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{what} in a process of its own failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def forget(library: Path) -> None:
    """Drop the library's files from the system's cache of pages."""
    for path in library.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


def main() -> None:
    import torch
    from routing_sides import Setting

    import adaptlib

    for name in ("Library", "Arrow", "attach"):  # imported before anything is measured
        getattr(adaptlib, name)
    what, library, tok, threads, sizes = sys.argv[1:]
    torch.set_num_threads(int(threads))
    with torch.inference_mode():
        call = {"attach": attach, "memory": memory}[what]
        print(json.dumps(call(library, int(tok), Setting(**json.loads(sizes)))))


if __name__ == "__main__":
    main()
