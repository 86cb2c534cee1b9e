"""Hybrids of Mamba-2, attention and MLP: the block is its equations, documents stay apart, and it learns."""

import pytest
import torch
import torch.nn.functional as F

from lowprec.config import load
from lowprec.launch.train import compose_run
from lowprec.model import Activation, Cached, MambaConfig, ModelConfig, build, cross_entropy, generate
from lowprec.model.attention import Context
from lowprec.model.mamba import GatedRMSNorm
from lowprec.model.ssd import recurrence
from lowprec.train import plan_model

CONFIG = ModelConfig(
    vocab_size=64,
    dim=32,
    layers=5,
    heads=4,
    kv_heads=2,
    ffn_dim=48,
    activation=Activation.relu2,
    rope_theta=None,
    pattern="M-M*-",
    mamba=MambaConfig(heads=4, head_dim=16, groups=2, state=8),
)


def make(config=CONFIG, seed=0, larger=1.0):
    """fp32 and materialised; larger: what the matrices are multiplied by, for effects that one can see."""
    with torch.device("meta"):
        model = build(config, torch.float32)
    model.to_empty(device="cpu").init_weights(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(larger if p.ndim == 2 else 1.0)
    return model


def tokens(batch=2, length=70, seed=0):
    return torch.randint(64, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dt_low", [0.0, 0.03])
def test_block_is_its_equations(dt_low):
    """in_proj, convolution, recurrence, gated group norm and out_proj, written out in double precision."""
    m = MambaConfig(heads=4, head_dim=16, groups=2, state=8, dt_low=dt_low)
    block = make(ModelConfig(**{**vars(CONFIG), "mamba": m}), larger=5.0).layers[0].mamba
    w = {name: p.detach().double() for name, p in block.named_parameters()}
    u = torch.randn(2, 70, 32)
    z, xbc, dt = (u.double() @ w["in_proj.weight"].T).split([64, 96, 4], dim=-1)
    padded = F.pad(xbc, (0, 0, 3, 0))
    taps = w["conv1d.weight"][:, 0]
    xbc = F.silu(sum(padded[:, k : k + 70] * taps[:, k] for k in range(4)) + w["conv1d.bias"])
    x, b, c = xbc.split([64, 16, 16], dim=-1)
    dt = F.softplus(dt + w["dt_bias"]).clamp(min=dt_low)
    b, c = b.unflatten(-1, (2, 8)), c.unflatten(-1, (2, 8))
    y = recurrence(x.unflatten(-1, (4, 16)), dt, -w["A_log"].exp(), b, c, w["D"])[0]
    gated = (y.flatten(2) * F.silu(z)).unflatten(-1, (2, 32))
    normed = (gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * w["norm.weight"]
    expected = normed @ w["out_proj.weight"].T
    torch.testing.assert_close(block(u, Context(None, None, None)).double(), expected, rtol=1e-4, atol=1e-5)


def test_parameters_have_the_names_of_hugging_face():
    """Names, shapes and the parts of every block; what is not of a kind is not there."""
    shapes = {name: tuple(p.shape) for name, p in make().named_parameters()}
    mamba = {
        name.removeprefix("layers.2.mamba."): s for name, s in shapes.items() if name.startswith("layers.2.mamba.")
    }
    assert mamba == {
        "in_proj.weight": (164, 32),  # 64 + (64 + 2 x 2 x 8) + 4
        "conv1d.weight": (96, 1, 4),
        "conv1d.bias": (96,),
        "A_log": (4,),
        "D": (4,),
        "dt_bias": (4,),
        "norm.weight": (64,),
        "out_proj.weight": (32, 64),
    }
    blocks = [{name.split(".")[2] for name in shapes if name.startswith(f"layers.{i}.")} for i in range(5)]
    assert blocks == [{kind, f"{kind}_norm"} for kind in ("mamba", "mlp", "mamba", "attn", "mlp")]


def test_initial_values_are_those_of_mamba2():
    """A in [1, 16], step sizes log-uniform in [0.001, 0.1], D 1, filters +- 1/2, residual outputs / sqrt(layers)."""
    sizes = {"dim": 256, "mamba": MambaConfig(heads=512, head_dim=1, groups=2, state=8), "init_std": 0.02}
    block = make(ModelConfig(**{**vars(CONFIG), **sizes})).layers[0].mamba
    a, dt = block.A_log.exp(), F.softplus(block.dt_bias)
    for values, low, high in ((a, 1, 16), (dt.log(), *torch.tensor([1e-3, 0.1]).log().tolist())):
        spread = (high - low) / 12**0.5
        assert values.min() > low - 1e-3 and values.max() < high + 1e-3
        assert abs(values.mean() - (low + high) / 2) < 4 * spread / 512**0.5
    assert (block.D == 1).all() and (block.norm.weight == 1).all()
    assert 0.49 < block.conv1d.weight.abs().max() <= 0.5 and block.conv1d.bias.abs().max() <= 0.5
    for weight, std in ((block.in_proj.weight, 0.02), (block.out_proj.weight, 0.02 / 5**0.5)):
        assert abs(weight.std() / std - 1) < 4 / (2 * weight.numel()) ** 0.5


def test_norm_is_of_each_group_by_itself():
    """Scaling one group of the input changes only that group, and by nothing but eps."""
    norm = GatedRMSNorm(12, 3, 1e-12)
    y, z = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    louder = torch.cat([y[..., :4], y[..., 4:8] * 100, y[..., 8:]], -1)
    torch.testing.assert_close(norm(louder, z), norm(y, z))
    assert not torch.allclose(norm(y, z), norm(y, z + 1))


@pytest.mark.parametrize("ids", [[0, 1, 2], [7, 7, 3], [5, 2, 5]])
def test_packed_documents_equal_documents_alone(ids):
    """Logits and gradients of packed documents are those of separate rows: no state and no tap crosses."""
    lengths, model = [2, 66, 9], make(larger=4.0)
    x_BT = tokens(1, sum(lengths))
    packed = model(x_BT, torch.tensor(ids).repeat_interleave(torch.tensor(lengths))[None])
    packed.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    if ids[0] == ids[1]:
        lengths = [lengths[0] + lengths[1], lengths[2]]
    alone = torch.cat([model(part) for part in x_BT.split(lengths, dim=1)], dim=1)
    alone.square().sum().backward()
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(packed, model(x_BT), rtol=1e-2, atol=1e-2)
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-3, atol=1e-4 * float(p.grad.abs().max()))


def test_no_token_sees_the_future():
    """Changing token t leaves the logits before t as they are, in other chunks and in its own."""
    model, x_BT = make(larger=4.0), tokens(1, 150)
    other_BT = x_BT.clone()
    other_BT[0, 100] = (other_BT[0, 100] + 1) % 64
    a, b = model(x_BT)[0], model(other_BT)[0]
    torch.testing.assert_close(a[:100], b[:100], rtol=0, atol=1e-5)
    assert (a[100:] - b[100:]).abs().amax(-1).gt(1e-4).all()


@pytest.mark.parametrize("config", [CONFIG, ModelConfig(vocab_size=64, dim=32, layers=2, heads=4, kv_heads=2)])
def test_cached_generation_equals_whole_sequences(config):
    """Next-token logits from states, keys and values are those of the whole sequence; another text starts anew."""
    model, cached = make(config, larger=4.0), None
    cached = Cached(model)
    for text in ([5, 9, 2], [5, 9, 2, 7], [5, 9, 2, 7, 1, 1, 3], [8, 9]):
        torch.testing.assert_close(cached(text), model(torch.tensor([text]))[0, -1].detach(), rtol=1e-4, atol=1e-4)
    whole = generate(lambda text: model(torch.tensor([text]))[0, -1], [1, 2], 12, seed=3)
    assert generate(Cached(model), [1, 2], 12, seed=3) == whole
    with pytest.raises(ValueError, match="has 2049 tokens"):
        cached([1] * 2049)


def test_little_is_kept_for_backward():
    """Of a Mamba-2 block: its input, in_proj's output and out_proj's input, and no more than masks beside."""
    block, kept = make().layers[0].mamba, {}
    u = torch.randn(4, 128, 32, requires_grad=True)

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        block(u, Context(None, None, None))
    weights = sum(p.numel() for p in block.parameters())
    assert sum(kept.values()) <= 4 * (4 * 128 * (32 + 164 + 64) + weights)


def test_recomputed_gradients_are_the_same():
    """With and without the recomputation of what is between the matrices, bit for bit."""
    found = []
    for again in (True, False):
        model = make()
        for block in model.layers:
            if block.kinds == "M" and not again:
                block.mamba.between = block.mamba.mix
        model(tokens(), torch.arange(70).expand(2, 70) // 33).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_a_plan_quantises_the_projections_and_nothing_between():
    """nvfp4 on the 12B in miniature: in_proj, out_proj and the others are its linear layers; activations are bf16."""
    words = ["recipe=nvfp4_tiny", "model=nemotron_h_tiny"]
    model, plan = plan_model(load(compose_run(words, [])))
    assert [e.layer for e in plan.entries if ".0." in e.layer] == ["layers.0.mamba.in_proj", "layers.0.mamba.out_proj"]
    assert len(plan.entries) == 5 * 2 + 5 * 2 + 2 * 4 + 1
    model.to_empty(device="cpu").init_weights(0)
    x_BT = torch.randint(model.config.vocab_size, (1, 64))
    logits = model(x_BT, torch.arange(64)[None] // 40)
    cross_entropy(logits, x_BT)[0].backward()
    assert logits.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_a_recipe_of_attention_leaves_mamba_alone():
    """Quantised attention is put into the attention blocks of a hybrid, and into no other."""
    words = ["recipe=nvfp4_tiny", "model=nemotron_h_tiny", "precision=fp8_attention"]
    model, plan = plan_model(load(compose_run(words, [])))
    assert list(plan.cores) == ["layers.3.attn", "layers.8.attn"]
    assert [i for i, kind in enumerate(model.config.pattern) if kind == "*"] == [3, 8]


def test_a_tiny_hybrid_learns_what_only_a_state_can_tell():
    """The first of 13 tokens, which no tap of a convolution reaches from the last 4: far below chance, 1.39 nats."""
    model = make(ModelConfig(**{**vars(CONFIG), "layers": 2, "pattern": "M-", "init_std": 0.1}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, betas=(0.9, 0.95))
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(110):
        word = torch.randint(4, (32, 1), generator=generator)
        x_BT = torch.cat([word, torch.randint(4, 64, (32, 12), generator=generator)], dim=1)
        loss = cross_entropy(model(x_BT)[:, -4:], word.expand(-1, 4))[0] / 128
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 4.0 and sum(losses[-5:]) / 5 < 0.7, losses[::8]
