"""Pickles in every dress. Each would write a file, `ran`, if it were ever loaded."""

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.hostile.corpus import Entry
from tests.hostile.make import adapter
from tests.hostile.watch import MARK, Payload

REFUSED, USAGE, ABSENT, CORRUPT, ACCEPTED = 7, 2, 3, 4, 0


def loaded(folder: Path, protocol: int = 4) -> bytes:
    """A pickle that writes `ran` beside the folder when it is loaded."""
    return pickle.dumps(Payload(folder.parent / "ran"), protocol)


def zipped(folder: Path, name: str = "archive/data.pkl") -> bytes:
    """What torch.save writes: a zip with a pickle in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, loaded(folder, 2))
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def numpy_object(folder: Path) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Payload(folder.parent / "ran")], dtype=object), allow_pickle=True)
    return file.getvalue()


def _alone(name: str, content: Callable[[Path], bytes]) -> Callable[[Path], None]:
    """An adapter's config with the pickle as its only weights."""

    def write(folder: Path) -> None:
        adapter(folder)
        (folder / "adapter_model.safetensors").unlink()
        (folder / name).write_bytes(content(folder))

    return write


def _beside(name: str, content: Callable[[Path], bytes]) -> Callable[[Path], None]:
    """A good adapter, and the pickle beside it."""

    def write(folder: Path) -> None:
        adapter(folder)
        (folder / name).write_bytes(content(folder))

    return write


def _itself(name: str, content: Callable[[Path], bytes]) -> Callable[[Path], Path]:
    """The pickle as what is added."""

    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content(folder))
        return folder / name

    return write


def _tar(folder: Path) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("../../ran", "adapter_model.bin"):
            data = loaded(folder)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def _python(folder: Path) -> bytes:
    return f"import os; os.system('echo {MARK} > {folder.parent / 'ran'}')\n".encode()


def _trainer(folder: Path) -> None:
    adapter(folder)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (folder / name).write_bytes(zipped(folder))
    for name in (f"{MARK}.py", "modeling.py", "conftest.py", "sitecustomize.py"):
        (folder / name).write_bytes(_python(folder))
    (folder / "config.json").write_text(
        json.dumps({"auto_map": {"AutoConfig": f"{MARK}.Config"}, "model_type": MARK})
    )


def _shelved(folder: Path) -> None:
    adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    for suffix in (".db", ".dat", ".dir", ".bak"):
        (folder / f"adapter_model{suffix}").write_bytes(loaded(folder))


def _link(folder: Path) -> None:
    adapter(folder)
    (folder / "hidden.bin").write_bytes(zipped(folder))
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to(folder / "hidden.bin")


ONLY = (REFUSED, ABSENT)
PICKLES: dict[str, Entry] = {
    "adapter_model.bin": Entry(_alone("adapter_model.bin", zipped), (REFUSED,)),
    "adapter_model.bin-plain": Entry(_alone("adapter_model.bin", loaded), (REFUSED,)),
    "adapter_model.pt": Entry(_alone("adapter_model.pt", zipped), (REFUSED,)),
    "adapter_model.pth": Entry(_alone("adapter_model.pth", loaded), (REFUSED,)),
    "pytorch_model.bin": Entry(_alone("pytorch_model.bin", zipped), (REFUSED,)),
    "adapter_model.ckpt": Entry(_alone("adapter_model.ckpt", loaded), ONLY),
    "adapter_model.joblib": Entry(_alone("adapter_model.joblib", loaded), ONLY),
    "adapter_model.npy": Entry(_alone("adapter_model.npy", numpy_object), ONLY),
    "adapter_model.npz": Entry(
        _alone("adapter_model.npz", lambda folder: zipped(folder, "arr_0.npy")), ONLY
    ),
    "adapter_model.pkl.gz": Entry(
        _alone("adapter_model.pkl.gz", lambda folder: gzip.compress(loaded(folder))), ONLY
    ),
    "adapter_model.tar": Entry(_alone("adapter_model.tar", _tar), ONLY),
    "a-shelve": Entry(_shelved, ONLY),
    **{
        f"called-safetensors-protocol-{protocol}": Entry(
            _alone(
                "adapter_model.safetensors",
                lambda folder, protocol=protocol: loaded(folder, protocol),
            ),
            (REFUSED, CORRUPT),
        )
        for protocol in range(6)
    },
    "called-safetensors-torch": Entry(_alone("adapter_model.safetensors", zipped), (REFUSED,)),
    "called-safetensors-numpy": Entry(
        _alone("adapter_model.safetensors", numpy_object), (REFUSED, CORRUPT)
    ),
    "called-safetensors-gzip": Entry(
        _alone("adapter_model.safetensors", lambda folder: gzip.compress(loaded(folder))),
        (REFUSED, CORRUPT),
    ),
    "called-safetensors-tar": Entry(_alone("adapter_model.safetensors", _tar), (REFUSED, CORRUPT)),
    "called-safetensors-link": Entry(_link, (REFUSED,)),
    "called-config": Entry(_alone("adapter_config.json", loaded), (CORRUPT, ABSENT)),
    "called-manifest": Entry(_beside("expert.json", loaded), (CORRUPT,)),
    "added-bin": Entry(_itself("weights.bin", zipped), (REFUSED,)),
    "added-pkl": Entry(_itself("expert.pkl", loaded), (REFUSED,)),
    "added-npz": Entry(_itself("expert.npz", numpy_object), (USAGE, REFUSED)),
    "beside-good-weights": Entry(_beside("adapter_model.bin", zipped), (ACCEPTED,)),
    "trainer-state": Entry(_trainer, (ACCEPTED,)),
}
