"""Which base model an expert belongs to, and whether a given model is that one."""

import difflib
import errno
import hashlib
import json
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from adaptlib.errors import (
    AdaptlibError,
    BaseMismatchError,
    BaseWarning,
    CorruptError,
    NotFoundError,
    RefusedError,
    RemoteError,
)

if TYPE_CHECKING:
    from torch import nn

MAX_CONFIG = 16 * 1024 * 1024  # bytes of config.json
MAX_MODULES = 100_000  # a config can ask for a billion layers
DEMO_BASE = "adaptlib/demo-base"
BUNDLE = Path(__file__).parent.parent / "demo" / "bundle"  # the model behind DEMO_BASE is in base/

# transformers replaces a method of its class while it loads a model. Two loads at once, in threads,
# can leave it replaced, and every model loaded later without its tied head.
_LOADING = threading.Lock()

# What makes two configs the same architecture. Other keys come and go with transformers' versions.
_CONFIG_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


@dataclass(frozen=True)
class BaseModel:
    """A base model as experts see it. `modules` maps each Linear or Conv1D to (d_out, d_in);
    `digest` is over the config's sizes and these shapes, not over the weights."""

    id: str
    revision: str | None
    digest: str
    modules: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, model: "nn.Module") -> "BaseModel":
        """Describe a loaded transformers model."""
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        modules: dict[str, tuple[int, int]] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                modules[name] = (module.out_features, module.in_features)
            elif isinstance(module, Conv1D):
                modules[name] = (module.weight.shape[1], module.weight.shape[0])
        config: Any = model.config
        text = config.get_text_config()
        sizes = {key: getattr(text, key, None) for key in _CONFIG_KEYS}
        document = {"config": sizes, "modules": modules}
        canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
        digest = "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
        revision = getattr(config, "_commit_hash", None)
        name = base_id(getattr(config, "_name_or_path", ""))
        return cls(name, revision, digest, MappingProxyType(modules))

    @property
    def label(self) -> str:
        """Its id, or what to call a model that was built in memory and has none."""
        return self.id or "this model"

    def pin(self) -> dict[str, Any]:
        """What a card keeps under `base`."""
        return {"id": self.id, "revision": self.revision, "digest": self.digest}


def base_id(name_or_path: str) -> str:
    """The id by which a model is named: the bundled model's id instead of its path, and a path
    that depends on where one is (`./model`, `~/model`) in full."""
    path = Path(os.path.expanduser(name_or_path))  # noqa: PTH111 -- which raises on `~nobody`
    if not _is(path.is_dir):
        return name_or_path
    if path.resolve() == (BUNDLE / "base").resolve():
        return DEMO_BASE
    return os.path.abspath(path) if name_or_path.startswith((".", "~")) else name_or_path  # noqa: PTH100


def locate(name_or_path: str, *, revision: str | None = None) -> Path | None:
    """The local directory of a base model with its config.json, or None. Never goes online."""
    if name_or_path == DEMO_BASE:
        return BUNDLE / "base"
    path = Path(os.path.expanduser(name_or_path))  # noqa: PTH111
    if _is((path / "config.json").is_file):
        return path
    if not name_or_path or _is_path(name_or_path):
        return None
    from huggingface_hub.constants import HF_HUB_CACHE

    # The hub's client takes as long to import as adding a small adapter does.
    if not _is(Path(HF_HUB_CACHE, "models--" + name_or_path.replace("/", "--")).is_dir):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name_or_path, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def describe(directory: Path, name: str, *, cache: Path | None = None) -> BaseModel:
    """The base model in `directory`, from its config alone: shapes come from a model without
    weights. With `cache`, a directory, the answer is kept there by the digest of the config and
    transformers' version, which decides the names of modules."""
    from adaptlib.experts.tensors import open_regular

    try:
        with open_regular(directory / "config.json") as file:
            config_bytes = file.read(MAX_CONFIG + 1)
    except NotFoundError:
        raise NotFoundError(f"{directory} holds no base model: no config.json") from None
    if len(config_bytes) > MAX_CONFIG:
        raise RefusedError(f"{directory} has a config.json of over {MAX_CONFIG:,} bytes")
    from importlib.metadata import version  # takes longer than most of what imports this

    made_by = f"transformers {version('transformers')}\n".encode()
    key = hashlib.sha256(made_by + config_bytes).hexdigest()
    kept = cache / f"{key}.json" if cache else None
    if kept and kept.is_file():  # opening a pipe would wait for ever
        odd = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
        with suppress(OSError, *odd):  # made again
            seen = json.loads(_checked(kept.read_text()))
            modules = {n: (int(o), int(i)) for n, (o, i) in seen["modules"].items()}
            return BaseModel(name, _revision(directory), seen["digest"], MappingProxyType(modules))
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"), _few_modules():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a config can be wrong in every way
        raise RefusedError(
            f"{directory} is not a causal language model that transformers can build: "
            f"{str(error)[:300]}"
        ) from error
    base = BaseModel.of(model)
    if kept:
        text = json.dumps({"digest": base.digest, "modules": dict(base.modules)})
        _keep(kept, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
    return BaseModel(name, _revision(directory), base.digest, base.modules)


def _checked(text: str) -> str:
    """What follows the first line, which is its SHA-256. ValueError where it is not: a flipped bit
    would be kept in the card of every expert that is added."""
    said, _, rest = text.partition("\n")
    if said != hashlib.sha256(rest.encode()).hexdigest():
        raise ValueError("damaged")
    return rest


@contextmanager
def _few_modules() -> Iterator[None]:
    """Inside, a model of more than MAX_MODULES is not built to its end."""
    from torch.nn.modules.module import register_module_module_registration_hook

    left = iter(range(MAX_MODULES))

    def count(*_: object) -> None:
        if next(left, None) is None:
            raise RefusedError(f"it has more than {MAX_MODULES:,} modules")

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _no_pickle(name: str) -> Iterator[None]:
    """Inside, unpickling weights is a RefusedError: transformers does so for what an index of
    shards names, `use_safetensors` or not. Holds for all threads, so `_LOADING` is held."""
    import torch

    def refuse(*_: object, **__: object) -> Any:
        raise RefusedError(
            f"{name} has a pickle among its weights; loading it can run code",
            hint="save the base model as safetensors (transformers: save_pretrained does)",
        )

    before = torch.load
    torch.load = refuse
    try:
        yield
    finally:
        torch.load = before


def _check_weights(where: Path) -> None:
    """RefusedError for a base model with its weights in pickles alone, or with an adapter beside
    them: transformers would put that on the model, unpickle it, and import what its config says."""
    if (where / "adapter_config.json").exists():
        raise RefusedError(
            f"{where} holds an adapter beside the base model, which would be loaded with it",
            hint=f"adaptlib add {where}, and give the base model without it",
        )
    names = sorted(path.name for path in where.iterdir())
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise RefusedError(
            f"{where} has its weights in {pickles[0]} only, a pickle; loading it can run code",
            hint="save the base model as safetensors (transformers: save_pretrained does)",
        )


def _keep(path: Path, text: str) -> None:
    """Write a file whole, or not at all where it cannot be: it can be made again."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text)
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)


def load(name_or_path: str, *, revision: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a base model, in evaluation mode, on the GPU where there is one.

    Takes the bundled model's id, a directory, or an id on the hub. On the CPU a model of less than
    a billion parameters is float32, since half precision is slower there. NotFoundError where
    there is no such model, RemoteError where the hub cannot be reached.
    """
    where = locate(name_or_path, revision=revision)
    if where is None and (not name_or_path or _is_path(name_or_path)):
        raise NotFoundError(
            f"no base model at {name_or_path}", hint="say where it is: --model DIRECTORY"
        )
    if where is None:
        from adaptlib.experts.hub import check_model

        try:
            check_model(name_or_path, revision=revision)
        except (RemoteError, NotFoundError) as error:
            raise type(error)(
                f"{error}; and it is not on this machine", hint="say where it is: --model DIRECTORY"
            ) from error
    else:
        _check_weights(where)
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a bar for each shard is no news
    source = str(where) if where is not None else name_or_path
    local = where is not None
    try:
        with _LOADING, _no_pickle(f"the base model {name_or_path}"):
            tokenizer = AutoTokenizer.from_pretrained(
                source, revision=revision, local_files_only=local, trust_remote_code=False
            )
            model = AutoModelForCausalLM.from_pretrained(
                source,
                revision=revision,
                dtype="auto",
                local_files_only=local,
                use_safetensors=True,  # never a pickle
                trust_remote_code=False,
            )
    except OSError as error:
        if local:
            raise NotFoundError(f"the base model at {source} is incomplete: {error}") from error
        raise RemoteError(
            f"the base model {name_or_path} is not on this machine and the hub did not give it: "
            f"{str(error).splitlines()[0]}",
            hint="say where it is: --model DIRECTORY",
        ) from error
    except SafetensorError as error:
        raise CorruptError(f"the weights of the base model at {source}: {error}") from error
    except AdaptlibError:
        raise
    except Exception as error:  # a config can be wrong in every way
        raise RefusedError(
            f"transformers cannot load {name_or_path} as a causal language model: "
            f"{str(error)[:500]}"
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()
    if torch.cuda.is_available():
        model = model.to(torch.device("cuda"))  # pyright: ignore[reportArgumentType]
    elif model.num_parameters() < 1e9:
        model = model.float()
    return model.eval(), tokenizer


def _is_path(name: str) -> bool:
    """Whether a model's name can only be a path, never an id on the hub."""
    return name.count("/") > 1 or name.startswith((".", "/", "~")) or Path(name).is_absolute()


def _is(question: Callable[[], bool]) -> bool:
    """`path.is_file()` and the like, where the path comes from outside: too long a name, or a
    place where one may not look, is no. A disk that fails is not."""
    try:
        return question()
    except ValueError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM):
            raise
        return False


def _revision(directory: Path) -> str | None:
    """The commit, where the directory is a snapshot in the hub's cache."""
    return directory.name if directory.parent.name == "snapshots" else None


def check_fit(
    name: str, shapes: Mapping[str, tuple[int, int]], pin: Mapping[str, Any], base: BaseModel
) -> None:
    """Refuse an expert that does not belong on `base`.

    `shapes` is (d_out, d_in) by module, `pin` the card's `base`. Raises BaseMismatchError where a
    module is absent, a shape differs or the pinned digest is another; warns (BaseWarning) where
    only the id differs, since the same architecture may hold other weights.
    """
    absent = [module for module in shapes if module not in base.modules]
    if absent:
        close = difflib.get_close_matches(absent[0], base.modules, n=1, cutoff=0.3)
        closest = f"; the closest module there is {close[0]}" if close else ""
        found = len(shapes) - len(absent)
        how = f"matches only {found} of its {len(shapes)} modules in {base.label}"
        if not found:
            how = f"matches no module of {base.label}"
        raise BaseMismatchError(
            f"{name} {how}: no {absent[0]}{closest}",
            hint=f"it was trained on {pin.get('id') or 'another model'}; use that base model",
        )
    for module, shape in shapes.items():
        if base.modules[module] != shape:
            raise BaseMismatchError(
                f"{name} does not fit {base.label}: {module} has shape {base.modules[module]} "
                f"there, the expert has {shape}",
                hint=f"it was trained on {pin.get('id') or 'another model'}; use that base model",
            )
    if pin.get("digest") and pin["digest"] != base.digest:
        raise BaseMismatchError(
            f"{name} is pinned to another base model: {pin.get('id')} {pin['digest'][:19]}, "
            f"this is {base.label} {base.digest[:19]}",
            hint="use the base model it was trained on, or add it again with --base",
        )
    if pin.get("revision") and base.revision and pin["revision"] != base.revision:
        warnings.warn(
            f"{name} was trained on revision {pin['revision'][:12]} of {pin.get('id')}; "
            f"this is revision {base.revision[:12]}",
            BaseWarning,
            stacklevel=2,
        )
    if base.id and pin.get("id") and _last(pin["id"]) != _last(base.id):
        warnings.warn(
            f"{name} was trained on {pin['id']}; this model is {base.id}. The shapes agree, "
            "the weights may not",
            BaseWarning,
            stacklevel=2,
        )


def _last(name: str) -> str:
    """`org/Model` and a local copy in `/models/model/` are one name."""
    return name.rstrip("/").rsplit("/", 1)[-1].lower()
