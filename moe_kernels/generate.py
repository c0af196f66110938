"""Text from a model: greedy, with a temperature, with top-p; several prompts of different lengths at once.

Legend: B prompts, L the longest of them, V vocabulary.
"""

import codecs

import torch
import torch.nn.functional as F


@torch.inference_mode()
def stream(model, prompts, max_new_tokens, temperature=0.0, top_p=1.0, generator=None, stop_id=None, use_cache=True):
    """Yields one new token of every prompt at a time.

    Prompts are padded on the left, where each sequence's padding costs it nothing but masked slots. With the cache a
    step computes one token a sequence; without it the whole sequence again, to the same logits.
    Args:
        prompts: B sequences of token ids, none of them empty.
        temperature: 0 takes the likeliest token; otherwise tokens are drawn from softmax(logits / temperature).
        top_p: draws only from the likeliest tokens whose probabilities reach this sum; in (0, 1].
        generator: torch.Generator on the model's device; None: torch's own.
        stop_id: a sequence that has given this id gives only it from there on; all such: generation ends.
    Yields: [B] int64 on the model's device.
    Raises: ValueError on an empty prompt, or an option outside its range.
    """
    _check(prompts, max_new_tokens, temperature, top_p, model.config)
    device = model.lm_head.weight.device
    tokens, mask = pad_left(prompts, device)
    cache = model.new_cache(tokens.shape[0], tokens.shape[1] + max_new_tokens) if use_cache else None
    ended = torch.zeros(tokens.shape[0], dtype=torch.bool, device=device)
    new = tokens
    for _ in range(max_new_tokens):
        logits = model(new if use_cache else tokens, mask, cache, last_only=True)[:, -1]
        chosen = sample(logits, temperature, top_p, generator)
        if stop_id is not None:
            chosen = torch.where(ended, stop_id, chosen)
            ended |= chosen == stop_id
        yield chosen
        if stop_id is not None and bool(ended.all()):
            return
        new = chosen[:, None]
        tokens = torch.cat((tokens, new), dim=1)
        mask = torch.cat((mask, mask.new_ones(mask.shape[0], 1)), dim=1)


def generate(model, prompts, max_new_tokens, **options):
    """The new tokens of every prompt, B lists of ids; options as in `stream`."""
    steps = list(stream(model, prompts, max_new_tokens, **options))
    return torch.stack(steps, dim=1).tolist() if steps else [[] for _ in prompts]


def sample(logits, temperature=0.0, top_p=1.0, generator=None):
    """One token a row of logits [B, V]; [B] int64. A tie goes to the lower id when greedy."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        probabilities = nucleus(probabilities, top_p)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def nucleus(probabilities, top_p):
    """Sets to 0 whatever is not among the likeliest tokens that together reach top_p; the likeliest always stays.

    Args: probabilities: [B, V], rows sum to 1. Returns: [B, V], not renormalised.
    Source: arXiv 1904.09751.
    """
    ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    before = F.pad(ordered.cumsum(dim=-1)[..., :-1], (1, 0))
    kept = ordered.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(probabilities).scatter_(-1, ids, kept)


def pad_left(prompts, device=None):
    """(tokens [B, L] int64, mask [B, L] bool, False where there is padding)."""
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[False] * (longest - len(prompt)) + [True] * len(prompt) for prompt in prompts]
    return torch.tensor(rows, dtype=torch.int64, device=device), torch.tensor(mask, device=device)


def stream_text(model, prompt, max_new_tokens, **options):
    """Yields a byte-level model's text as it comes; a character of several bytes comes with its last."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for step in stream(model, [list(prompt.encode())], max_new_tokens, **options):
        text = decoder.decode(bytes([int(step[0]) & 255]))
        if text:
            yield text
    if rest := decoder.decode(b"", final=True):
        yield rest


def _check(prompts, max_new_tokens, temperature, top_p, config):
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("prompts must be one or more sequences with at least one token each")
    lowest, highest = min(map(min, prompts)), max(map(max, prompts))
    if lowest < 0 or highest >= config.vocab_size:
        raise ValueError(f"token ids must be from 0 to {config.vocab_size - 1}, got {lowest} to {highest}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
