"""The chunked loss equals torch's cross entropy in value and gradient, whatever the chunk."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec.model import cross_entropy


def case(shape, vocab, seed=0, ignored_frac=0.3, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, vocab, generator=generator) * scale
    targets = torch.randint(vocab, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < ignored_frac] = -100
    return logits.requires_grad_(), targets


def reference(logits, targets, z_loss):
    """Both sums in double precision from torch's own functions."""
    flat, y = logits.double().flatten(0, -2), targets.flatten()
    z = (flat.logsumexp(-1).square() * (y != -100)).sum() * z_loss
    return F.cross_entropy(flat, y, reduction="sum", ignore_index=-100), z


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 9),
    vocab=st.integers(1, 70),
    seed=st.integers(0, 99),
    z_loss=st.sampled_from([0.0, 1e-4, 0.1]),
    upstream=st.sampled_from([1.0, 1e-3, -2.0]),
)
def test_value_and_gradient_equal_torch(batch, length, vocab, seed, z_loss, upstream):
    """Loss, z-loss and d logits agree with torch in double precision, for any upstream factor."""
    logits, targets = case((batch, length), vocab, seed)
    loss, z = cross_entropy(logits, targets, z_loss)
    expected_loss, expected_z = reference(logits, targets, z_loss)
    assert loss.dtype == z.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z.double(), expected_z, rtol=1e-5, atol=1e-5)
    (ours,) = torch.autograd.grad((loss + z) * upstream, logits)
    (theirs,) = torch.autograd.grad((expected_loss + expected_z) * upstream, logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_each_sum_has_its_own_gradient():
    """Backward through the loss alone, or the z-loss alone, takes nothing from the other."""
    logits, targets = case((2, 5), 11)
    for index in (0, 1):
        (ours,) = torch.autograd.grad(cross_entropy(logits, targets, 0.1)[index], logits)
        (theirs,) = torch.autograd.grad(reference(logits, targets, 0.1)[index], logits)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_bf16_gradient_is_the_fp32_one_rounded_once():
    """On bf16 logits the losses equal those of the same logits in fp32, and the gradient is its rounding."""
    logits, targets = case((4, 50), 300)
    low = logits.detach().bfloat16().requires_grad_()
    high = low.detach().float().requires_grad_()
    sums = [cross_entropy(x, targets, 1e-3) for x in (low, high)]
    assert torch.equal(sums[0][0], sums[1][0]) and torch.equal(sums[0][1], sums[1][1])
    grads = [torch.autograd.grad((loss + z) / 77, x)[0] for (loss, z), x in zip(sums, (low, high))]
    assert grads[0].dtype == torch.bfloat16
    assert torch.equal(grads[0], grads[1].bfloat16())


def test_chunks_do_not_change_anything(monkeypatch):
    """One row at a time gives the same bits as all rows at once."""
    logits, targets = case((3, 20), 33)
    results = []
    for rows in (1, 7, 1000):
        monkeypatch.setattr(
            "lowprec.model.loss._chunks", lambda x, r=rows: [slice(i, i + r) for i in range(0, len(x), r)]
        )
        loss, z = cross_entropy(logits, targets, 0.01)
        results.append((loss, z, torch.autograd.grad(loss + z, logits)[0]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_a_large_vocabulary_is_really_chunked():
    """The rows of a batch are covered once, in order, by chunks of at most half a million logits on a CPU."""
    from lowprec.model.loss import _chunks

    chunks = _chunks(torch.empty(1, 1).expand(1000, 131072))
    assert [i for c in chunks for i in range(*c.indices(1000))] == list(range(1000))
    assert max(c.stop - c.start for c in chunks) == 4


def test_ignored_tokens_count_nothing():
    """All targets ignored: both sums and every gradient are exactly 0, not NaN."""
    logits, _ = case((2, 3), 5)
    loss, z = cross_entropy(logits, torch.full((2, 3), -100), 0.1)
    loss.add(z).backward()
    assert loss == 0 and z == 0 and not logits.grad.any()


def test_extreme_logits_stay_finite():
    """Logits of 1e4 neither overflow nor lose the loss."""
    logits = torch.tensor([[[1e4, -1e4, 0.0]]], requires_grad=True)
    loss, _ = cross_entropy(logits, torch.tensor([[1]]))
    loss.backward()
    assert loss == 2e4
    torch.testing.assert_close(logits.grad, torch.tensor([[[1.0, -1.0, 0.0]]]))


def test_mistakes_are_named():
    """Shapes that do not match and a negative coefficient raise one sentence."""
    logits, targets = case((2, 3), 5)
    with pytest.raises(ValueError, match=r"logits of shape \(2, 3, 5\) and targets of \(3, 2\)"):
        cross_entropy(logits, targets.T)
    with pytest.raises(ValueError, match="z_loss is -1"):
        cross_entropy(logits, targets, -1.0)
