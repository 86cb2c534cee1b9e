"""The decoder computes what its equations say, in documents, dtypes and layouts of every kind it claims."""

import pytest
import torch
import torch.nn.functional as F

from lowprec.model import Activation, ModelConfig, Transformer, build
from lowprec.model.attention import Context, attend
from lowprec.model.norm import RMSNorm


def make(dtype=torch.float32, seed=0, **change) -> Transformer:
    sizes = {"vocab_size": 64, "dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 48} | change
    with torch.device("meta"):
        model = build(ModelConfig(**sizes), dtype)
    model.to_empty(device="cpu").init_weights(seed)
    return model


def tokens(batch=2, length=12, seed=0):
    return torch.randint(64, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("change", [{}, {"qk_norm": True}, {"rope_theta": None}, {"activation": Activation.relu2}])
def test_forward_equals_a_plain_restatement(change):
    """Logits equal the model written out in double precision, one head and one query at a time."""
    model = make(**change)
    x_BT = tokens()
    config, weights = model.config, {name: p.detach().double() for name, p in model.named_parameters()}
    width, group = config.dim_per_head, config.heads // config.kv_heads

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight

    def rope(x_D, position):
        if config.rope_theta is None:
            return x_D
        half = width // 2
        angle = position * config.rope_theta ** -(torch.arange(half, dtype=torch.float64) / half)
        a, b = x_D[:half], x_D[half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])

    for x_T, logits_TV in zip(x_BT, model(x_BT)):
        h_TC = weights["embed.weight"][x_T]
        for i in range(config.layers):
            w = {name.removeprefix(f"layers.{i}."): p for name, p in weights.items() if name.startswith(f"layers.{i}.")}
            n_TC = norm(h_TC, w["attn_norm.weight"])
            q, k, v = ((n_TC @ w[f"attn.{p}_proj.weight"].T).unflatten(-1, (-1, width)) for p in "qkv")
            if config.qk_norm:
                q, k = norm(q, w["attn.q_norm.weight"]), norm(k, w["attn.k_norm.weight"])
            y_THD = torch.zeros_like(q)
            for t in range(len(x_T)):
                for head in range(config.heads):
                    keys = torch.stack([rope(k[s, head // group], s) for s in range(t + 1)])
                    p_S = (keys @ rope(q[t, head], t) / width**0.5).softmax(-1)
                    y_THD[t, head] = p_S @ v[: t + 1, head // group]
            h_TC = h_TC + y_THD.flatten(1) @ w["attn.o_proj.weight"].T
            n_TC = norm(h_TC, w["mlp_norm.weight"])
            up = n_TC @ w["mlp.up_proj.weight"].T
            if config.activation is Activation.swiglu:
                up = F.silu(n_TC @ w["mlp.gate_proj.weight"].T) * up
            else:
                up = up.relu().square()
            h_TC = h_TC + up @ w["mlp.down_proj.weight"].T
        expected_TV = norm(h_TC, weights["norm.weight"]) @ weights["lm_head.weight"].T
        torch.testing.assert_close(logits_TV.double(), expected_TV, rtol=1e-5, atol=1e-6)


def test_no_token_sees_the_future():
    """Changing token t leaves every logit before t unchanged and changes those from t on."""
    model, x_BT = make(), tokens(1, 200)
    other_BT = x_BT.clone()
    other_BT[0, 150] = (other_BT[0, 150] + 1) % 64
    a, b = model(x_BT)[0], model(other_BT)[0]
    torch.testing.assert_close(a[:150], b[:150], rtol=0, atol=0)
    assert (a[150:] != b[150:]).any(-1).all()


@pytest.mark.parametrize("ids", [[0, 1, 2], [7, 7, 3], [5, 2, 5]])
def test_packed_documents_equal_documents_alone(ids):
    """Logits and gradients of documents in one row equal those of separate rows: nothing crosses, positions restart.

    The same id coming back later is a new document; neighbours with the same id are one.
    """
    lengths, model = [5, 140, 9], make(layers=1)
    x_BT = tokens(1, sum(lengths))
    document_ids_BT = torch.tensor(ids).repeat_interleave(torch.tensor(lengths))[None]
    packed = model(x_BT, document_ids_BT)
    packed.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    if ids[0] == ids[1]:
        lengths = [lengths[0] + lengths[1], lengths[2]]
    alone = torch.cat([model(part) for part in x_BT.split(lengths, dim=1)], dim=1)
    alone.square().sum().backward()
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-5)


def test_documents_may_differ_between_rows():
    """Each row of a batch has its own documents; one without a boundary equals the plain causal forward."""
    model, x_BT = make(), tokens(2, 16)
    ids = torch.zeros(2, 16, dtype=torch.int64)
    ids[1, 7:] = 1
    mixed = model(x_BT, ids)
    torch.testing.assert_close(mixed[:1], model(x_BT[:1]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mixed[1:, 7:], model(x_BT[1:, 7:]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [1, 127, 128, 300])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cpu_attention_equals_torch(length, kv_heads):
    """The blocked CPU path equals scaled_dot_product_attention in value and gradients, at and off block boundaries."""
    torch.manual_seed(length)
    q, k, v = (torch.randn(2, h, length, 8, requires_grad=True) for h in (4, kv_heads, kv_heads))
    context = Context.of(ModelConfig(), torch.zeros(2, length, dtype=torch.int64), None, torch.float32)
    assert context.bias_B1TU is not None
    ours = attend(q, k, v, context.bias_B1TU)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (ours, theirs))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_long_sequences_take_torch_attention_and_agree(monkeypatch):
    """Beyond the blocked path's length, with and without documents, logits are the same."""
    model, x_BT = make(), tokens(2, 40)
    ids = torch.arange(40).expand(2, 40) // 13
    blocked = model(x_BT), model(x_BT, ids)
    monkeypatch.setattr("lowprec.model.attention._BLOCKED_MAX_TOKENS", 8)
    assert Context.of(model.config, x_BT, None, torch.float32).bias_B1TU is None
    for ours, theirs in zip(blocked, (model(x_BT), model(x_BT, ids))):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("blocked_max", [2048, 8])
def test_the_last_queries_see_all_keys_before_them(blocked_max, documents, monkeypatch):
    """Attention of the last 13 of 40 tokens is those rows of the whole, on every path, and so are its gradients."""
    monkeypatch.setattr("lowprec.model.attention._BLOCKED_MAX_TOKENS", blocked_max)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 40, 8, requires_grad=True) for h in (4, 2, 2))
    ids = torch.arange(40).expand(2, 40) // 17 if documents else None
    bias = Context.of(ModelConfig(), torch.zeros(2, 40, dtype=torch.int64), ids, torch.float32).bias_B1TU
    whole = attend(q, k, v, bias)[:, :, 27:]
    rows = attend(q[:, :, 27:], k, v, None if bias is None else bias[:, :, 27:])
    torch.testing.assert_close(rows, whole, rtol=1e-5, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (rows, whole))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_part_of_the_tokens_has_their_positions_and_mask():
    """With `part` the tables and the mask are rows of the whole ones, and the embedding is that of the part."""
    model, x_BT = make(), tokens(2, 12)
    ids = torch.arange(12).expand(2, 12) // 5
    whole, begun = model.context(x_BT, ids), model.begin(x_BT)
    model.part = lambda x, dim: x.unflatten(dim, (4, 3)).select(dim, 2)
    part = model.context(x_BT, ids)
    assert torch.equal(part.cos_BT1D, whole.cos_BT1D[:, 6:9]) and torch.equal(part.sin_BT1D, whole.sin_BT1D[:, 6:9])
    assert torch.equal(part.bias_B1TU, whole.bias_B1TU[:, :, 6:9])
    assert torch.equal(model.begin(x_BT), begun[:, 6:9])


def test_cpu_attention_is_accurate_in_bf16():
    """Scores rounded to bf16 keep at least 45 dB: rounding of the inputs to bf16 alone leaves about 50."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 256, 64).bfloat16() for h in (4, 2, 2))
    context = Context.of(ModelConfig(), torch.zeros(1, 256, dtype=torch.int64), None, torch.bfloat16)
    y = attend(q, k, v, context.bias_B1TU).double()
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True)
    assert 10 * torch.log10(exact.square().sum() / (y - exact).square().sum()) > 45


def test_rotary_scores_depend_on_distance_only():
    """q at t and k at s give the same product when both move together, and the rotation keeps lengths."""
    context = Context.of(ModelConfig(), torch.zeros(1, 50, dtype=torch.int64), None, torch.float32)
    q_BTHD, k_BTHD = (torch.randn(64, generator=torch.Generator().manual_seed(i)).expand(1, 50, 1, 64) for i in (0, 1))
    q, k = context.rotate(q_BTHD)[0, :, 0], context.rotate(k_BTHD)[0, :, 0]
    torch.testing.assert_close(q[30] @ k[20], q[15] @ k[5], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(q.norm(dim=-1), q_BTHD[0, :, 0].norm(dim=-1))
    torch.testing.assert_close(q[0], q_BTHD[0, 0, 0])


def test_bf16_norm_and_rope_compute_in_fp32():
    """RMSNorm and RoPE on bf16 input equal the fp32 result rounded once."""
    torch.manual_seed(0)
    x = torch.randn(2, 9, 4, 64).bfloat16()
    norm = RMSNorm(64, 1e-5)
    torch.nn.init.normal_(norm.weight)
    assert torch.equal(norm(x), norm(x.float()).bfloat16())
    context = Context.of(ModelConfig(), torch.zeros(2, 9, dtype=torch.int64), None, torch.bfloat16)
    assert torch.equal(context.rotate(x), context.rotate(x.float()).bfloat16())


def test_positions_restart_in_every_document():
    """The tables of RoPE are those of position 0 at each document's first token (attention alone could not tell)."""
    ids = torch.tensor([[4, 4, 4, 9, 9, 4, 4], [1, 1, 1, 1, 1, 1, 1]])
    context = Context.of(ModelConfig(), torch.zeros_like(ids), ids, torch.bfloat16)
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6]])
    assert context.cos_BT1D is not None and context.cos_BT1D.dtype == torch.float32
    torch.testing.assert_close(context.cos_BT1D[:, :, 0, 0], positions.float().cos())


def test_parameters_are_fp32_and_logits_have_the_compute_dtype():
    """With a plan's cast put in by hand, a bf16 model keeps fp32 parameters and gradients and gives bf16 logits."""
    model = make(torch.bfloat16)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.forward = lambda x, m=module: F.linear(x, m.weight.to(x.dtype))
    logits = model(tokens())
    logits.float().sum().backward()
    assert logits.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("activation", list(Activation))
def test_parameter_names(activation):
    """The names that plans, checkpoints and exports rely on."""
    model = make(layers=1, qk_norm=True, activation=activation)
    mlp = ["gate", "up", "down"] if activation is Activation.swiglu else ["up", "down"]
    assert {name.removesuffix(".weight") for name in model.state_dict()} == (
        {"embed", "norm", "lm_head", "layers.0.attn_norm", "layers.0.mlp_norm"}
        | {f"layers.0.attn.{p}" for p in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")}
        | {f"layers.0.mlp.{p}_proj" for p in mlp}
    )


def test_tied_head_survives_materialising():
    """A tied head is one parameter on meta, after to_empty, and gets both gradients."""
    model = make(tie_embeddings=True)
    assert model.lm_head.weight is model.embed.weight
    assert "lm_head.weight" not in dict(model.named_parameters())
    model(tokens()).sum().backward()
    untied = make()
    untied.lm_head.weight.data.copy_(untied.embed.weight)
    untied(tokens()).sum().backward()
    torch.testing.assert_close(model.embed.weight.grad, untied.embed.weight.grad + untied.lm_head.weight.grad)


def test_initial_weights_depend_on_seed_and_name_only():
    """Same seed, same weights, whatever else was drawn; another seed or name, others; the spread is as configured."""
    a = make(dim=128, ffn_dim=256)
    torch.rand(7)
    b = make(dim=128, ffn_dim=256)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    c = make(dim=128, ffn_dim=256, seed=1)
    assert not torch.equal(a.embed.weight, c.embed.weight)
    assert not torch.equal(a.layers[0].attn.q_proj.weight, a.layers[1].attn.q_proj.weight)
    deeper = make(dim=128, ffn_dim=256, layers=3, init_scale_residual=False)
    assert torch.equal(a.layers[1].mlp.up_proj.weight, deeper.layers[1].mlp.up_proj.weight)
    std, n = a.layers[0].mlp.up_proj.weight.std(), a.layers[0].mlp.up_proj.weight.numel()
    assert abs(std - 0.02) < 0.02 * 4 / (2 * n) ** 0.5  # relative spread of a deviation: 1 / sqrt(2n)
    ratio = a.layers[0].mlp.down_proj.weight / deeper.layers[0].mlp.down_proj.weight
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.5))  # 1 / sqrt(2 x 2 layers)
    assert torch.equal(a.norm.weight, torch.ones(128))


def test_initial_weights_are_pinned():
    """The key is a stable hash: these values must not change between processes, machines or versions of this code."""
    first = make().layers[0].attn.q_proj.weight[0, :3]
    pinned = torch.tensor([-0.01531974133104086, -0.025242116302251816, -0.004023303743451834])
    torch.testing.assert_close(first, pinned, rtol=1e-6, atol=0)


def test_compiled_or_recomputed_names_get_the_same_weights():
    """A wrapper that renames parameters (recomputation) does not change their values, nor the gradients."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plain, wrapped = make(), make(seed=3)
    wrapped.layers[0] = checkpoint_wrapper(wrapped.layers[0])
    wrapped.init_weights(0)
    x_BT, ids = tokens(), torch.arange(12).expand(2, 12) // 5
    for model in (plain, wrapped):
        model(x_BT, ids).square().sum().backward()
    for p, q in zip(plain.parameters(), wrapped.parameters()):
        assert torch.equal(p, q)
        torch.testing.assert_close(p.grad, q.grad)


def test_too_long_sequences_are_refused():
    """One sentence names both lengths."""
    with pytest.raises(ValueError, match=r"has 17 tokens but model.max_seq_len is 16"):
        make(max_seq_len=16)(tokens(1, 17))
