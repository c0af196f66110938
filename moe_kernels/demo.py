"""The demonstration: trains `tiny` on the Python standard library's sources, writes text, and checks what it claims.

Two runs from the same start and on the same batches, one balanced without an auxiliary loss, one not balanced; the
second is short, and both are compared over the same steps.
"""

import shutil
import time
from dataclasses import asdict, replace

import torch

from . import balance, checkpoint, data, plots
from .errors import UserError
from .generate import stream_text
from .model import count_parameters
from .train import Options, Trainer

MAX_BITS = 3.0  # validation, bits per byte
MIN_GAIN = 1.2  # bits per byte under the text's byte entropy
MAX_VIOLATION_RATIO = 1 / 3  # MaxVio balanced against not balanced

# A bias step of 0.001 is for runs of many thousand steps; here a few hundred have to do.
OPTIONS = Options(preset="tiny", steps=300, batch_size=16, seq_len=128, lr=4e-3, warmup=20, bias_step=5e-3,
                  eval_every=60, eval_blocks=128, save_every=10_000, keep=1, dtype="auto")
UNBALANCED_STEPS = 175
WINDOW = 25  # steps whose loads are summed for one MaxVio


def run(out, device=None, options=OPTIONS, unbalanced_steps=UNBALANCED_STEPS, prompt="def "):
    """Trains, generates, prints a PASS or FAIL line for each claim.

    Returns: 0 when all claims hold, else 1. Raises: UserError, as `Trainer`.
    """
    started = time.perf_counter()
    _remove_earlier(out, options)
    texts = data.load_text(options.data)
    entropy = data.byte_entropy(texts[1])
    trainer = Trainer(options, out, device, texts)
    _introduce(trainer, texts)
    trainer.run()
    if trainer.interrupted:
        return 130
    print(f"\nThe same start without balancing, {unbalanced_steps} steps:", flush=True)
    unbalanced = Trainer(replace(options, bias_step=0.0), None, device, texts)
    for _ in range(unbalanced_steps):
        unbalanced.train_step()
    _write(trainer, prompt)
    with_balance, without = (windowed_violation(run.loads, unbalanced_steps) for run in (trainer, unbalanced))
    at_end = windowed_violation(trainer.loads, options.steps)
    bits = trainer.history["validation"][-1][1]
    print(f"MaxVio after {options.steps} steps with balancing: {at_end:.3f}")
    claims = [
        (bits <= MAX_BITS, f"validation {bits:.3f} bits per byte, at most {MAX_BITS}"),
        (entropy - bits >= MIN_GAIN, f"{entropy - bits:.3f} bits under the text's byte entropy of {entropy:.3f}, "
                                     f"at least {MIN_GAIN}"),
        (with_balance <= without * MAX_VIOLATION_RATIO,
         f"MaxVio at step {unbalanced_steps}: {with_balance:.3f} with balancing, {without:.3f} without; "
         f"at most a third"),
    ]
    for holds, text in claims:
        print("PASS" if holds else "FAIL", text)
    _draw(trainer)
    print(f"{time.perf_counter() - started:.0f} seconds; checkpoint and plots are in {out}")
    return 0 if all(holds for holds, _ in claims) else 1


def windowed_violation(loads, last_step):
    """The mean over layers of MaxVio, of the loads summed over the WINDOW recorded steps that end with last_step."""
    end = loads.steps.index(last_step) + 1
    windows = [loads.tokens_per_expert(name)[max(0, end - WINDOW):end].sum(dim=0) for name in loads.layers]
    return balance.max_violation(torch.stack(windows)).mean().item()


def _remove_earlier(out, options):
    """Makes room for the demo in the folder of an earlier one; a run of another kind stays, and raises."""
    for old in checkpoint.steps(out):
        if checkpoint.read_trainer(old)["options"] != asdict(options):
            raise UserError(f"{out} holds another run: choose another --out")
        shutil.rmtree(old)


def _introduce(trainer, texts):
    config = trainer.model.config
    total, active = count_parameters(config)
    print(f"{trainer.options.preset}: {total / 1e6:.2f} M parameters, {active / 1e6:.2f} M for a byte; "
          f"{config.num_moe_layers} MoE layers, {config.top_k} of {config.num_experts} experts a byte")
    print(f"text: {texts[0].numel() / 1e6:.1f} MB to train on, {texts[1].numel() / 1e6:.1f} MB held out; "
          f"device: {trainer.device}", flush=True)


def _write(trainer, prompt):
    trainer.model.eval()
    generator = torch.Generator(trainer.device).manual_seed(0)
    print(f"\nText after {prompt!r}:\n{prompt}", end="")
    with trainer.autocast():
        for text in stream_text(trainer.model, prompt, 240, temperature=0.6, top_p=0.95, generator=generator):
            print(text, end="", flush=True)
    print("\n")


def _draw(trainer):
    try:
        plots.draw(trainer.history, trainer.loads, trainer.out)
    except UserError as error:
        print(f"no plots: {error}")
