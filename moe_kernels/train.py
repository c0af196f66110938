"""Trains the reference transformer on bytes: AdamW, warm-up and cosine, balance without an auxiliary loss.

One step: a batch of blocks, forward and backward (bf16 under autocast on a GPU, where they are a CUDA graph), clipped
gradients, AdamW on fp32 weights, then the routers' biases move against the loads of the step. A run is a folder of
checkpoints, and goes on from any of them with the very losses that it would have had.
"""

import contextlib
import math
import os
import signal
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from tqdm import tqdm

from . import balance, checkpoint, checks, data, ops
from .errors import UserError
from .graphed import GraphedStep
from .model import ModelConfig, MoETransformer

_RECORDED_STEPS = 500  # of how many steps, about, a run keeps the experts' loads


@dataclass
class Options:
    """A run's own options, kept in its checkpoints. `data=None` is the Python standard library's sources."""

    data: str | None = None
    preset: str = "tiny"
    steps: int = 1000
    batch_size: int = 32
    seq_len: int = 128
    lr: float = 3e-3
    min_lr_ratio: float = 0.1
    warmup: int = 50
    weight_decay: float = 0.1
    clip: float = 1.0
    bias_step: float = 1e-3  # 0: no balancing
    eval_every: int = 200
    eval_blocks: int = 256
    save_every: int = 500
    keep: int = 2
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self):
        try:
            checks.check_fields(self)
        except TypeError as error:
            raise UserError(str(error)) from error
        for name in ("steps", "batch_size", "seq_len", "eval_every", "eval_blocks", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("min_lr_ratio", "warmup", "weight_decay", "bias_step"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.dtype not in ("auto", "fp32", "bf16"):
            raise UserError(f"dtype must be auto, fp32 or bf16, got {self.dtype!r}")


def learning_rate(step, options):
    """The rate of step 0, 1, ...: linear over `warmup` steps, then half a cosine down to lr * min_lr_ratio."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    progress = (step - options.warmup) / max(1, options.steps - options.warmup)
    floor = options.lr * options.min_lr_ratio
    return floor + (options.lr - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def make_optimizer(model, options):
    """AdamW in its fused form; weight decay on matrices alone, not on norms and biases."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=True)


class Trainer:
    """One run. `history`: losses (nats, one a step), validation ([step, bits per byte]); `loads`: LoadStatistics.

    Args:
        options: Options.
        out: the run's folder, or None to write nothing.
        device: "cuda", "cpu", or None for the GPU where there is one.
        texts: (training, validation) bytes already loaded; None loads `options.data`.
        progress: show a bar and print validation lines.
    Raises: UserError on unsuitable data, options or folders.
    """

    def __init__(self, options, out=None, device=None, texts=None, progress=True):
        self.options, self.progress = options, progress
        self.out = None if out is None else _writable(out)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        training, validation = texts or data.load_text(options.data)
        self.blocks = data.Blocks(training, options.seq_len, options.seed)
        self.validation = data.Blocks(validation, options.seq_len).spread(options.eval_blocks)
        torch.manual_seed(options.seed)
        with self.device:  # a model of billions takes minutes to draw on the CPU
            self.model = MoETransformer(_config(options))
        self.optimizer = make_optimizer(self.model, options)
        self._gradients = GraphedStep(self._clipped_gradients, self.device, self._can_capture())
        self.step = 0
        self.history = {"losses": [], "validation": []}
        self.loads = balance.LoadStatistics()
        self.interrupted = False
        self._pending = []

    @classmethod
    def resume(cls, path, device=None, **arguments):
        """The run whose folder or checkpoint this is, where it stopped. Raises: UserError on anything unsuitable."""
        path = checkpoint.find(path)
        trainer = checkpoint.read_trainer(path)
        known = {field.name for field in fields(Options)}
        try:
            options = Options(**{name: value for name, value in trainer["options"].items() if name in known})
        except UserError as error:
            raise UserError(f"{path / 'trainer.json'} has options that cannot train: {error}") from error
        run = cls(options, path.parent, device, **arguments)
        run.blocks.load_state(trainer["data"])
        loads = checkpoint.load_training(path, run.model, run.optimizer)
        run.step, run.history = trainer["step"], trainer["history"]
        run.loads.load_state_dict({"steps": trainer["load_steps"], "loads": loads})
        return run

    def run(self):
        """Trains to the last step, or until Ctrl-C or SIGTERM, and saves either way (`interrupted` says which)."""
        options, started, first = self.options, time.perf_counter(), self.step
        with _signals() as stop, self._bar() as bar:
            while self.step < options.steps and not stop.is_set():
                loads = self.train_step()
                bar.update()
                last = self.step == options.steps
                if last or self.step % options.eval_every == 0:
                    self._validate(bar)
                if not last and self.step % options.save_every == 0:
                    self.save()
                if not bar.disable and (last or self.step % 10 == 0):
                    self._show(bar, loads, (self.step - first) / (time.perf_counter() - started))
            self.interrupted = self.step < options.steps
            self._flush()
            if self.step > first:
                self.save()

    def train_step(self):
        """One optimiser step and the bias update after it; returns the loads {layer: [E]}."""
        options = self.options
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, options)
        self.model.train()
        tokens = self.blocks.batch(options.batch_size).to(self.device)
        with _deterministic(self.device):
            loss = self._gradients(tokens)
        self.optimizer.step()
        if not self._gradients.keeps_gradients:
            self.optimizer.zero_grad(set_to_none=True)
        loads = balance.update_biases(self.model, options.bias_step)
        self.step += 1
        self._pending.append(loss)
        if self.step % max(1, options.steps // _RECORDED_STEPS) == 0:
            self.loads.record(self.step, loads)
        if len(self._pending) >= 10:
            self._flush()
        return loads

    def _clipped_gradients(self, tokens):
        """Leaves the clipped gradients of a batch in the parameters; returns its loss without what is added to it."""
        with self.autocast(cache=False):
            loss = self.model.loss(tokens)
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
        return loss.next_token.detach()

    @torch.no_grad()
    def evaluate(self):
        """Bits per byte of the validation blocks."""
        self.model.eval()
        total = 0.0
        for tokens in self.validation.split(self.options.batch_size):
            with self.autocast():
                loss = self.model.loss(tokens.to(self.device)).next_token
            total += loss.item() * tokens.shape[0]
        return total / self.validation.shape[0] / math.log(2)

    def _can_capture(self):
        """Whether a step can be a CUDA graph: experts in torch operations, as in fp32, read their loads on the host."""
        return self._is_half() and ops.uses_kernels(torch.empty(0, dtype=torch.bfloat16, device=self.device))

    def _is_half(self):
        wanted = self.options.dtype
        return wanted == "bf16" or wanted == "auto" and self.device.type == "cuda"

    def autocast(self, cache=True):
        """bf16 where the options ask for it, by default on a GPU; weights, residual stream and routing stay fp32.

        cache: whether casts of weights are kept until its end; a CUDA graph has to hold the casts themselves.
        """
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._is_half(), cache_enabled=cache)

    def save(self):
        """Writes a checkpoint of this moment; its path, or None for a run without a folder."""
        self._flush()
        if self.out is None:
            return None
        loads = self.loads.state_dict()
        trainer = {"options": asdict(self.options), "data": self.blocks.state(), "history": self.history,
                   "load_steps": loads["steps"]}
        return checkpoint.save(self.out, self.step, self.model, self.optimizer, trainer, loads["loads"],
                               self.options.keep)

    def _flush(self):
        """Moves the last losses to the history: here, and where loads are recorded, a GPU is waited for."""
        losses = torch.stack(self._pending).tolist() if self._pending else []
        self._pending.clear()
        for loss in losses:
            if not math.isfinite(loss):
                raise UserError(f"the loss is {loss} at step {len(self.history['losses']) + 1}: a lower --lr may help")
            self.history["losses"].append(loss)

    def _validate(self, bar):
        self._flush()
        bits = self.evaluate()
        self.history["validation"].append([self.step, bits])
        if self.progress:
            bar.write(f"step {self.step}: loss {self.history['losses'][-1]:.3f}, "
                      f"validation {bits:.3f} bits per byte")

    def _bar(self):
        return tqdm(total=self.options.steps, initial=self.step, unit="step", disable=None if self.progress else True)

    def _show(self, bar, loads, steps_per_second):
        self._flush()
        rate = steps_per_second * self.options.batch_size * self.options.seq_len
        bar.set_postfix_str(f"loss {self.history['losses'][-1]:.3f}, {rate:,.0f} tokens/s, "
                            f"MaxVio {mean_max_violation(loads):.2f}")


def mean_max_violation(loads):
    """The mean over layers of MaxVio, of {layer: tokens_per_expert [E]}."""
    values = [balance.max_violation(load) for load in loads.values()]
    return torch.stack(values).mean().item() if values else 0.0


@contextlib.contextmanager
def _deterministic(device):
    """On a GPU attention's backward adds in any order unless asked not to, and a resumed run would drift away.

    cuBLAS wants its workspace fixed for that, by a variable that it reads when it is first used.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


@contextlib.contextmanager
def _signals():
    """An event that the first Ctrl-C or SIGTERM sets, so that the step at hand is finished; the second one kills."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {}

    def on_signal(number, frame):
        stop.set()
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _config(options):
    try:
        config = ModelConfig.preset(options.preset)
    except ValueError as error:
        raise UserError(str(error)) from error
    if config.vocab_size < 256:
        raise UserError(f"preset {options.preset} has {config.vocab_size} tokens, bytes need 256")
    return config


def _writable(out):
    """The folder, made if it is not there. Raises: UserError when nothing can be written to it."""
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from error
    return out
