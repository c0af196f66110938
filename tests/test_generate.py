"""Generation: greedy and drawn, with and without the cache, prompts of different lengths, streamed text."""

import copy
import itertools

import pytest
import torch
from test_model import BASE, randomize

from moe_kernels import generate
from moe_kernels.model import ModelConfig, MoETransformer

PROMPTS = [[5, 17, 3, 44, 9, 61], [7], [12, 30, 2]]


@pytest.fixture(scope="module")
def model():
    return randomize(MoETransformer(BASE)).double()


@pytest.fixture(scope="module")
def byte_model():
    return randomize(MoETransformer(ModelConfig.from_dict(BASE.to_dict() | {"vocab_size": 256})))


def greedy_by_hand(model, prompt, steps):
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    return tokens[len(prompt):]


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_batch_gives_each_prompt_what_it_gets_alone(model, use_cache):
    want = [greedy_by_hand(model, prompt, 8) for prompt in PROMPTS]
    assert len({token for tokens in want for token in tokens}) > 6, "too uniform to tell prompts apart"
    assert generate.generate(model, PROMPTS, 8, use_cache=use_cache) == want


def test_cached_logits_equal_uncached_ones_while_generating(model, monkeypatch):
    seen = {}
    for use_cache in (True, False):
        logits = seen.setdefault(use_cache, [])
        monkeypatch.setattr(generate, "sample", lambda row, *_: logits.append(row) or row.argmax(dim=-1))
        generate.generate(model, PROMPTS, 6, use_cache=use_cache)
    torch.testing.assert_close(torch.stack(seen[True]), torch.stack(seen[False]), rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a CUDA card")
def test_cached_logits_on_a_gpu_are_those_of_the_cpu(model):
    ours = copy.deepcopy(model).to("cuda", torch.float32)
    tokens, mask = generate.pad_left(PROMPTS)
    cache = ours.new_cache(3, tokens.shape[1])
    with torch.no_grad():
        want = model(tokens, mask)
        first = ours(tokens[:, :-1].cuda(), mask[:, :-1].cuda(), cache)
        last = ours(tokens[:, -1:].cuda(), mask.cuda(), cache)
    got = torch.cat((first, last), dim=1).cpu().double()
    torch.testing.assert_close(got[mask], want[mask], rtol=1e-3, atol=1e-3)


def test_drawing_follows_the_probabilities_and_the_seed():
    logits = torch.tensor([0.5, 0.3, 0.2, 0.0]).log().expand(20_000, 4)
    drawn = generate.sample(logits, 1.0, 1.0, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(share, torch.tensor([0.5, 0.3, 0.2, 0.0]), rtol=0, atol=0.02)
    sharp = torch.bincount(generate.sample(logits, 0.5, 1.0, torch.Generator().manual_seed(0)), minlength=4) / 20_000
    torch.testing.assert_close(sharp, torch.tensor([25.0, 9.0, 4.0, 0.0]) / 38, rtol=0, atol=0.02)
    again = generate.sample(logits, 1.0, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)
    assert generate.sample(torch.tensor([[1.0, 3.0, 3.0]]), 0.0).tolist() == [1]


@pytest.mark.parametrize("top_p, kept", [(0.3, [0, 0.5, 0, 0]), (0.5, [0, 0.5, 0, 0]), (0.6, [0.2, 0.5, 0, 0]),
                                         (0.8, [0.2, 0.5, 0.2, 0]), (0.95, [0.2, 0.5, 0.2, 0.1])])
def test_nucleus_literally(top_p, kept):
    """Tokens until the sum reaches top_p; of the two of 0.2 the lower id comes first."""
    probabilities = torch.tensor([[0.2, 0.5, 0.2, 0.1]], dtype=torch.float64)
    assert generate.nucleus(probabilities, top_p).tolist() == [kept]


def test_stop_id_ends_each_sequence_and_then_all(model):
    free = generate.generate(model, PROMPTS, 8)
    stop = free[0][2]
    stopped = generate.generate(model, PROMPTS, 8, stop_id=stop)
    assert len({len(tokens) for tokens in stopped}) == 1
    for tokens, want in zip(stopped, free):
        end = want.index(stop) if stop in want else len(want)
        assert tokens[:end] == want[:len(tokens)][:end]
        assert all(token == stop for token in tokens[end:])
    alone = generate.generate(model, PROMPTS[:1], 8, stop_id=stop)
    assert alone == [free[0][:free[0].index(stop) + 1]]


def test_streaming_gives_one_token_at_a_time(model, monkeypatch):
    calls = []
    forward = MoETransformer.forward
    monkeypatch.setattr(MoETransformer, "forward", lambda self, ids, *rest, **more: calls.append(tuple(ids.shape))
                        or forward(self, ids, *rest, **more))
    first = list(itertools.islice(generate.stream(model, PROMPTS, 8), 2))
    assert [step.shape for step in first] == [(3,), (3,)]
    assert calls == [(3, 6), (3, 1)], "the cache must save computing the prompt again, and nothing run ahead"


def test_text_streams_whole_characters(byte_model, monkeypatch):
    written = iter("aé漢!".encode() + b"\xff" + b"\xc3")
    monkeypatch.setattr(generate, "sample", lambda logits, *_: torch.tensor([next(written)]))
    pieces = list(generate.stream_text(byte_model, "é", 9))
    assert pieces == ["a", "é", "漢", "!", "\ufffd", "\ufffd"]


def test_no_tokens_asked_for(model):
    assert generate.generate(model, PROMPTS, 0) == [[], [], []]


@pytest.mark.parametrize("arguments, options, text", [
    (([], 4), {}, "prompts"), (([[1], []], 4), {}, "prompts"), (([[80]], 4), {}, "from 0 to 79, got 80"),
    (([[1]], -1), {}, "max_new_tokens"), (([[1]], 4), {"temperature": -1.0}, "temperature"),
    (([[1]], 4), {"temperature": float("nan")}, "temperature"), (([[1]], 4), {"top_p": 0.0}, "top_p"),
    (([[1]], 4), {"top_p": 1.5}, "top_p")])
def test_unsuitable_arguments_are_named(model, arguments, options, text):
    with pytest.raises(ValueError, match=text):
        generate.generate(model, *arguments, **options)
