"""`export --merged-base`: a whole model, or nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from adaptlib.experts import Library


@pytest.mark.usefixtures("routed_library")
def test_a_whole_model_is_exported(run: Any, tmp_path: Path) -> None:
    import transformers

    done = run("export", "e0", "whole", "--merged-base", "--json")
    assert done.code == 0, done.err
    assert done.document["format"] == "model"
    assert done.document["path"] == str(tmp_path / "whole")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    library = Library.open(tmp_path / "library")
    base = transformers.AutoModelForCausalLM.from_pretrained(library["e0"].base)
    for name, delta in library["e0"].deltas.items():
        moved = model.get_submodule(name).weight - base.get_submodule(name).weight
        assert torch.allclose(moved, delta.dense(), atol=1e-5)
    assert run("export", "e0", "whole", "--merged-base").code == 5
    for words, code in (
        (("e0", "x", "--model", "y"), 2),
        (("e0", "x", "--merged-base", "--dtype", "int8"), 2),
        (("e0", "x", "--merged-base", "--model", "absent-dir/none/x"), 3),
        (("nobody", "x", "--merged-base"), 3),
    ):
        assert run("export", *words).code == code, words
        assert not (tmp_path / "x").exists()


@pytest.mark.usefixtures("routed_library")
def test_a_whole_model_of_another_base_is_refused(run: Any, tmp_path: Path) -> None:
    from tests.tiny import make_tokenizer, save_llama

    save_llama(tmp_path / "wider", hidden=32)
    make_tokenizer().save_pretrained(tmp_path / "wider")
    done = run("export", "e0", "x", "--merged-base", "--model", tmp_path / "wider")
    assert done.code == 7
    assert "does not fit" in done.err
    assert not (tmp_path / "x").exists()
