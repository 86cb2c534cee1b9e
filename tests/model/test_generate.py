"""Sampling is deterministic by seed, obeys temperature and top-k, and leaves the model as it was."""

import pytest
import torch

from lowprec.model import ModelConfig, build, generate


def sample(model, prompt, max_new_tokens, **options):
    return generate(
        lambda tokens: model(torch.tensor([tokens]))[0, -1], prompt, max_new_tokens, max_seq_len=8, **options
    )


@pytest.fixture
def model():
    model = build(
        ModelConfig(vocab_size=32, dim=32, layers=1, heads=2, kv_heads=1, ffn_dim=32, max_seq_len=8, init_std=0.3),
        torch.float32,
    )
    model.init_weights(0)
    return model


def test_same_seed_same_text(model):
    """The seed alone decides, not the global generator; another seed gives another text."""
    first = sample(model, [1, 2], 20, seed=5)
    torch.rand(3)
    assert first == sample(model, [1, 2], 20, seed=5)
    assert first != sample(model, [1, 2], 20, seed=6)
    assert len(first) == 20 and all(0 <= t < 32 for t in first)


def test_temperature_zero_is_the_argmax_of_the_last_window(model):
    """Each token is the most likely one after at most max_seq_len tokens; top_k = 1 is the same."""
    text = [3]
    for _ in range(15):
        text.append(int(model(torch.tensor([text[-8:]]))[0, -1].argmax()))
    assert sample(model, [3], 15, temperature=0) == text[1:]
    assert sample(model, [3], 15, top_k=1, seed=9) == text[1:]


def test_frequencies_follow_the_softmax(model):
    """First tokens over many seeds have the model's tempered top-k probabilities, within four standard deviations."""
    logits = model(torch.tensor([[4]]))[0, -1].detach()
    values, indices = logits.topk(5)
    p = (values / 0.7).softmax(-1)
    n = 1500
    counts = torch.bincount(
        torch.tensor([sample(model, [4], 1, temperature=0.7, top_k=5, seed=s)[0] for s in range(n)]), minlength=32
    )
    assert counts.sum() == counts[indices].sum() == n
    assert ((counts[indices] / n - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all()


def test_stop_token_ends_the_text(model):
    """The text ends before the stop token, which is not returned."""
    text = sample(model, [1], 20, seed=1)
    stop = text[6]
    assert sample(model, [1], 20, seed=1, stop_token=stop) == text[: text.index(stop)]


def test_the_model_is_left_alone(model):
    """Training mode stays, and no graph or gradient is made."""
    model.train()
    sample(model, [1], 3)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_mistakes_are_named(model):
    """An empty prompt, a negative temperature and top_k 0 each raise one sentence."""
    for arguments, words in (
        ({"prompt": []}, "at least one token"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_k": 0}, "top_k is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            sample(model, **({"prompt": [1], "max_new_tokens": 1} | arguments))
