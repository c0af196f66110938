"""README does what it says: its Python and its commands run, its options exist, its tree is that of the repository."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import parse_arguments
from moe_kernels import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
PYTHON_BLOCKS = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [line.split("#")[0].strip() for language, code in BLOCKS if language == "bash" for line in code.splitlines()]
MAKEFILE = (ROOT / "Makefile").read_text()
TREE_FOLDERS = ("csrc", "moe_kernels", "bench")
TREE_SUFFIXES = (".py", ".cu", ".cuh", ".cpp", ".h")


def run(arguments, folder=ROOT):
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_every_block_has_a_language_that_is_tested():
    assert {language for language, _ in BLOCKS} == {"python", "bash", "text"} and PYTHON_BLOCKS and COMMANDS


# a process of its own costs seconds of imports: only what changes transformers for good gets one
@pytest.mark.parametrize("index", range(1, len(PYTHON_BLOCKS)))
def test_python_block_runs(index):
    if "transformers" in PYTHON_BLOCKS[index]:
        run([sys.executable, "-c", PYTHON_BLOCKS[index]])
    else:
        exec(PYTHON_BLOCKS[index], {})


def test_first_example_has_the_shapes_it_prints():
    names = {}
    exec(PYTHON_BLOCKS[0], names)
    shapes = [list(names[name].shape) for name in ("topk_weights", "topk_ids", "y")]
    assert [*shapes, list(names["layer"](names["x"]).shape)] == [[64, 4], [64, 4], [64, 256], [64, 256]]


def test_commands_and_what_is_supported_stand_in_the_first_30_lines():
    head = "\n".join(README.splitlines()[:30])
    assert head.index("make demo") < head.index("make test") and "```python" in head
    assert "| device |" in head and "a CPU" in head


def test_then_come_the_tree_the_interface_the_benchmarks_and_development():
    lines = README.splitlines()
    places = [lines.index(line) for line in ("## The tree", "## Install", "## Use", "## Benchmarks", "## Develop")]
    assert lines[30:].index("## The tree") < 3 and places == sorted(places)
    assert places[0] < next(i for i, line in enumerate(lines) if line.startswith("csrc/ ")) < places[1]


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make ")])
def test_make_command_exists(command):
    words = shlex.split(command)[1:]
    targets = [word for word in words if "=" not in word]
    assert all(re.search(rf"^{target}:", MAKEFILE, re.MULTILINE) for target in targets)
    for word in words:
        name, _, value = word.partition("=")
        assert word in targets or re.search(rf"^{name} \?=", MAKEFILE, re.MULTILINE)
        assert name != "TESTS" or not value or (ROOT / value).exists()


def test_moe_kernels_commands_run_one_after_another(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    commands = [shlex.split(command)[1:] for command in COMMANDS if command.startswith("moe-kernels ")]
    assert {words[0] for words in commands} == {"info", "train", "generate"}
    for words in commands:
        words = [str(tmp_path / "run") if word == "build/readme" else word for word in words]
        assert cli.main(words) == 0 and capsys.readouterr().out.strip()


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("python -m bench")])
def test_bench_command_has_options_that_exist(command):
    parse_arguments(shlex.split(command)[3:])  # test_bench.py runs them


def test_the_other_commands_are_known():
    known = ("make ", "moe-kernels ", "python -m bench", "compute-sanitizer ")
    assert {command for command in COMMANDS if not command.startswith(known)} == {
        "pip install .", "pytest bench/ --benchmark-only"}  # the latter is run by test_bench.py


def tree_paths():
    """The paths of README's tree: a name's indentation of two blanks a level puts it under the folder above it."""
    tree, = (code for language, code in BLOCKS if language == "text" and code.startswith("csrc/"))
    folders, paths = [], []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders = folders[:depth]
        paths.append("/".join([*folders, name.rstrip("/")]))
        if name.endswith("/"):
            folders.append(name.rstrip("/"))
    return paths


def test_the_tree_names_every_source_and_nothing_else():
    paths = tree_paths()
    assert len(paths) == len(set(paths))
    missing = [path for path in paths if not (ROOT / path).exists()]
    sources = [path.relative_to(ROOT).as_posix() for folder in TREE_FOLDERS for path in (ROOT / folder).rglob("*")
               if path.suffix in TREE_SUFFIXES]
    assert missing == [] and sorted(set(sources) - set(paths)) == []


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_readme_names_every_public_function():
    import moe_kernels

    names = [name for name in moe_kernels.__all__ if name != "__version__"]
    assert [name for name in names if name not in README] == []
