"""docs/distributed.md: its scripts run as they stand there, and train alike."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "distributed.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
SCRIPTS = {code.splitlines()[0].removeprefix("# "): code for language, code in BLOCKS if language == "python"}
COMMANDS = [code.strip() for language, code in BLOCKS if language == "bash"]


def losses(output):
    return [float(loss) for loss in re.findall(r"^step \d+ loss (\S+)$", output, re.MULTILINE)]


def run(command, folder, num_processes=1, **changes):
    """The command of the page with other numbers of processes, in a folder that holds the page's scripts."""
    for name, code in SCRIPTS.items():
        (folder / name).write_text(code)
    words = shlex.split(command)
    for option, value in {"--nproc-per-node": num_processes, **changes}.items():
        if option in words:
            words[words.index(option) + 1] = str(value)
    launcher = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"]}
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"}
    for _ in range(2):
        done = subprocess.run([*launcher[words[0]], *words[1:]], cwd=folder, capture_output=True, text=True,
                              timeout=300, env=environment)
        # at times a process of torch 2.13 aborts at its exit, with a thread of gloo's left, when all is done
        if "terminate called without an active exception" not in done.stderr:
            break
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    return losses(done.stdout)


def test_each_script_has_its_command():
    assert list(SCRIPTS) == ["model.py", "train.py", "train_fsdp.py", "train_ep.py", "accumulate.py"]
    assert [re.search(r"\w+\.py", command).group() for command in COMMANDS] == list(SCRIPTS)[1:]


def test_accumulating_learns(tmp_path):
    first, *_, last = run(COMMANDS[3], tmp_path)
    assert last < 0.9 * first


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_scripts_learn_and_agree(tmp_path):
    """One process, FSDP on two, experts spread over two of four: the same batches, so the same losses."""
    alone = run(COMMANDS[0], tmp_path)
    sharded = run(COMMANDS[1], tmp_path, 2)
    spread = run(COMMANDS[2], tmp_path, 4, **{"--ep": 2})
    assert len(alone) == len(sharded) == len(spread) == 10
    assert alone[-1] < alone[0] - 0.2
    assert sharded[0] == pytest.approx(alone[0], abs=1e-4)  # that one clips no gradients
    assert spread == pytest.approx(sharded, abs=1e-4)
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("model_of_the_page", tmp_path / "model.py")
    spec.loader.exec_module(module := module_from_spec(spec))
    module.Model().load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
