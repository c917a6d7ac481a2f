"""Every command of the README prints what the README shows.

`python tests/test_readme.py` writes the output in the README anew. Numbers and bars are compared by
shape, since another processor rounds differently.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"^```console\n(.*?)^```", re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    return [line[2:] for line in text.splitlines() if line.startswith("$ ")]


def run(blocks: list[str], where: Path) -> Iterator[str]:
    """Each block with what its commands print, stdout and then stderr."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if "ADAPTLIB" not in name and not name.startswith("PYTHON")
    }
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment |= {"COLUMNS": "80", "PYTHONIOENCODING": "utf-8", "HF_HUB_OFFLINE": "1"}
    for block in blocks:
        lines = []
        for command in commands(block):
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=where,
                env=environment,
                text=True,
                encoding="utf-8",
                capture_output=True,
                timeout=300,
            )
            # One after the other: in a pipeline, which comes first is a race.
            output = (done.stdout + done.stderr).replace(str(where), "~")
            lines += [f"$ {command}", *(line.rstrip() for line in output.splitlines())]
        yield "\n".join(lines) + "\n"


def shape(text: str) -> list[str]:
    text = re.sub(r"[\d.]+k?(?= tok)|\d+(:\d\d)+", "#", text)  # how fast, how long
    text = re.sub(r"(?<=sha256:)[0-9a-f]+|\d+", "#", text)
    return [" ".join(re.sub(r"[█▏▎▍▌▋▊▉░▒▓]+", "", line).split()) for line in text.splitlines()]


def test_the_readme_shows_what_its_commands_print(tmp_path: Path) -> None:
    shown = BLOCK.findall(README.read_text(encoding="utf-8"))
    assert len(shown) >= 5
    for got, want in zip(run(shown, tmp_path), shown, strict=True):
        assert shape(got) == shape(want)


def main() -> None:
    text = README.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        outputs = run(BLOCK.findall(text), Path(scratch))
        README.write_text(
            BLOCK.sub(lambda _: f"```console\n{next(outputs)}```", text), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
