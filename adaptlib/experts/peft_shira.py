"""SHiRA (Bhardwaj et al. 2024, arXiv:2406.13175) as PEFT keeps it, and as sparse deltas.

PEFT keeps for each module `shira_weight` (n,) and `shira_indices` (2, n), rows then columns, with
n = r·(d_in + d_out) for one r of the whole adapter; its loader takes nothing else. The shape of the
module is not in the file.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from adaptlib.errors import CorruptError, RefusedError
from adaptlib.experts.codec import Module
from adaptlib.experts.peft_config import MASK, SHiRAConfig
from adaptlib.experts.tensors import FLOATS, RawTensor, cut

Parts = dict[str, RawTensor]
ShapeOf = Callable[[str], tuple[int, int] | None]


def read_modules(
    source: str, parts: Mapping[str, Parts], config: SHiRAConfig, shape_of: ShapeOf
) -> tuple[dict[str, Module], dict[str, RawTensor], list[str]]:
    """Modules, tensors and notes on what was changed.

    `shape_of` is asked for (d_out, d_in) only where the file does not prove it: the sum of the
    sides is n/r, and the last row and column that are used bound each side from below. Raises
    CorruptError, and RefusedError where nobody knows the shape.
    """
    modules: dict[str, Module] = {}
    tensors: dict[str, RawTensor] = {}
    changes: Counter[str] = Counter()
    for name, pair in parts.items():
        modules[name], index, values, notes = _read_module(source, name, pair, config, shape_of)
        tensors[f"{name}.index"], tensors[f"{name}.values"] = index, values
        changes.update(notes)
    return modules, tensors, [f"{what} ({count} modules)" for what, count in changes.items()]


def _read_module(
    source: str, name: str, parts: Parts, config: SHiRAConfig, shape_of: ShapeOf
) -> tuple[Module, RawTensor, RawTensor, list[str]]:
    """A module's entry, its index and values, and notes."""
    weight, indices = parts["shira_weight"], parts["shira_indices"]
    n = weight.shape[0] if len(weight.shape) == 1 else 0
    if n == 0 or indices.shape != (2, n):
        raise CorruptError(
            f"{source}: {cut(name)} has shira_weight {list(weight.shape)} and shira_indices "
            f"{list(indices.shape)}; want [n] and [2, n], n over 0"
        )
    if weight.dtype not in FLOATS:
        raise CorruptError(
            f"{source}: {cut(name)} has a shira_weight of {weight.dtype}; want floats"
        )
    rows, columns = _integers(source, name, indices)
    notes = [] if indices.dtype in ("I32", "I64") else ["positions kept as floats are now integers"]
    least = int(rows.max()) + 1, int(columns.max()) + 1
    total, rest = divmod(n, config.r)
    if rest or sum(least) > total:
        raise CorruptError(
            f"{source}: {cut(name)} keeps {n} entries, up to row {least[0] - 1} and column "
            f"{least[1] - 1}; with r {config.r} it must be r·(d_in + d_out)"
        )
    shape = least if sum(least) == total else shape_of(name)
    if shape is None:
        raise RefusedError(
            f"{source}: the shape of {cut(name)} is not in the file (its sides sum to {total}), "
            "and the base model is not on this machine",
            hint="give a base model that is here: --base PATH",
        )
    if sum(shape) != total or shape[0] < least[0] or shape[1] < least[1]:
        raise CorruptError(
            f"{source}: {cut(name)} has the shape {shape} in the base model; its {n} entries are "
            f"for sides that sum to {total}, of {least} at least"
        )
    index, values = rows * shape[1] + columns, weight.numpy()
    if (np.diff(index) <= 0).any():
        order = np.argsort(index, kind="stable")
        index, values = index[order], values[order]
        notes.append("positions are now sorted")
        if (np.diff(index) == 0).any():
            raise CorruptError(f"{source}: {cut(name)} has a position twice in its shira_indices")
    if config.mask_type == MASK:
        kept = _nonzero(weight.dtype, values)
        index, values = index[kept], values[kept]
    return Module(shape, block=1), _positions(index, shape), _raw(weight.dtype, values), notes


def write_modules(
    modules: Mapping[str, Module], tensors: Mapping[str, RawTensor], *, r: int | None = None
) -> tuple[int, Iterator[tuple[str, Parts]], list[str]]:
    """The r of an adapter that holds these modules, the two tensors of each, and notes.

    PEFT has one r for all modules, so the others are padded with zeros at unused positions; blocks
    are written entry by entry. `r` is given where the entries are known to fit it. RefusedError
    where no r fits.
    """
    entries = {name: _entries(name, module, tensors) for name, module in modules.items()}
    size = _common_r(modules, {name: index for name, (index, _, _) in entries.items()}, r)

    def write() -> Iterator[tuple[str, Parts]]:
        for name, (index, values, dtype) in entries.items():
            d_out, d_in = modules[name].shape
            index, values = _pad(index, values, (d_out, d_in), size * (d_out + d_in))
            places = np.stack([index // d_in, index % d_in]).astype("<i4")
            yield name, {"shira_weight": _raw(dtype, values), "shira_indices": _raw("I32", places)}

    notes: list[str] = []
    if any(module.block != 1 for module in modules.values()):
        notes.append("blocks are written entry by entry: SHiRA has no blocks")
    kept = sum(len(index) for index, _, _ in entries.values())
    if padding := size * sum(sum(module.shape) for module in modules.values()) - kept:
        notes.append(f"{padding:,} zeros added: SHiRA keeps r·(d_in + d_out) entries, r {size}")
    return size, write(), notes


def _common_r(
    modules: Mapping[str, Module], indices: Mapping[str, np.ndarray], given: int | None
) -> int:
    if given is not None:
        return given
    needs = {name: max(1, -(-len(i) // sum(modules[name].shape))) for name, i in indices.items()}
    limits = {n: m.shape[0] * m.shape[1] // sum(m.shape) for n, m in modules.items()}
    most, least = max(needs, key=needs.__getitem__), min(limits, key=limits.__getitem__)
    r, top = needs[most], limits[least]
    if r > top:
        raise RefusedError(
            f"PEFT cannot hold this sparse expert: SHiRA keeps r·(d_in + d_out) entries of every "
            f"module, with one r. {most} {modules[most].shape} keeps {len(indices[most]):,} and "
            f"needs r {r}; {least} {modules[least].shape} allows r {top} at most",
            hint="export it as an adaptlib directory: --format adaptlib",
        )
    # Room for one more entry lets the last row and column be in use, which proves the shape when
    # the file is read again without the base model.
    tight = any(
        len(index) == r * sum(modules[name].shape) and not _proves(index, modules[name].shape)
        for name, index in indices.items()
    )
    return r + (tight and r < top)


def _integers(source: str, name: str, indices: RawTensor) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns as int64. PEFT writes int32, and float32 on Windows."""
    if indices.dtype not in ("I32", "I64", "F32"):
        raise CorruptError(f"{source}: {cut(name)} has shira_indices of {indices.dtype}; want I32")
    raw = indices.numpy()
    bound = 1 << 24 if indices.dtype == "F32" else 1 << 31  # float32 counts exactly up to 2^24
    whole = bool(np.isfinite(raw).all()) and bool(((raw >= 0) & (raw < bound)).all())
    if not whole or (indices.dtype == "F32" and (raw != np.floor(raw)).any()):
        raise CorruptError(
            f"{source}: {cut(name)} has a position in shira_indices that cannot be one"
        )
    rows, columns = raw.astype(np.int64)
    return rows, columns


def _entries(
    name: str, module: Module, tensors: Mapping[str, RawTensor]
) -> tuple[np.ndarray, np.ndarray, str]:
    """Sorted flat positions, values and their dtype, entry by entry."""
    raw = tensors[f"{name}.values"]
    index = tensors[f"{name}.index"].numpy().astype(np.int64)
    block, d_in = module.block or 1, module.shape[1]
    if block == 1:
        return index, raw.numpy(), raw.dtype
    across, inside = d_in // block, np.arange(block)
    rows = (index // across * block)[:, None, None] + inside[None, :, None]
    columns = (index % across * block)[:, None, None] + inside[None, None, :]
    flat = (rows * d_in + columns).reshape(-1)
    order = np.argsort(flat)
    return flat[order], raw.numpy().reshape(-1)[order], raw.dtype


def _proves(index: np.ndarray, shape: tuple[int, int]) -> bool:
    """The last row and the last column are in use."""
    if not index.size:
        return False
    return bool(index[-1] // shape[1] == shape[0] - 1 and (index % shape[1]).max() == shape[1] - 1)


def _pad(
    index: np.ndarray, values: np.ndarray, shape: tuple[int, int], size: int
) -> tuple[np.ndarray, np.ndarray]:
    """`size` entries: zeros at the last position, where that proves the shape, and the first
    unused ones."""
    missing = size - len(index)
    if missing == 0:
        return index, values
    added = np.empty(0, np.int64)
    if not _proves(index, shape):
        added = np.array([shape[0] * shape[1] - 1], np.int64)
    free = np.setdiff1d(np.arange(size + 1), np.concatenate([index, added]), assume_unique=True)
    added = np.concatenate([added, free[: missing - len(added)]])
    every = np.concatenate([index, added])
    order = np.argsort(every)
    return every[order], np.concatenate([values, np.zeros(missing, values.dtype)])[order]


def _nonzero(dtype: str, values: np.ndarray) -> np.ndarray:
    return (values & 0x7FFF) != 0 if dtype == "BF16" else values != 0


def _positions(index: np.ndarray, shape: tuple[int, int]) -> RawTensor:
    small = shape[0] * shape[1] < 2**31
    return _raw("I32" if small else "I64", index.astype("<i4" if small else "<i8"))


def _raw(dtype: str, array: np.ndarray) -> RawTensor:
    if not array.size:  # memoryview cannot cast an array without items
        return RawTensor(dtype, array.shape, memoryview(b""))
    return RawTensor(dtype, array.shape, np.ascontiguousarray(array).data.cast("B"))
