"""The command line: `moe-kernels info | train | generate | demo`, also as `python -m moe_kernels`.

Exit status: 0 done, 1 an error in one line or a failed claim of the demo, 2 wrong arguments, 130 ended by Ctrl-C.
"""

import argparse
import os
import sys
from dataclasses import fields

import torch

from . import __version__, checkpoint, demo, info, plots
from .errors import UserError
from .generate import stream_text
from .model import PRESETS
from .train import Options, Trainer

_TRAIN_HELP = {
    "data": "a folder or file of text (default: the Python standard library's sources)",
    "preset": "the model: " + ", ".join(PRESETS),
    "steps": "optimiser steps",
    "batch_size": "sequences a step",
    "seq_len": "bytes a sequence",
    "lr": "highest learning rate",
    "min_lr_ratio": "the last learning rate, as a share of the highest",
    "warmup": "steps of warm-up",
    "weight_decay": "of AdamW, on matrices",
    "clip": "highest norm of the gradient",
    "bias_step": "how far a routing bias moves in a step; 0 does not balance",
    "eval_every": "steps from one validation to the next",
    "eval_blocks": "sequences of a validation",
    "save_every": "steps from one checkpoint to the next",
    "keep": "how many checkpoints stay",
    "dtype": "auto (bf16 on a GPU, fp32 on the CPU), fp32 or bf16",
    "seed": "of weights and of the text's order",
}


def main(arguments=None):
    """Runs one command; returns its exit status. What the user can put right is one line on stderr."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.command(options, parser) or 0
    except UserError as error:
        print(f"moe-kernels: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("moe-kernels: interrupted", file=sys.stderr)
        return 130
    except PermissionError as error:  # a folder above the one named may be closed to this user
        print(f"moe-kernels: {error.strerror}: {error.filename}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of a pipe has gone, as in `moe-kernels info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _info(options, parser):
    if options.preset is not None:
        print("\n".join(info.preset_lines(options.preset)), end="\n\n")
    print("\n".join(info.machine_lines()))
    if options.preset is None:
        print(f"presets           {', '.join(PRESETS)}")


def _train(options, parser):
    given = {field.name: getattr(options, field.name) for field in fields(Options) if hasattr(options, field.name)}
    if given.get("data") is not None:
        given["data"] = os.path.abspath(given["data"])  # a resumed run may start in another folder
    if options.resume is not None:
        if given or options.out is not None:
            flags = [*given, *(["out"] if options.out is not None else [])]
            parser.error(f"--resume goes on with the run's own options: leave out "
                         f"{', '.join('--' + name.replace('_', '-') for name in flags)}")
        trainer = Trainer.resume(options.resume, _device(options))
        print(f"resumed {trainer.out} at step {trainer.step} of {trainer.options.steps}")
    else:
        out = options.out or "moe-run"
        if checkpoint.steps(out):
            raise UserError(f"{out} holds a run already: --resume {out} goes on with it, --out chooses another folder")
        trainer = Trainer(Options(**given), out, _device(options))
    trainer.run()
    if trainer.interrupted:
        print(f"interrupted at step {trainer.step}, saved: moe-kernels train --resume {trainer.out} goes on")
        return 130
    paths = plots.draw(trainer.history, trainer.loads, trainer.out)
    print(f"done; checkpoint in {checkpoint.find(trainer.out)}, plots: {', '.join(map(str, paths))}")


def _generate(options, parser):
    model = checkpoint.load_model(options.checkpoint, _device(options)).eval()
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(options.seed)
    try:
        pieces = stream_text(model, options.prompt, options.max_new_tokens, temperature=options.temperature,
                             top_p=options.top_p, generator=generator)
        print(options.prompt, end="", flush=True)
        for text in pieces:
            print(text, end="", flush=True)
    except ValueError as error:
        raise UserError(str(error)) from error
    print()


def _demo(options, parser):
    return demo.run(options.out, _device(options))


def _device(options):
    """The device asked for, or None for the GPU where there is one."""
    if options.device is None:
        return None
    try:
        device = torch.device(options.device)
        if device.type not in ("cpu", "cuda"):  # torch knows more, such as meta, on which nothing here runs
            raise UserError(f"--device wants cpu or cuda, got {options.device}")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"no device {options.device}: {str(error).splitlines()[0]}") from error
    return device


def _parser():
    parser = argparse.ArgumentParser(prog="moe-kernels", description="Mixture-of-experts kernels and a model on them.")
    parser.add_argument("--version", action="version", version=f"moe-kernels {__version__}")
    commands = parser.add_subparsers(required=True, metavar="info | train | generate | demo")

    command = _command(commands, _info, "info", "a preset in numbers, and what this machine can run")
    command.add_argument("preset", nargs="?", choices=list(PRESETS), metavar="PRESET", help=", ".join(PRESETS))

    command = _command(commands, _train, "train", "train a byte-level model on a folder of text")
    for field in fields(Options):
        kind = str if field.default is None or isinstance(field.default, str) else type(field.default)
        shown = "" if field.default is None else f" (default: {field.default})"
        command.add_argument("--" + field.name.replace("_", "-"), dest=field.name, type=kind,
                             default=argparse.SUPPRESS, choices=list(PRESETS) if field.name == "preset" else None,
                             metavar=field.name.upper(), help=_TRAIN_HELP[field.name] + shown)
    command.add_argument("--out", metavar="DIR", help="the run's folder (default: moe-run)")
    command.add_argument("--resume", metavar="DIR", help="go on with this run, or from this checkpoint of it")
    _add_device(command)

    command = _command(commands, _generate, "generate", "stream text from a checkpoint")
    command.add_argument("--checkpoint", required=True, metavar="DIR", help="a run's folder or one of its checkpoints")
    command.add_argument("--prompt", required=True, metavar="TEXT")
    command.add_argument("--max-new-tokens", type=int, default=400, metavar="N", help="bytes to write (default: 400)")
    command.add_argument("--temperature", type=float, default=0.7, metavar="X", help="0 is greedy (default: 0.7)")
    command.add_argument("--top-p", type=float, default=0.95, metavar="X", help="(default: 0.95)")
    command.add_argument("--seed", type=int, default=0)
    _add_device(command)

    command = _command(commands, _demo, "demo", "train the tiny preset, write text with it, check the claims")
    command.add_argument("--out", default="demo-run", metavar="DIR", help="(default: demo-run)")
    _add_device(command)
    return parser


def _command(commands, function, name, text):
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.set_defaults(command=function)
    return command


def _add_device(command):
    command.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
