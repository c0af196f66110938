"""Training: data, schedule, exact resumption, checkpoints that are broken, plots."""

import json
import math
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_kernels import balance, checkpoint, data, graphed, plots
from moe_kernels.errors import UserError
from moe_kernels.model import moe_layers
from moe_kernels.train import Options, Trainer, learning_rate, make_optimizer

SMALL = Options(steps=6, batch_size=2, seq_len=16, warmup=2, eval_every=3, eval_blocks=4, save_every=3, keep=5,
                bias_step=0.01)


@pytest.fixture(scope="module")
def texts():
    words = ["alpha ", "beta ", "gamma ", "delta\n"]
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(0, 4, (700,), generator=generator).tolist()
    content = torch.frombuffer(bytearray("".join(words[pick] for pick in picks).encode()), dtype=torch.uint8)
    return content[:3000], content[3000:]


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory):
    """A run without interruption, with checkpoints at 3 and 6 of 6 steps."""
    trainer = Trainer(SMALL, tmp_path_factory.mktemp("run"), "cpu", texts, progress=False)
    trainer.run()
    return trainer


@pytest.fixture
def stopped(finished, tmp_path):
    """The same run as it stood after 3 steps."""
    shutil.copytree(finished.out / "step-00000003", tmp_path / "step-00000003")
    return tmp_path


def test_resumed_run_has_the_losses_of_the_uninterrupted(finished, stopped, texts):
    torch.manual_seed(99)  # whatever another part of the process drew must not matter
    resumed = Trainer.resume(stopped, "cpu", texts=texts, progress=False)
    assert resumed.step == 3 and len(resumed.history["losses"]) == 3
    resumed.run()
    assert resumed.history == finished.history
    assert len(resumed.history["losses"]) == 6 and len(resumed.history["validation"]) == 2
    for file in ("model.safetensors", "trainer.safetensors"):
        want, got = (load_file(run.out / "step-00000006" / file) for run in (finished, resumed))
        assert want.keys() == got.keys()
        assert all(torch.equal(want[name], got[name]) for name in want), file


def test_ctrl_c_during_the_last_save_lets_it_finish(texts, tmp_path, monkeypatch):
    def interrupted(tensors, path, **arguments):
        if path.name == "model.safetensors":
            os.kill(os.getpid(), signal.SIGINT)
        save_file(tensors, path, **arguments)

    trainer = Trainer(replace(SMALL, steps=1), tmp_path, "cpu", texts, progress=False)
    monkeypatch.setattr(checkpoint, "save_file", interrupted)
    trainer.run()
    assert not trainer.interrupted and [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert Trainer.resume(tmp_path, "cpu", texts=texts, progress=False).step == 1


def test_a_save_that_is_killed_leaves_nothing(finished, tmp_path, monkeypatch):
    def killed(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 6, finished.model, finished.optimizer, {}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options, message", [
    ({"lr": math.nan}, "lr must be above 0, got nan"), ({"clip": 0.0}, "clip must be above 0, got 0.0"),
    ({"warmup": -1}, "warmup must be at least 0, got -1"), ({"bias_step": math.nan}, "bias_step must be at least 0"),
    ({"weight_decay": -1.0}, "weight_decay must be at least 0"), ({"min_lr_ratio": -3.0}, "min_lr_ratio must be at l")])
def test_options_that_cannot_train(options, message):
    with pytest.raises(UserError, match=message):
        Options(**options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a step is a graph on a GPU alone")
def test_graphed_steps_have_the_bits_of_eager_ones(texts, monkeypatch):
    def run(eager_steps):
        monkeypatch.setattr(graphed, "_EAGER_STEPS", eager_steps)
        trainer = Trainer(replace(SMALL, steps=9), None, "cuda", texts, progress=False)
        trainer.run()
        assert trainer._gradients.keeps_gradients == (eager_steps < 9)
        return trainer

    captured, eager = run(3), run(9)
    assert captured.history == eager.history and len(captured.history["losses"]) == 9
    for ours, theirs in zip(captured.model.parameters(), eager.model.parameters()):
        assert torch.equal(ours, theirs)
    for name in eager.loads.layers:
        assert torch.equal(captured.loads.tokens_per_expert(name), eager.loads.tokens_per_expert(name))


def test_a_step_on_the_cpu_is_the_function_itself():
    step = graphed.GraphedStep(lambda x: 2 * x, torch.device("cpu"))
    assert [step(torch.tensor(value)).item() for value in range(6)] == [0, 2, 4, 6, 8, 10] and not step.keeps_gradients


def test_checkpoint_holds_optimiser_random_states_loads_and_place(finished):
    folder = finished.out / "step-00000003"
    tensors, trainer = load_file(folder / "trainer.safetensors"), json.loads((folder / "trainer.json").read_text())
    names = [name for name, _ in finished.model.named_parameters()]
    assert all(f"{moment}.{name}" in tensors for name in names for moment in ("exp_avg", "exp_avg_sq", "step"))
    assert tensors["rng.cpu"].dtype == torch.uint8
    assert trainer["data"]["cursor"] == 3 * SMALL.batch_size and trainer["load_steps"] == [1, 2, 3]
    loads = tensors[f"loads.{finished.loads.layers[0]}"]
    assert (loads.sum(dim=-1) == 2 * 16 * 16).all()  # sequences, bytes, experts a byte


def test_checkpoint_loads_in_hugging_face(finished):
    transformers = pytest.importorskip("transformers")
    model = checkpoint.load_model(finished.out).eval()
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(checkpoint.find(finished.out), dtype=torch.float32)
    ids = torch.arange(40).view(1, 40) + 60
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_loss_falls_and_validation_is_in_bits(texts):
    trainer = Trainer(replace(SMALL, steps=40, batch_size=8, lr=5e-3, eval_every=40), None, "cpu", texts, False)
    assert trainer.evaluate() == pytest.approx(8.0, abs=0.4)  # nothing learnt: 8 bits a byte
    trainer.run()
    assert trainer.history["losses"][0] == pytest.approx(math.log(256), abs=0.4)
    assert trainer.history["validation"][-1][1] < 3.2
    trainer.model.train()  # evaluation must not depend on how the model was left
    assert trainer.evaluate() == trainer.history["validation"][-1][1]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_bf16_learns_as_fp32_does_and_resumes_exactly(device, texts, tmp_path):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("wants a CUDA card")
    options = replace(SMALL, steps=20, batch_size=8, lr=5e-3, eval_every=20, save_every=15, keep=9)
    runs = {}
    for dtype in ("bf16", "fp32"):
        runs[dtype] = Trainer(replace(options, dtype=dtype), tmp_path / dtype, device, texts, progress=False)
        runs[dtype].run()
    resumed = Trainer.resume(tmp_path / "bf16" / "step-00000015", device, texts=texts, progress=False)
    resumed.run()
    assert not torch.are_deterministic_algorithms_enabled(), "a process-wide setting must not stay behind"
    assert runs["bf16"].history["losses"] != runs["fp32"].history["losses"], "autocast must be on"
    assert runs["bf16"].history["losses"] == pytest.approx(runs["fp32"].history["losses"], rel=0.05)
    assert resumed.history == runs["bf16"].history
    assert {parameter.dtype for parameter in resumed.model.parameters()} == {torch.float32}


def test_biases_move_against_the_loads_after_each_step(texts):
    trainer = Trainer(SMALL, None, "cpu", texts, progress=False)
    loads = trainer.train_step()
    for load, layer in zip(loads.values(), moe_layers(trainer.model), strict=True):
        want = 0.01 * torch.sign(load.float().mean() - load.float())
        torch.testing.assert_close(layer.gate.e_score_correction_bias, want)
    still = Trainer(replace(SMALL, bias_step=0.0), None, "cpu", texts, progress=False)
    still.train_step()
    assert not any(layer.gate.e_score_correction_bias.any() for layer in moe_layers(still.model))


def test_gradients_are_clipped_and_cleared(texts, monkeypatch):
    trainer = Trainer(replace(SMALL, clip=1e-3), None, "cpu", texts, progress=False)
    norms = []
    monkeypatch.setattr(trainer.optimizer, "step", lambda: norms.append(
        torch.stack([p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]).norm().item()))
    trainer.train_step()
    assert norms == [pytest.approx(1e-3, rel=1e-3)]
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_weight_decay_spares_norms(texts):
    trainer = Trainer(SMALL, None, "cpu", texts, progress=False)
    matrices, vectors = make_optimizer(trainer.model, SMALL).param_groups
    assert matrices["weight_decay"] == 0.1 and all(parameter.dim() > 1 for parameter in matrices["params"])
    assert vectors["weight_decay"] == 0.0 and all(parameter.dim() == 1 for parameter in vectors["params"])


def test_learning_rate_literally():
    options = Options(steps=14, warmup=4, lr=1.0, min_lr_ratio=0.2)
    rates = [learning_rate(step, options) for step in (0, 1, 3, 4, 9, 14)]
    assert rates == pytest.approx([0.25, 0.5, 1.0, 1.0, 0.6, 0.2])


def test_a_loss_that_is_not_a_number_is_one_line(texts):
    trainer = Trainer(SMALL, None, "cpu", texts, progress=False)
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="the loss is nan at step 1"):
        trainer.run()


def test_old_checkpoints_go(texts, tmp_path):
    Trainer(replace(SMALL, save_every=2, keep=2), tmp_path, "cpu", texts, progress=False).run()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000004", "step-00000006"]


# ------------------------------------------------------------------------------------------------- broken checkpoints


def resume(folder, texts):
    return Trainer.resume(folder, "cpu", texts=texts, progress=False)


@pytest.mark.parametrize("file", ["model.safetensors", "trainer.safetensors", "trainer.json", "config.json"])
@pytest.mark.parametrize("damage", ["cut", "removed", "foreign"])
def test_broken_checkpoint_is_one_line_that_names_the_file(stopped, texts, file, damage):
    path = stopped / "step-00000003" / file
    content = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(content[:len(content) // 2] if damage == "cut" else b"something else altogether")
    with pytest.raises(UserError, match=file):
        resume(stopped, texts)


@pytest.mark.parametrize("content, trainer_says, config_says", [
    ("[]", "must hold a JSON object", "must hold a JSON object"),
    ("{}", "trainer.json says format None", "model_type must be 'deepseek_v3', got None"),
    ('{"epoch": 3, "global_step": 7}', "trainer.json says format None", "model_type must be 'deepseek_v3', got None"),
    ("[" * 100_000, "trainer.json is truncated or no JSON", "config.json is truncated or no JSON")])
def test_json_of_another_program_is_one_line(stopped, texts, content, trainer_says, config_says):
    folder = stopped / "step-00000003"
    before = (folder / "trainer.json").read_text()
    (folder / "trainer.json").write_text(content)
    with pytest.raises(UserError, match=trainer_says):
        resume(stopped, texts)
    (folder / "trainer.json").write_text(before)
    (folder / "config.json").write_text(content)
    for read in (lambda: resume(stopped, texts), lambda: checkpoint.load_model(stopped)):
        with pytest.raises(UserError, match=config_says):
            read()


@pytest.mark.parametrize("change, message", [
    ({"step": "3"}, "lacks step as"), ({"options": []}, "lacks options as"), ({"data": {}}, "lacks seed as"),
    ({"history": {"losses": ["a"], "validation": []}}, "lacks losses as"), ({"load_steps": None}, "lacks load_steps"),
    ({"history": {"losses": [], "validation": [3, 8.0]}}, "lacks validation as"),
    ({"options": {"steps": "many"}}, "options that cannot train: steps wants int, got str"),
    ({"options": {"seed": True}}, "options that cannot train: seed wants int, got bool"),
    ({"options": {"data": 3}}, r"options that cannot train: data wants str \| None, got int")])
def test_trainer_json_of_another_form_is_one_line(stopped, texts, change, message):
    path = stopped / "step-00000003" / "trainer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=f"trainer.json .*{message}"):
        resume(stopped, texts)


@pytest.mark.parametrize("change, message", [
    ({"hidden_size": 12.5}, "hidden_size wants int, got float"), ({"rms_norm_eps": "x"}, "rms_norm_eps wants float"),
    ({"scoring_func": "tanh"}, "score_fn wants one of"), ({"intermediate_size": -3}, "negative dimension"),
    ({"vocab_size": 10**14}, "memory|too large|overflow")])
def test_config_of_no_model_is_one_line(stopped, change, message):
    path = stopped / "step-00000003" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=f"config.json describes no model .*({message})") as raised:
        checkpoint.load_model(stopped)
    assert "\n" not in str(raised.value)


def test_checkpoint_of_another_program_or_model_is_refused(stopped, texts):
    folder = stopped / "step-00000003"
    trainer, config = (json.loads((folder / name).read_text()) for name in ("trainer.json", "config.json"))
    (folder / "trainer.json").write_text(json.dumps(trainer | {"format": "other"}))
    with pytest.raises(UserError, match="no checkpoint of moe-kernels train"):
        resume(stopped, texts)
    (folder / "trainer.json").write_text(json.dumps(trainer))
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    with pytest.raises(UserError, match="hidden_size differ"):
        resume(stopped, texts)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(UserError, match="model_type must be 'deepseek_v3', got 'llama'"):
        resume(stopped, texts)


def test_weights_of_another_shape_are_refused(stopped):
    path = stopped / "step-00000003" / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor[..., :4].contiguous() for name, tensor in tensors.items()}, path)
    with pytest.raises(UserError, match="another model: .* tensors differ"):
        checkpoint.load_model(stopped)


def test_resuming_wants_the_same_text_and_a_checkpoint(stopped, texts, tmp_path_factory):
    with pytest.raises(UserError, match="resume with the same --data"):
        resume(stopped, (texts[0][:-1], texts[1]))
    with pytest.raises(UserError, match="another text of this length"):
        resume(stopped, (texts[0].flip(0), texts[1]))
    with pytest.raises(UserError, match="no checkpoint in"):
        resume(tmp_path_factory.mktemp("empty"), texts)
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.load_model(stopped / "nothing")


def test_failed_write_leaves_no_checkpoint_and_the_old_one(stopped, texts, monkeypatch):
    trainer = resume(stopped, texts)
    trainer.train_step()

    def full_disk(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(UserError, match="No space left"):
        trainer.save()
    assert [path.name for path in stopped.iterdir()] == ["step-00000003"]


# ---------------------------------------------------------------------------------------------------------------- data


def test_text_of_a_folder_leaves_out_what_is_binary(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_text("first " * 40)
    (tmp_path / "two.md").write_text("zweité " * 40, encoding="utf-8")
    (tmp_path / "zero.bin").write_bytes(b"x\0y" * 40)
    (tmp_path / "latin.txt").write_bytes(b"\xe9\xe8" * 40)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "cached.txt").write_text("cached")
    training, validation = data.load_text(tmp_path)
    whole = bytes(training.tolist() + validation.tolist())
    assert whole == b"first " * 40 + b"\n" + "zweité ".encode() * 40
    assert validation.numel() == len(whole) // 20


def test_every_twentieth_file_is_held_out(tmp_path):
    for index in range(40):
        (tmp_path / f"{index:02d}.txt").write_text(f"{index:02d}")
    training, validation = data.load_text(tmp_path)
    assert bytes(validation.tolist()) == b"10\n30"
    assert b"10" not in bytes(training.tolist()).split(b"\n") and training.numel() == 38 * 3 - 1


@pytest.mark.parametrize("content", [None, b"", b"\0\1\2"])
def test_folder_without_text_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match="no text in"):
        data.load_text(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        data.load_text(tmp_path / "missing")


def test_standard_library_is_the_default_text():
    training, validation = data.load_text()
    assert training.numel() > 5e6 and validation.numel() > 2e5
    assert 4.0 < data.byte_entropy(validation) < 5.0


def test_byte_entropy_literally():
    assert data.byte_entropy(torch.tensor([1, 1, 2, 3], dtype=torch.uint8)) == pytest.approx(1.5)
    assert data.byte_entropy(torch.arange(256).to(torch.uint8)) == pytest.approx(8.0)


def test_blocks_cover_each_epoch_once_and_resume_their_place():
    blocks = data.Blocks(torch.arange(101).to(torch.uint8), 10, seed=3)
    assert blocks.num_blocks == 10
    epochs = [torch.cat([blocks.batch(5) for _ in range(2)]) for _ in range(2)]
    for epoch in epochs:
        assert sorted(epoch[:, 0].tolist()) == list(range(0, 100, 10))
        assert torch.equal(epoch, epoch[:, :1] + torch.arange(11))
    assert epochs[0].tolist() != epochs[1].tolist()
    blocks.batch(7)
    other = data.Blocks(torch.arange(101).to(torch.uint8), 10, seed=3)
    other.load_state(json.loads(json.dumps(blocks.state())))
    assert torch.equal(other.batch(6), blocks.batch(6))
    assert data.Blocks(torch.arange(101).to(torch.uint8), 10).spread(3)[:, 0].tolist() == [0, 30, 60]
    with pytest.raises(UserError, match="has 10 bytes, one block needs 11"):
        data.Blocks(torch.zeros(10, dtype=torch.uint8), 10)


# --------------------------------------------------------------------------------------------------------------- plots


def test_plots_are_drawn(finished, tmp_path):
    pytest.importorskip("matplotlib")
    paths = plots.draw(finished.history, finished.loads, tmp_path)
    assert [path.name for path in paths] == ["loss.png", "experts.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 5000 for path in paths)
    plots.draw({"losses": [1.0], "validation": []}, balance.LoadStatistics(), tmp_path)
