"""The reference transformer trained on one card: with our experts, and with Hugging Face's `grouped_mm` in their place.

The same model, data, optimizer and seeds: only the experts' forward and backward differ, and a seed draws the weights
alone. A step is moe_kernels.train's: bf16 autocast over fp32 weights, forward and backward as a CUDA graph, clipped
gradients, AdamW, the routers' biases.
"""

import contextlib
import gc
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

import moe_kernels
from moe_kernels import balance, data
from moe_kernels.graphed import GraphedStep
from moe_kernels.model import ModelConfig, count_parameters, moe_layers
from moe_kernels.train import Options, Trainer

from . import peers
from .step_profile import profile_step
from .timing import first_line

OURS, THEIRS = "moe_kernels", peers.REFERENCE_PEER
STEPS, SEEDS = 200, 2
WARM_UP_STEPS = 10  # eager ones, the capture, and the first replays
SIZES = dict(preset="single-gpu", batch_size=8, seq_len=1024, lr=4e-4, eval_blocks=64)
QUICK_SIZES = dict(preset="tiny", batch_size=2, seq_len=32, lr=3e-3, eval_blocks=4)


class HuggingFaceExperts(nn.Module):
    """The parameters of an `Experts`, and the products of transformers' experts implementation `grouped_mm`.

    Its operators are not autocast's, so that what they take is cast here, with gradients, to what autocast would give;
    routing weights too, as in the other benchmarks, which saves it memory and time.
    """

    def __init__(self, experts):
        super().__init__()
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj
        self._theirs = {}  # no child: its own weights are on the meta device, and stay out of parameters()

    def forward(self, hidden_states, topk_weights, topk_ids, return_plan=False):
        """As `Experts.forward`: [T, H], [T, K], [T, K] -> [T, H] and, where it is asked for, the `Plan`."""
        device_type, dtype = hidden_states.device.type, hidden_states.dtype
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        top_k = topk_ids.shape[1]
        if top_k not in self._theirs:
            self._theirs[top_k] = peers.hugging_face_experts(*self.down_proj.shape, top_k, "grouped_mm")
        weights = {"gate_up_proj": self.gate_up_proj.to(dtype), "down_proj": self.down_proj.to(dtype)}
        with _in_any_order():
            output = torch.func.functional_call(self._theirs[top_k], weights, (
                hidden_states.to(dtype), topk_ids, topk_weights.to(dtype)))
        return (output, moe_kernels.make_plan(topk_ids, self.down_proj.shape[0])) if return_plan else output


@contextlib.contextmanager
def _in_any_order():
    """Without deterministic algorithms: index_put_ to distinct places has the same bits, but would sort them first."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def replace_experts(model):
    """Puts Hugging Face's products into every MoE layer of a model; the parameters stay the same objects."""
    for layer in moe_layers(model):
        layer.experts = HuggingFaceExperts(layer.experts)


IMPLEMENTATIONS = {OURS: lambda model: None, THEIRS: replace_experts}


class CapturedIfPossible(GraphedStep):
    """A GraphedStep that goes on without a graph where the capture fails. clear: sets the gradients to None."""

    def __init__(self, function, device, clear):
        super().__init__(function, device)
        self._device, self._clear = device, clear

    def __call__(self, x):
        stream = None if self._stream is None else torch.cuda.current_stream()
        try:
            return super().__call__(x)
        except RuntimeError as error:
            if not self.keeps_gradients:  # no capture had begun
                raise
            print(f"  not captured, steps go call by call: {first_line(error)}", file=sys.stderr)
        self._graph = self._stream = None
        _leave_capture(stream, self._device)
        self._clear()
        return self._function(x)


def _leave_capture(stream, device):
    """Undoes what a capture that failed leaves: its stream current, and torch's default generator unusable."""
    torch.cuda.set_stream(stream)
    torch.cuda.synchronize()
    generator = torch.cuda.default_generators[torch.device(device).index or 0]
    generator.graphsafe_set_state(torch.Generator(device).graphsafe_get_state())


class _Unrecorded(balance.LoadStatistics):
    """Loads that nobody asks for: recording waits for the GPU, in a run of few steps at every one."""

    def record(self, step, loads):
        pass


class TimedTrainer(Trainer):
    """A Trainer that times its steps, with one of IMPLEMENTATIONS, on the same data whatever its seed."""

    def __init__(self, options, device, texts, implementation):
        super().__init__(options, None, device, texts, progress=False)
        self.blocks = data.Blocks(texts[0], options.seq_len)
        IMPLEMENTATIONS[implementation](self.model)
        self._gradients = CapturedIfPossible(self._clipped_gradients, self.device, self.optimizer.zero_grad)
        self.loads, self._marks = _Unrecorded(), []

    def train_step(self):
        if not self._marks:
            self._marks.append(self._mark())
        loads = super().train_step()
        self._marks.append(self._mark())
        return loads

    def _mark(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def step_ms(self):
        """The median step after the warm-up, in milliseconds."""
        pairs = list(itertools.pairwise(self._marks))
        pairs = pairs[min(WARM_UP_STEPS, len(pairs) // 2):]
        if self.device.type != "cuda":
            return statistics.median(1e3 * (end - start) for start, end in pairs)
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs)

    @property
    def mode(self):
        """How the steps ran: "cpu", "graph", or "eager" on a GPU where they could not be captured."""
        if self.device.type != "cuda":
            return "cpu"
        return "graph" if self._gradients.keeps_gradients else "eager"


def operations_a_token(config, seq_len):
    """Floating-point operations of a token's forward and backward: products with parameters, and causal attention.

    6 for each parameter that works on the token, and 6 for each element of a head's query and value times the
    (seq_len + 1) / 2 tokens that a token sees in the mean.
    """
    attention = config.num_layers * config.num_heads * (config.qk_head_dim + config.v_head_dim) * (seq_len + 1) / 2
    return 6 * (count_parameters(config)[1] + attention)


def make_options(quick, steps, seed=0, batch_size=None):
    """The Trainer's options of one run; one validation, at its end."""
    sizes = dict(QUICK_SIZES if quick else SIZES)
    sizes["batch_size"] = batch_size or sizes["batch_size"]
    return Options(**sizes, steps=steps, seed=seed, warmup=max(1, steps // 10), eval_every=steps, save_every=steps + 1,
                   dtype="bf16")


def _free(device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def run_once(options, device, texts, implementation, profiled=False):
    """One run: {"ms", "mode", "peak_mb", "losses", "bits_per_byte"} and, profiled, "profile" of a step after it."""
    _free(device)
    trainer = TimedTrainer(options, device, texts, implementation)
    trainer.run()
    if trainer.interrupted:
        raise KeyboardInterrupt
    peak = torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else None
    found = {"ms": trainer.step_ms(), "mode": trainer.mode, "peak_mb": None if peak is None else round(peak, 1),
             "losses": [round(loss, 5) for loss in trainer.history["losses"]],
             "bits_per_byte": round(trainer.history["validation"][-1][1], 5)}
    if profiled:
        found["profile"] = _profile(trainer)
    return found


def _profile(trainer):
    """`profile_step` of the next step, or None where the profiler fails, which costs no measured run."""
    try:
        return profile_step(trainer.train_step, trainer.device)
    except RuntimeError as error:
        print(f"  no profile: {first_line(error)}", file=sys.stderr)
        return None


def compare_curves(ours, theirs):
    """Whether two implementations' losses agree within the noise of a seed, over the last quarter of the steps.

    Args: ours, theirs: the losses of each seed, lists of equal lengths.
    Returns: {"between_implementations": mean absolute difference for the same seed, "between_seeds": mean absolute
        difference of two seeds in the same implementation, "difference": mean of ours less theirs, "agree": whether the
        first is at most the second}; for one seed there is no noise, and the second and the last are None.
    """
    first = len(ours[0]) - max(1, len(ours[0]) // 4)

    def differences(pairs):
        return [a - b for one, other in pairs for a, b in zip(one[first:], other[first:])]

    same_seed = differences(zip(ours, theirs))
    seeds = differences([pair for curves in (ours, theirs) for pair in itertools.combinations(curves, 2)])
    between = statistics.fmean(map(abs, same_seed))
    noise = statistics.fmean(map(abs, seeds)) if seeds else None
    return {"between_implementations": round(between, 5), "between_seeds": None if noise is None else round(noise, 5),
            "difference": round(statistics.fmean(same_seed), 5), "agree": None if noise is None else between <= noise}


def _summary(runs, tokens, operations, dense_tflop_per_s):
    """One implementation's runs as it stands in the results."""
    ms = statistics.median(run["ms"] for run in runs)
    peaks = [run["peak_mb"] for run in runs]
    return {"ms": round(ms, 3), "tokens_per_s": round(1e3 * tokens / ms),
            "share": round(tokens * operations / ms / 1e9 / dense_tflop_per_s, 4), "mode": runs[0]["mode"],
            "peak_mb": None if None in peaks else max(peaks), "ms_of_seeds": [round(run["ms"], 3) for run in runs],
            "bits_per_byte": [run["bits_per_byte"] for run in runs], "losses": [run["losses"] for run in runs]}


def _order(seeds):
    """(seed, implementation) of each run: each seed in the other order, against drift; ours last, to be profiled."""
    order = []
    for seed in range(seeds):
        order += [(seed, name) for name in ((THEIRS, OURS) if (seeds - seed) % 2 else (OURS, THEIRS))]
    return order


def measure_training(device, dense_tflop_per_s, quick=False, steps=STEPS, seeds=SEEDS, batch_size=None):
    """Trains with every implementation from every seed, in turns, and compares.

    Args:
        device: torch.device. dense_tflop_per_s: the card's measured rate in bf16. quick: a tiny model.
        steps, seeds: how many. batch_size: sequences a step, or None for the one of SIZES.
    Returns: {"preset", "parameters", "active_parameters", "batch_size", "seq_len", "steps", "operations_a_token",
        "implementations": {name: _summary}, "times_as_fast", "of_their_memory", "curves": compare_curves, "profile":
        step_profile.table of ours, or None}; memory is None on the CPU.
    """
    options = make_options(quick, steps, batch_size=batch_size)
    config = ModelConfig.preset(options.preset)
    texts = data.load_text(Path(moe_kernels.__file__).parent if quick else None)
    runs = {name: [] for name in IMPLEMENTATIONS}
    for seed, name in _order(seeds):
        last = (seed, name) == (seeds - 1, OURS)
        run = run_once(make_options(quick, steps, seed, batch_size), device, texts, name, profiled=last)
        runs[name].append(run)
        print(f"  {name}, seed {seed}: {run['ms']:.2f} ms a step ({run['mode']}), loss {run['losses'][0]:.3f} to "
              f"{run['losses'][-1]:.3f}, validation {run['bits_per_byte']:.3f} bits per byte", flush=True)
    _free(device)
    tokens, operations = options.batch_size * options.seq_len, operations_a_token(config, options.seq_len)
    found = {name: _summary(runs[name], tokens, operations, dense_tflop_per_s) for name in runs}
    total, active = count_parameters(config)
    peaks = [found[name]["peak_mb"] for name in (OURS, THEIRS)]
    return {"preset": options.preset, "parameters": total, "active_parameters": active,
            "batch_size": options.batch_size, "seq_len": options.seq_len, "steps": steps,
            "operations_a_token": operations, "implementations": found,
            "times_as_fast": round(found[THEIRS]["ms"] / found[OURS]["ms"], 4),
            "of_their_memory": None if None in peaks else round(peaks[0] / peaks[1], 4),
            "curves": compare_curves(found[OURS]["losses"], found[THEIRS]["losses"]),
            "profile": runs[OURS][-1]["profile"]}
