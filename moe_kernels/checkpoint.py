"""A training run on disk: a folder `step-NNNNNNNN` that resumes exactly.

    config.json         the model's sizes, as a Hugging Face deepseek_v3 config
    model.safetensors   the weights under Hugging Face's names
    trainer.safetensors AdamW's moments as `<moment>.<parameter>`, random states as `rng.<device>`, `loads.<layer>`
    trainer.json        step, data position, options, history; written last

A folder is filled under a temporary name and then renamed: one that bears its final name is whole.
"""

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import UserError
from .model import ModelConfig, MoETransformer

_FORMAT = "moe_kernels training checkpoint, version 1"
_FOLDER = re.compile(r"step-(\d{8})")
_TRAINER = {"step": int, "options": {}, "data": {"seed": int, "epoch": int, "cursor": int, "num_bytes": int},
            "history": {"losses": [float], "validation": [[(int, float)]]}, "load_steps": [int]}  # of trainer.json


def save(folder, step, model, optimizer, trainer, loads, keep=2):
    """Writes `folder/step-NNNNNNNN` and removes all but the newest `keep`.

    Args: trainer: what else to keep, JSON. loads: {layer: [recorded steps, E]} of the experts.
    Returns: its path.
    Raises: UserError when the folder cannot be written.
    """
    target = Path(folder) / f"step-{step:08d}"
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        _write_json(temporary / "config.json", model.config.to_hf())
        save_file(_weights(model), temporary / "model.safetensors", metadata={"format": "pt"})
        tensors = _optimizer_tensors(model, optimizer) | _random_states()
        tensors |= {f"loads.{name}": load for name, load in loads.items()}
        save_file(tensors, temporary / "trainer.safetensors")
        _write_json(temporary / "trainer.json", {"format": _FORMAT, "step": step} | trainer)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write a checkpoint to {folder}: {error}") from error
    finally:  # after an error or a second Ctrl-C; a whole one has its final name
        shutil.rmtree(temporary, ignore_errors=True)
    for old in steps(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def steps(folder):
    """The checkpoints in a run's folder, oldest first."""
    found = Path(folder).iterdir() if Path(folder).is_dir() else ()
    return sorted(path for path in found if _FOLDER.fullmatch(path.name))


def find(path):
    """The checkpoint that `path` means: itself, or a run's newest. Raises: UserError when there is none."""
    path = Path(path)
    if (path / "model.safetensors").is_file() or _FOLDER.fullmatch(path.name):
        return path
    found = steps(path)
    if not found:
        raise UserError(f"no checkpoint in {path}: no folder step-NNNNNNNN there")
    return found[-1]


def load_model(path, device="cpu"):
    """The model of a checkpoint folder, its weights in fp32. Raises: UserError in one line on anything unsuitable."""
    path = find(path)
    config = _read_config(path)
    try:
        model = MoETransformer(config)
    except (RuntimeError, TypeError, ValueError) as error:  # a size out of range, or too much memory
        reason = str(error).splitlines()[0]
        raise UserError(f"{path / 'config.json'} describes no model that can be made here: {reason}") from error
    load_weights(path, model)
    return model.to(device)


def load_weights(path, model):
    """Fills a model with a checkpoint's weights. Raises: UserError when they are not this model's."""
    tensors = _read_tensors(Path(path) / "model.safetensors")
    if model.config.tie_word_embeddings and "model.embed_tokens.weight" in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    expected = model.state_dict()
    different = [name for name in expected.keys() | tensors.keys()
                 if name not in tensors or name not in expected or tensors[name].shape != expected[name].shape]
    if different:
        raise UserError(f"{path} holds another model: {len(different)} tensors differ in name or shape, "
                        f"the first is {min(different)}")
    model.load_state_dict(tensors)


def read_trainer(path):
    """The trainer.json of a checkpoint folder. Raises: UserError on a truncated or foreign one."""
    trainer = _read_json(path / "trainer.json")
    if trainer.get("format") != _FORMAT:
        raise UserError(f"{path} is no checkpoint of moe-kernels train: trainer.json says "
                        f"format {trainer.get('format')!r}")
    misfit = _misfit("trainer.json", trainer, _TRAINER)
    if misfit is not None:
        raise UserError(f"{path / 'trainer.json'} lacks {misfit} as moe-kernels train writes it")
    return trainer


def load_training(path, model, optimizer):
    """Restores weights, AdamW and the random states from a checkpoint folder; returns the experts' loads.

    Raises: UserError on a truncated or foreign checkpoint.
    """
    config = _read_config(path)
    if config != model.config:
        changed = [name for name, value in config.to_dict().items() if value != getattr(model.config, name)]
        raise UserError(f"{path} holds another model: {', '.join(changed)} differ")
    tensors = _read_tensors(path / "trainer.safetensors")
    load_weights(path, model)
    _restore_optimizer(path, model, optimizer, tensors)
    _restore_random_states(tensors)
    return {name.removeprefix("loads."): load for name, load in tensors.items() if name.startswith("loads.")}


def _weights(model):
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]  # safetensors stores no tensor twice
    return tensors


def _optimizer_tensors(model, optimizer):
    """AdamW's state by parameter name, so that a file says what it holds."""
    return {f"{key}.{name}": value.detach().contiguous()
            for name, parameter in model.named_parameters()
            for key, value in optimizer.state[parameter].items()}


def _restore_optimizer(path, model, optimizer, tensors):
    for name, parameter in model.named_parameters():
        state = {key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
                 if f"{key}.{name}" in tensors}
        if len(state) != 3 or state["exp_avg"].shape != parameter.shape:
            raise UserError(f"{path / 'trainer.safetensors'} lacks the optimiser state of {name}")
        moments = {key: state[key].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
        # AdamW's fused form counts its steps on the parameter's device, the others on the CPU.
        fused = optimizer.param_groups[0].get("fused")
        optimizer.state[parameter] = moments | {"step": state["step"].to(parameter.device if fused else "cpu")}


def _random_states():
    states = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["rng.cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random_states(tensors):
    if "rng.cpu" in tensors:
        torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])


def _misfit(name, value, form):
    """The name of what in a JSON value is not as in `form`, a type or a dict or list of forms; None when all is."""
    if isinstance(form, dict) and isinstance(value, dict):
        misfits = (_misfit(key, value.get(key), part) for key, part in form.items())
    elif isinstance(form, list) and isinstance(value, list):
        misfits = (_misfit(name, item, form[0]) for item in value)
    elif not isinstance(form, (dict, list)) and isinstance(value, form):
        return None
    else:
        return name
    return next((misfit for misfit in misfits if misfit is not None), None)


def _read_config(path):
    config = {"model_type": None} | _read_json(path / "config.json")  # one that names no model is no model's
    try:
        return ModelConfig.from_hf(config)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path / 'config.json'} describes no model of ours: {error}") from error


def _read_tensors(path):
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"the checkpoint lacks {path}") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or no safetensors file: {error}") from error


def _read_json(path):
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"the checkpoint lacks {path}") from error
    except (OSError, ValueError, RecursionError) as error:  # no UTF-8, no JSON, or numbers and depths out of reach
        raise UserError(f"{path} is truncated or no JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object")
    return value


def _write_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n")
