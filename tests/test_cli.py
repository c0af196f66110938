"""The command line: what it prints, its exit statuses, its one-line errors, and Ctrl-C."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import SMALL

from moe_kernels import checkpoint, cli, demo
from moe_kernels.balance import LoadStatistics

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ["--device", "cpu", "--batch-size", "2", "--seq-len", "16", "--eval-blocks", "2", "--warmup", "1"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    return str(folder)


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert cli.main(["train", "--data", text, "--out", str(out), "--steps", "3", *TRAIN]) == 0
    return out


def failure(capsys, *arguments):
    """The single line that a failing command prints to stderr."""
    assert cli.main([*arguments]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in lines if "step/s" not in line and line]
    assert len(lines) == 1 and lines[0].startswith("moe-kernels: "), lines
    return lines[0]


def test_info_of_the_article_s_model(capsys):
    assert cli.main(["info", "deepseek-v4-1t"]) == 0
    out = capsys.readouterr().out
    for words in ("1.026 T", "32.53 B (3.2%)", "16 of 768", "70,272 bytes a token"):
        assert words in out, out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()[:2] in ("bf", "fp")}
    assert rows["bf16"] == ["2.052", "TB", "65.06", "GB", "26"]
    assert rows["fp8"] == ["1.026", "TB", "32.53", "GB", "13"]
    assert rows["fp4"] == ["513", "GB", "16.27", "GB", "7"]
    operations = re.search(r"operations +([\d.]+) B a token", out)
    assert float(operations[1]) == pytest.approx(2 * (32.53 - 129280 * 7168 / 1e9), rel=1e-3)


def test_info_of_the_machine(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"torch             {torch.__version__}" in out
    for stage in ("gate", "plan", "up_proj", "down_proj", "combine"):
        assert re.search(rf"^  {stage} +(torch operations|CUDA kernels)", out, re.MULTILINE), out
    if not torch.cuda.is_available():
        assert out.count("no CUDA card") == 5


def test_train_writes_a_run_and_generate_reads_it(run, capsys):
    assert {path.name for path in run.iterdir()} == {"step-00000003", "loss.png", "experts.png"}
    command = ["generate", "--checkpoint", str(run), "--prompt", "the ", "--max-new-tokens", "12", "--device", "cpu"]
    written = []
    for seed in ("1", "1", "2"):
        assert cli.main([*command, "--seed", seed]) == 0
        written.append(capsys.readouterr().out)
    assert all(text.startswith("the ") and len(text) > 6 for text in written)
    assert written[0] == written[1] != written[2]


def test_finished_run_resumes_to_nothing(run, capsys):
    before = checkpoint.find(run).stat().st_mtime_ns
    assert cli.main(["train", "--resume", str(run), "--device", "cpu"]) == 0
    assert "at step 3 of 3" in capsys.readouterr().out
    assert checkpoint.find(run).stat().st_mtime_ns == before


def test_errors_of_training_are_one_line(text, run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("in the way")
    train = ["train", "--data", text, "--steps", "3", *TRAIN]
    assert "no text in" in failure(capsys, "train", "--data", str(tmp_path / "empty"), "--out", str(tmp_path / "a"))
    assert "no such file or folder" in failure(capsys, "train", "--data", str(tmp_path / "none"), "--out",
                                               str(tmp_path / "b"))
    assert "cannot write to" in failure(capsys, *train, "--out", str(tmp_path / "file"))
    assert "cannot write to" in failure(capsys, *train, "--out", str(tmp_path / "file" / "below"))
    assert "holds a run already" in failure(capsys, *train, "--out", str(run))
    assert "no checkpoint in" in failure(capsys, "train", "--resume", str(tmp_path / "empty"))
    assert "batch_size must be at least 1" in failure(capsys, *train, "--batch-size", "0", "--out", str(tmp_path / "c"))
    for device, message in {"nonsense": "no device nonsense", "meta": "--device wants cpu or cuda, got meta",
                            "mps": "--device wants cpu or cuda, got mps", "hpu": "wants cpu or cuda, got hpu"}.items():
        assert message in failure(capsys, *train, "--device", device, "--out", str(tmp_path / "d"))


def test_errors_of_generation_are_one_line(run, tmp_path, capsys):
    generate = ["generate", "--prompt", "a", "--device", "cpu", "--checkpoint"]
    assert "no checkpoint in" in failure(capsys, *generate, str(tmp_path))
    assert "top_p must be in" in failure(capsys, *generate, str(run), "--top-p", "2")
    assert "prompts must be" in failure(capsys, "generate", "--prompt", "", "--device", "cpu", "--checkpoint", str(run))
    broken = tmp_path / "step-00000001"
    broken.mkdir()
    for file in ("config.json", "model.safetensors"):
        content = (checkpoint.find(run) / file).read_bytes()
        (broken / file).write_bytes(content if file == "config.json" else content[:1000])
    assert "model.safetensors is truncated" in failure(capsys, *generate, str(broken))
    for content in ("[]", "{}", '{"epoch": 3}'):
        (broken / "config.json").write_text(content)
        (broken / "trainer.json").write_text(content)
        assert "config.json" in failure(capsys, *generate, str(broken))
        assert "trainer.json" in failure(capsys, "train", "--resume", str(broken), "--device", "cpu")


@pytest.mark.parametrize("arguments", [["info", "gpt"], ["train", "--preset", "gpt"], ["train", "--steps", "many"],
                                       ["generate"], [], ["train", "--resume", "x", "--lr", "1"]])
def test_wrong_arguments_end_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_saves_and_the_run_goes_on(text, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "moe_kernels", "train", "--data", text, "--out", str(out), "--steps", "100000",
               "--save-every", "100000", "--eval-every", "5", *TRAIN]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        for line in process.stdout:
            if line.startswith("step 5:"):
                break
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, rest
    step = int(re.search(r"interrupted at step (\d+), saved", rest)[1])
    assert "Traceback" not in rest and step >= 5
    assert [path.name for path in out.iterdir()] == [f"step-{step:08d}"]
    trainer = checkpoint.read_trainer(checkpoint.find(out))
    assert len(trainer["history"]["losses"]) == trainer["step"] == step
    resumed = cli.Trainer.resume(out, "cpu", progress=False)
    resumed.train_step()
    assert resumed.step == step + 1


def test_unwritable_folder_and_traceback_free_error_in_a_process(tmp_path):
    (tmp_path / "file").write_text("in the way")
    command = [sys.executable, "-m", "moe_kernels", "train", "--out", str(tmp_path / "file")]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr.splitlines() == [f"moe-kernels: cannot write to {tmp_path / 'file'}: File exists"]


def test_demo_runs_checks_its_claims_and_can_run_again(text, tmp_path, capsys):
    """Four steps learn nothing: the demo must say so, in its lines and in its status."""
    options = replace(SMALL, data=text, steps=4, keep=1)
    assert demo.run(tmp_path, "cpu", options, unbalanced_steps=3, prompt="the ") == 1
    out = capsys.readouterr().out
    assert "FAIL validation" in out and "FAIL MaxVio at step 3" in out
    assert demo.run(tmp_path, "cpu", options, unbalanced_steps=3, prompt="the ") == 1
    capsys.readouterr()
    with pytest.raises(demo.UserError, match="holds another run"):
        demo.run(tmp_path, "cpu", replace(options, seed=1), unbalanced_steps=3)


def test_demo_sums_a_window_of_loads():
    loads = LoadStatistics()
    for step in range(1, 31):
        loads.record(step, {"layer": torch.tensor([2, 0]) if step % 2 else torch.tensor([0, 2])})
    assert demo.windowed_violation(loads, 2) == 0.0
    assert demo.windowed_violation(loads, 1) == 1.0
    assert demo.windowed_violation(loads, 30) == pytest.approx(1 / 25)


def test_ctrl_c_outside_training_has_no_traceback(monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.checkpoint, "load_model", interrupted)
    assert cli.main(["generate", "--checkpoint", "x", "--prompt", "y"]) == 130
    assert capsys.readouterr().err == "moe-kernels: interrupted\n"


def test_a_closed_folder_is_one_line(monkeypatch, capsys):
    def closed(*arguments):
        raise PermissionError(13, "Permission denied", "/closed/run")

    monkeypatch.setattr(cli.checkpoint, "steps", closed)  # a folder above the run's that this user may not read
    assert cli.main(["train", "--out", "/closed/run"]) == 1
    assert capsys.readouterr().err == "moe-kernels: Permission denied: /closed/run\n"
