"""What is no expert is refused with the reason, in the class that the command line turns into an
exit code. Files are made by hand: PEFT would not write most of them."""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from adaptlib.errors import AdaptlibError, ConflictError, CorruptError, NotFoundError, RefusedError
from adaptlib.experts.codec import Packed
from adaptlib.experts.peft import read_peft_packed, write_peft

PREFIX = "base_model.model."
M = "model.layers.0.self_attn.q_proj"
A, B = f"{PREFIX}{M}.lora_A.weight", f"{PREFIX}{M}.lora_B.weight"
LORA: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": "org/base",
    "r": 2,
    "lora_alpha": 4,
}
SHIRA: dict[str, Any] = {"peft_type": "SHIRA", "base_model_name_or_path": "org/base", "r": 1}


def pair() -> dict[str, np.ndarray]:
    return {A: np.ones((2, 6), np.float32), B: np.ones((4, 2), np.float32)}


def shira_pair() -> dict[str, np.ndarray]:
    """Ten entries of a (4, 6) matrix, r 1, the last row and column among them."""
    flat = np.array([0, 1, 2, 3, 7, 9, 12, 17, 20, 23])
    places = np.stack([flat // 6, flat % 6]).astype(np.int32)
    name = f"{PREFIX}{M}."
    return {
        f"{name}shira_weight": np.arange(1, 11, dtype=np.float32),
        f"{name}shira_indices": places,
    }


def write(directory: Path, config: Any, tensors: dict[str, np.ndarray] | bytes | None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (directory / "adapter_config.json").write_text(text)
    if tensors is not None:
        data = tensors if isinstance(tensors, bytes) else save(tensors)
        (directory / "adapter_model.safetensors").write_bytes(data)
    return directory


def refused(directory: Path, kind: type[AdaptlibError], match: str) -> AdaptlibError:
    before = sorted(directory.rglob("*"))
    with pytest.raises(kind, match=match) as caught:
        read_peft_packed(directory)
    assert type(caught.value) is kind
    assert sorted(directory.rglob("*")) == before
    return caught.value


# -- names ------------------------------------------------------------------------------------


def test_the_plain_file_is_read(tmp_path):
    packed = read_peft_packed(write(tmp_path, LORA, pair()))
    assert (packed.kind, packed.base, packed.shapes) == ("lora", "org/base", {M: (4, 6)})
    assert packed.modules[M].scale == 2.0
    assert packed.card["peft"]["config"] == LORA


@pytest.mark.parametrize(
    ("first", "second", "note"),
    [
        (
            f"{PREFIX}{M}.lora_A.default.weight",
            f"{PREFIX}{M}.lora_B.default.weight",
            "adapter's name",
        ),
        (f"{M}.lora_A.weight", f"{M}.lora_B.weight", "base_model.model. in front is missing (2"),
        (f"module.{A}", f"module.{B}", "module. in front is taken away"),
        (f"{PREFIX}_orig_mod.{M}.lora_A.weight", B, "_orig_mod is taken out (1 "),
        (f"{PREFIX}{PREFIX}{M}.lora_A.weight", B, "doubled"),
        (f"{PREFIX}{M}.base_layer.lora_A.weight", B, "base_layer is taken out"),
    ],
)
def test_other_layouts_are_read_and_said(first, second, note, tmp_path):
    a, b = pair().values()
    packed = read_peft_packed(write(tmp_path / "in", LORA, {first: a, second: b}))
    assert list(packed.modules) == [M]
    assert len([text for text in packed.card["peft"]["migrated"] if note in text]) == 1
    write_peft(packed, tmp_path / "out")
    assert read_peft_packed(tmp_path / "out").tensors.keys() == packed.tensors.keys()
    assert "migrated" not in read_peft_packed(tmp_path / "out").card["peft"]


@pytest.mark.parametrize(
    ("key", "why"),
    [
        (f"{PREFIX}{M}.lora_magnitude_vector", "DoRA"),
        (f"{PREFIX}model.embed_tokens.lora_embedding_A", "embedding"),
        (f"{PREFIX}model.layers.0.mlp.experts.base_layer.lora_A.weight", "mixture-of-experts"),
        (f"{PREFIX}{M}.lora_B.bias", "bias"),
        (f"{PREFIX}{M}.base_layer.bias", "bias"),
        (f"{PREFIX}score.modules_to_save.weight", "whole module"),
        (
            f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta",
            "rows of the embedding",
        ),
        (f"{PREFIX}lm_head.weight", "whole weight"),
        (f"{PREFIX}model.embed_tokens.base_layer.weight", "whole weight"),
        ("prompt_embeddings", "prompt tuning"),
        (f"{PREFIX}{M}.ia3_l", "IA3"),
        (f"{PREFIX}{M}.lora_E", "unknown in a LoRA file"),
        (f"{PREFIX}{M}.shira_weight", "unknown in a LoRA file"),
        (f"{PREFIX}{M}.lora_A.one.two.weight", "unknown in a LoRA file"),
        (f"{PREFIX}../../etc/passwd.lora_A.weight", "no module has such a name"),
        (f"{PREFIX}a..b.lora_A.weight", "no module has such a name"),
        (f"{PREFIX}a\\b.lora_A.weight", "no module has such a name"),
    ],
)
def test_a_tensor_too_many_is_named(key, why, tmp_path):
    error = refused(
        write(tmp_path, LORA, pair() | {key: np.ones((2, 2), np.float32)}), RefusedError, why
    )
    assert key in str(error) or repr(key) in str(error)


def test_two_tensors_of_one_place_and_two_adapters_in_one_file(tmp_path):
    twice = pair() | {f"{M}.lora_A.weight": np.zeros((2, 6), np.float32)}
    refused(write(tmp_path / "a", LORA, twice), RefusedError, "are both lora_A of")
    a, b = pair().values()
    named = {f"{PREFIX}{M}.lora_A.x.weight": a, f"{PREFIX}{M}.lora_B.y.weight": b}
    refused(write(tmp_path / "b", LORA, named), RefusedError, "holds 2 adapters: x, y")


# -- config -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        ({"peft_type": "IA3"}, RefusedError, "peft_type 'IA3'; LORA and SHIRA can be read"),
        ({"peft_type": "PROMPT_TUNING"}, RefusedError, "PROMPT_TUNING"),
        ({"peft_type": "ADALORA"}, RefusedError, "ADALORA"),
        ({"peft_type": None}, CorruptError, r"\$\.peft_type"),
        ({"use_dora": True}, RefusedError, "use_dora: DoRA"),
        ({"use_qalora": True}, RefusedError, "use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, RefusedError, "use_bdlora"),
        ({"alora_invocation_tokens": [1]}, RefusedError, "aLoRA acts only after"),
        ({"arrow_config": {"top_k": 3}}, RefusedError, "arrow_config"),
        ({"velora_config": {}, "kasa_config": {"x": 1}}, RefusedError, "kasa_config"),
        ({"monteclora_config": {"x": 1}}, RefusedError, "monteclora_config"),
        ({"modules_to_save": ["score"]}, RefusedError, "modules_to_save: whole modules"),
        ({"trainable_token_indices": [0]}, RefusedError, "trainable_token_indices"),
        (
            {"target_parameters": ["experts.w"]},
            RefusedError,
            "target_parameters.*mixture-of-experts",
        ),
        ({"layer_replication": [[0, 2]]}, RefusedError, "layer_replication"),
        ({"lora_bias": True}, RefusedError, "lora_bias"),
        ({"bias": "lora_only"}, RefusedError, "bias to 'lora_only'"),
        ({"init_lora_weights": "pissa_niter_4"}, RefusedError, "pissa_niter_4.*changes the base"),
        ({"init_lora_weights": "loftq"}, RefusedError, "loftq"),
        ({"r": "8"}, CorruptError, r"Expected `int`, got `str` - at `\$\.r`"),
        ({"r": 0}, CorruptError, "r is 0"),
        ({"r": 4}, CorruptError, r"lora_A \[2, 6\] and lora_B \[4, 2\].*gives it rank 4"),
        ({"rank_pattern": {"q_proj": 3}}, CorruptError, "gives it rank 3"),
        ({"rank_pattern": {"q_proj": 0}}, CorruptError, r"rank_pattern\['q_proj'\] is 0"),
        ({"rank_pattern": {"q_proj": 1.5}}, CorruptError, r"rank_pattern"),
        ({"rank_pattern": {"(": 2}}, CorruptError, "no regular expression"),
        ({"alpha_pattern": {"q_proj": True}}, CorruptError, "alpha_pattern"),
        ({"lora_alpha": None}, CorruptError, r"lora_alpha"),
        ({"use_rslora": "yes"}, CorruptError, r"use_rslora"),
        ({"base_model_name_or_path": None}, RefusedError, "names no base model"),
        ({"anything": "\ud800"}, RefusedError, "cannot carry exactly"),
    ],
)
def test_a_config_is_refused_by_field(change, kind, match, tmp_path):
    error = refused(write(tmp_path, LORA | change, pair()), kind, match)
    assert "adapter_config.json" in str(error)


@pytest.mark.parametrize(
    ("text", "kind", "match"),
    [
        ("{", CorruptError, "not JSON"),
        ("[]", CorruptError, "holds a list, want an object"),
        ('{"peft_type": "LORA", "r": 8}', CorruptError, "lora_alpha"),
        ('{"peft_type": "LORA", "r": 8, "r": 9}', RefusedError, "the key 'r' twice"),
        (json.dumps(LORA).replace("4", "NaN"), CorruptError, "NaN"),
        (json.dumps(LORA).replace("4", "1e999"), RefusedError, "cannot carry exactly"),
        ("[" * 100_000, CorruptError, "not JSON"),
    ],
)
def test_a_config_that_is_no_document(text, kind, match, tmp_path):
    refused(write(tmp_path, text, pair()), kind, match)


def test_an_enormous_config_is_not_read(tmp_path):
    directory = write(tmp_path, LORA, pair())
    with (directory / "adapter_config.json").open("r+b") as file:
        file.truncate(100 * 1024 * 1024)
    refused(directory, RefusedError, "over 1,048,576 bytes")


def test_fields_that_do_not_matter_are_kept_and_do_nothing(tmp_path):
    extra = {
        "auto_mapping": {"parent_library": "os", "base_model_class": "system"},
        "megatron_core": "antigravity",
        "from_the_future": [1, None, {"ä": 0.1}],
        "target_modules": ["(a+)+$"],
    }
    packed = read_peft_packed(write(tmp_path / "in", LORA | extra, pair()))
    write_peft(packed, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()) == LORA | extra


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(a|a)*$", "([a-z_.]+)+[0-9]", ".*" * 8, "(a|a)" * 40, "a?" * 60, "x" * 600],
)
def test_a_pattern_that_would_not_end_is_refused_at_once(pattern, tmp_path):
    name = f"{PREFIX}{'a' * 400}"
    tensors = pair() | {f"{name}.lora_{x}.weight": pair()[k] for x, k in (("A", A), ("B", B))}
    started = time.monotonic()
    refused(
        write(tmp_path, LORA | {"alpha_pattern": {pattern: 2}}, tensors), RefusedError, "for ever"
    )
    assert time.monotonic() - started < 2


def test_the_base_is_what_the_caller_says(tmp_path):
    directory = write(tmp_path, LORA | {"revision": "v1"}, pair())
    assert read_peft_packed(directory).card["base"] == {
        "id": "org/base",
        "revision": "v1",
        "digest": None,
    }
    told = read_peft_packed(directory, base="org/other")
    assert told.base == "org/other"
    assert told.card["base"] == {"id": "org/other", "revision": None, "digest": None}
    assert "names the base org/base" in told.card["peft"]["migrated"][0]
    nameless = write(tmp_path / "none", LORA | {"base_model_name_or_path": ""}, pair())
    assert "--base" in (refused(nameless, RefusedError, "no base model").hint or "")
    assert "migrated" not in read_peft_packed(nameless, base="org/base").card["peft"]


def test_the_licence_is_taken_from_the_readme(tmp_path):
    directory = write(tmp_path, LORA, pair())
    assert "licence" not in read_peft_packed(directory).card
    readme = directory / "README.md"
    readme.write_text("---\nbase_model: x\nlicense: apache-2.0\n---\nlicense: no\n")
    assert read_peft_packed(directory).card["licence"] == "apache-2.0"
    readme.write_bytes(b"---\n\xff\xfe\n" + b"license: mit\n")
    assert "licence" not in read_peft_packed(directory).card


# -- weights ----------------------------------------------------------------------------------


def test_what_is_not_there(tmp_path):
    error = refused(
        write(tmp_path / "a", None, pair()), NotFoundError, "has no adapter_config.json"
    )
    assert "adapter_model.safetensors" in str(error)
    refused(write(tmp_path / "b", LORA, None), NotFoundError, "no adapter_model.safetensors")
    with pytest.raises(NotFoundError):
        read_peft_packed(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickle_is_not_opened(name, tmp_path):
    (write(tmp_path, LORA, None) / name).write_bytes(b"PK\x03\x04")
    refused(tmp_path, RefusedError, f"{name} only, a pickle")


def test_a_pickle_under_the_other_name(tmp_path):
    for i, start in enumerate((b"PK\x03\x04", b"\x80\x02}q")):
        refused(write(tmp_path / str(i), LORA, start + b"\0" * 99), RefusedError, "is a pickle")


def lora_shapes(a: tuple[int, ...], b: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {A: np.ones(a, np.float32), B: np.ones(b, np.float32)}


@pytest.mark.parametrize(
    ("tensors", "kind", "match"),
    [
        ({}, CorruptError, "holds no tensor"),
        ({A: np.ones((2, 6), np.float32)}, CorruptError, "has lora_A but no lora_B"),
        (lora_shapes((0, 6), (4, 0)), CorruptError, r"lora_A \[0, 6\] and lora_B \[4, 0\]"),
        (lora_shapes((2, 0), (4, 2)), CorruptError, r"lora_A \[2, 0\]"),
        (lora_shapes((0,), (0,)), CorruptError, r"want \[r, d_in\]"),
        (lora_shapes((2, 6), (4, 3)), CorruptError, "gives it rank 2"),
        (lora_shapes((2, 6, 1, 1), (4, 2, 1, 1)), RefusedError, "is no linear module"),
        ({A: np.ones((2, 6), np.int32), B: pair()[B]}, CorruptError, "I32"),
        ({A: pair()[A] * np.nan, B: pair()[B]}, RefusedError, "NaN or infinity"),
        ({A: pair()[A], B: pair()[B].astype(np.float16) * np.inf}, RefusedError, "NaN or infinity"),
    ],
)
def test_weights_that_are_no_lora(tensors, kind, match, tmp_path):
    refused(write(tmp_path, LORA, tensors), kind, match)


def test_files_that_lie(tmp_path):
    whole = save(pair())
    header = json.dumps({A: {"dtype": "F32", "shape": [2, 6], "data_offsets": [0, 48]}}).encode()
    double = b"{" + header[1:-1] + b"," + header[1:]
    million = (
        b"{"
        + b",".join(
            b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(200_000)
        )
        + b"}"
    )
    million = len(million).to_bytes(8, "little") + million
    double = len(double).to_bytes(8, "little") + double + bytes(48)
    cases = {
        "cut": (whole[:-5], CorruptError, "holds"),
        "cut in the header": (whole[:40], CorruptError, "truncated"),
        "empty": (b"", CorruptError, "not a safetensors file"),
        "longer": (whole + b"x", CorruptError, "holds"),
        "twice": (double, RefusedError, "twice"),
        "lying header": ((10**15).to_bytes(8, "little") + whole, CorruptError, "says its header"),
        "lying shape": (whole.replace(b"[2,6]", b"[9,6]"), CorruptError, "takes 216 bytes"),
        "a million": (million, RefusedError, "more than 65,536"),
    }
    for name, (data, kind, match) in cases.items():
        refused(write(tmp_path / name, LORA, data), kind, match)


def test_links_are_followed_to_regular_files_only(tmp_path):
    outside = write(tmp_path / "outside", LORA, pair())
    inside = tmp_path / "inside"
    inside.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (inside / name).symlink_to(outside / name)
    packed = read_peft_packed(inside)  # so is every snapshot in the hub's cache
    assert packed.shapes == {M: (4, 6)}

    (inside / "adapter_model.safetensors").unlink()
    (inside / "adapter_model.safetensors").symlink_to("/etc/hostname")
    if Path("/etc/hostname").exists():
        refused(inside, CorruptError, "safetensors")
    (inside / "adapter_model.safetensors").unlink()
    os.mkfifo(inside / "adapter_model.safetensors")  # opening it would wait for ever
    refused(inside, NotFoundError, "no adapter_model.safetensors")
    (inside / "adapter_config.json").unlink()
    (inside / "adapter_config.json").symlink_to("/dev/zero")
    refused(inside, RefusedError, "adapter_config.json is not a regular file")


def test_an_export_replaces_a_link_and_leaves_its_target(tmp_path):
    packed = read_peft_packed(write(tmp_path / "in", LORA, pair()))
    target = tmp_path / "precious"
    target.write_text("precious")
    out = tmp_path / "out"
    out.mkdir()
    (out / "adapter_model.safetensors").symlink_to(target)
    write_peft(packed, out)
    assert target.read_text() == "precious"
    assert sorted(p.name for p in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with pytest.raises(ConflictError, match="is a file"):
        write_peft(packed, target)


# -- SHiRA ------------------------------------------------------------------------------------


def shira(tmp_path: Path, config: dict[str, Any] = SHIRA, **parts: np.ndarray) -> Path:
    name = f"{PREFIX}{M}."
    return write(tmp_path, config, shira_pair() | {f"{name}shira_{k}": v for k, v in parts.items()})


def test_a_shira_file_in_any_order_and_integer(tmp_path):
    want = read_peft_packed(shira(tmp_path / "plain"))
    assert want.shapes == {M: (4, 6)}
    assert "migrated" not in want.card["peft"]
    weight, indices = shira_pair().values()
    order = np.random.default_rng(0).permutation(10)
    for name, (w, i), note in (
        ("order", (weight[order], np.ascontiguousarray(indices[:, order])), "sorted"),
        ("int64", (weight, indices.astype(np.int64)), None),
        ("windows", (weight, indices.astype(np.float32)), "floats are now integers"),
    ):
        packed = read_peft_packed(shira(tmp_path / name, weight=w, indices=i))
        assert {n: bytes(t.data) for n, t in packed.tensors.items()} == {
            n: bytes(t.data) for n, t in want.tensors.items()
        }
        assert (note is None) == ("migrated" not in packed.card["peft"])
        assert note is None or note in packed.card["peft"]["migrated"][0]
        write_peft(packed, tmp_path / f"{name} out")
        assert bytes(
            read_peft_packed(tmp_path / f"{name} out").tensors[f"{M}.index"].data
        ) == bytes(want.tensors[f"{M}.index"].data)


F10, I10 = np.ones(10, np.float32), shira_pair()[f"{PREFIX}{M}.shira_indices"]


@pytest.mark.parametrize(
    ("parts", "kind", "match"),
    [
        ({"weight": F10[:9]}, CorruptError, r"shira_weight \[9\] and shira_indices \[2, 10\]"),
        ({"weight": F10[:0], "indices": I10[:, :0]}, CorruptError, "n over 0"),
        ({"weight": F10.astype(np.int32)}, CorruptError, "shira_weight of I32"),
        ({"indices": I10.astype(np.int16)}, CorruptError, "shira_indices of I16"),
        ({"indices": -I10}, CorruptError, "cannot be one"),
        ({"indices": I10.astype(np.float32) + 0.5}, CorruptError, "cannot be one"),
        ({"indices": I10.astype(np.float32) * np.nan}, CorruptError, "cannot be one"),
        ({"indices": np.where(I10 == 1, 0, I10)}, CorruptError, "a position twice"),
        ({"indices": I10 * 3}, CorruptError, "up to row 9 and column 15"),
        ({"indices": np.where(I10 == 5, 4, I10)[:, ::-1].copy()}, RefusedError, "sides sum to 10"),
        ({"weight": F10 * np.nan}, RefusedError, "NaN or infinity"),
        ({"other": F10}, RefusedError, "unknown in a SHiRA file"),
    ],
)
def test_weights_that_are_no_shira(parts, kind, match, tmp_path):
    refused(shira(tmp_path, **parts), kind, match)


def test_shira_configs_and_shapes_that_do_not_fit(tmp_path):
    refused(shira(tmp_path / "r", SHIRA | {"r": 3}), CorruptError, "10 entries.*with r 3")
    refused(
        shira(tmp_path / "m", SHIRA | {"modules_to_save": ["x"]}), RefusedError, "whole modules"
    )
    refused(write(tmp_path / "l", SHIRA, pair()), RefusedError, "unknown in a SHiRA file")
    half = shira_pair()
    half.popitem()
    refused(write(tmp_path / "h", SHIRA, half), CorruptError, "shira_weight but no shira_indices")
    unproven = shira(tmp_path / "s", indices=np.where(I10 == 5, 4, I10)[:, ::-1].copy())
    with pytest.raises(CorruptError, match=r"shape \(5, 6\) in the base model.*sum to 10"):
        read_peft_packed(unproven, shapes={M: (5, 6)})


def test_nothing_is_left_behind_by_an_export_that_fails(tmp_path, monkeypatch):
    packed: Packed = read_peft_packed(write(tmp_path / "in", LORA, pair()))
    out = tmp_path / "out"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_peft(packed, out)
    assert not out.exists()
