"""Attention in low precision: its six matrix products, in the vocabulary of the linear layers. Off by default.

    qk   s  = q k^T     contracts head_dim        p  = softmax(s / sqrt(D) + mask)     in fp32, always
    pv   o  = p v       contracts keys
    dv   dv = p^T do    contracts queries
    dp   dp = do v^T    contracts head_dim        ds = p * (dp - rowsum(p * dp))       in fp32, always
    dq   dq = ds k      contracts keys
    dk   dk = ds^T q    contracts queries

Each product has two operands with a format and a rounding, and perhaps a Hadamard rotation of its contracted axis,
which cancels (of head_dim in ``qk``: the incoherent processing of FlashAttention-3, arXiv:2407.08608). ``smooth_k``
takes the mean over tokens out of k before it is quantised (SageAttention, arXiv:2410.02367): softmax does not see a
constant added to all scores of a query, and the rows of ds sum to zero, so all six products stay exact.

What a format sees. One matrix is one key/value head: the G query heads that share it are folded into its rows, so dv
and dk sum over them inside the product. ``block: [0, 0]`` is therefore one scale a head, and not one a layer. The
queries come in blocks of 128, with every key they may see: k and v are quantised once a head, and q, do, p and ds
block by block, so memory stays O(tokens), and p is computed again in the backward. Each product quantises the original
tensors for itself. Nothing masked can enter: p and ds are zero there, and a format that has no zero, or a rotation
along the keys of pv (which would spread rounding errors over them), is refused. What does cross the mask, within
rounding errors, is a scale that spans several tokens, as ``block: [0, 0]`` does, and the mean of ``smooth_k``.

What this is not: a fast kernel. It is the definition in plain torch (products of dequantised operands in fp32),
whatever backend serves the linear layers.

Shapes: B batch, T tokens, H query heads, K key/value heads, G = H / K, D head_dim; N = B K matrices, S queries of a
block, R = G S rows of a block, U keys that a block sees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowprec.linear import oracle
from lowprec.linear.call import Policy
from lowprec.linear.parse import at, mapping, parse_operand, parse_rotation, pick
from lowprec.linear.recipe import Gemm, Operand
from lowprec.numerics import Clock, Format, Stream

PRODUCTS: dict[str, tuple[str, str]] = {
    "qk": ("q", "k"), "pv": ("p", "v"), "dv": ("p", "do"), "dp": ("do", "v"), "dq": ("ds", "k"), "dk": ("ds", "q"),
}  # fmt: skip
"""The products by name, each with the names of its operands ``a`` and ``b``."""

ROUNDINGS = ("nearest", "stochastic")
BLOCK_TOKENS = 128
"""Queries that are computed, and quantised, together."""

_EQUATIONS = {
    "qk": "s = q k^T", "pv": "o = p v", "dv": "dv = p^T do",
    "dp": "dp = do v^T", "dq": "dq = ds k", "dk": "dk = ds^T q",
}  # fmt: skip
_AXES = {
    "qk": "TTD",
    "dp": "TTD",
    "pv": "TDT",
    "dv": "TDT",
    "dq": "TDT",
    "dk": "TDT",
}  # rows of a, rows of b, contracted

PLAIN = Gemm()

Core = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""What a model's attention calls: (q_BHTD, k_BKTD, v_BKTD, bias_B1TT or None = causal) -> y_BHTD in q's dtype."""


@dataclass(frozen=True)
class AttentionRecipe:
    """How the six products are quantised; ``PLAIN`` leaves one in the layer's dtype."""

    qk: Gemm = PLAIN
    pv: Gemm = PLAIN
    dv: Gemm = PLAIN
    dp: Gemm = PLAIN
    dq: Gemm = PLAIN
    dk: Gemm = PLAIN
    smooth_k: bool = False

    def __post_init__(self) -> None:
        for product, names in PRODUCTS.items():
            gemm: Gemm = getattr(self, product)
            a, b = (Operand(o.format, o.rounding) for o in (gemm.a, gemm.b))
            if gemm != Gemm(a, b, gemm.inner):
                raise ValueError(
                    f"attention.{product}: operands have a format and a rounding, a product has inner only"
                )
            for name, operand in zip(names, (gemm.a, gemm.b)):
                where, format = f"attention.{product}.{name}", operand.format
                if operand.rounding not in ROUNDINGS:
                    raise ValueError(f"{where}: unknown rounding '{operand.rounding}'; choose {' or '.join(ROUNDINGS)}")
                if name in ("p", "ds") and format and format.element_type.round(torch.zeros(1)).item() != 0:
                    raise ValueError(
                        f"{where}: format {format.name} has no zero, so masked tokens would be seen; use another"
                    )
            if gemm.inner is not None and gemm.inner.size == 0 and _AXES[product][2] != "D":
                raise ValueError(f"attention.{product}: size: full rotates head_dim, of qk and dp; give a power of two")
        if self.pv.inner is not None:
            raise ValueError(
                "attention.pv: a rotation along the keys would spread rounding errors over masked tokens; rotate qk"
            )

    def describe(self) -> str:
        """The recipe as six equations; ``~`` marks stochastic rounding."""
        lines = []
        for product, (a, b) in PRODUCTS.items():
            gemm: Gemm = getattr(self, product)
            turn = f", contracted axis rotated by {gemm.inner}" if gemm.inner else ""
            lines.append(f"{product}  {_EQUATIONS[product]}  with  {a}: {gemm.a}, {b}: {gemm.b}{turn}")
        smooth = "; k without its mean over tokens" if self.smooth_k else ""
        return "\n".join([*lines, f"softmax in fp32{smooth}; computed in plain torch, whatever the backend"])


def attention_recipe(node: object, formats: Mapping[str, Format], where: str = "attention") -> AttentionRecipe | None:
    """Parse the ``attention`` key of a precision file.

    Args:
        node: None or ``bf16`` (off); the name of a shipped ``*_attention`` precision file, whose attention is taken;
            or a mapping of ``smooth_k`` and the products, each a mapping of its two operands (a format's name or
            {format, rounding}) and ``inner`` {size, signs, rounds}. What is left out stays in the layer's dtype.
        formats: all that may be named.
        where: what errors call the node.

    Raises:
        ValueError: one sentence that names the wrong key, name or value and lists what is valid.
    """
    if node is None or node == "bf16":
        return None
    if isinstance(node, str):
        from lowprec.linear.precision import RECIPES_FOLDER, load_precision  # by need: it calls this function

        shipped = sorted(path.stem for path in RECIPES_FOLDER.glob("*_attention.yaml"))
        return load_precision(pick("attention", node, ["bf16", *shipped], where)).attention
    fields = mapping(node, ("smooth_k", *PRODUCTS), where)
    smooth_k = fields.pop("smooth_k", False)
    if not isinstance(smooth_k, bool):
        raise ValueError(f"{where}.smooth_k: expected true or false, got {smooth_k!r}")
    gemms = {}
    for product, spec in fields.items():
        here, names = f"{where}.{product}", PRODUCTS[product]
        keys = {} if spec is None or spec == "bf16" else mapping(spec, (*names, "inner"), here)
        a, b = (parse_operand(keys.get(name), formats, f"{here}.{name}") for name in names)
        inner = parse_rotation(keys.get("inner"), f"{here}.inner")
        with at(here):
            gemms[product] = Gemm(a, b, inner)
    return AttentionRecipe(**gemms, smooth_k=smooth_k)


class _Heads:
    """One attention call seen as N matrices, in blocks of queries: what the forward and the backward share."""

    def __init__(
        self, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, bias_B1TT: Tensor | None, recipe: AttentionRecipe,
        stream: Stream,
    ) -> None:  # fmt: skip
        self.batch, self.kv_heads, self.tokens, self.width = k_BKTD.shape
        self.q_NGTD, self.v_NTD = self.grouped(q_BHTD), v_BKTD.flatten(0, 1)
        self.k_NTD = k_BKTD.flatten(0, 1)
        if recipe.smooth_k:
            self.k_NTD = self.k_NTD.float() - self.k_NTD.float().mean(dim=1, keepdim=True)
        self.bias_B1TT, self.recipe, self.stream, self.dtype = bias_B1TT, recipe, stream, q_BHTD.dtype

    def grouped(self, x_BHTD: Tensor) -> Tensor:
        """x_NGTD: the query heads of one key head together."""
        return x_BHTD.reshape(self.batch * self.kv_heads, -1, self.tokens, self.width)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(first, last + 1) token of every block of queries; it sees the keys before its end."""
        for start in range(0, self.tokens, BLOCK_TOKENS):
            yield start, min(start + BLOCK_TOKENS, self.tokens)

    def operand(self, product: str, side: str, x_NRC: Tensor, start: int | None = None) -> Tensor:
        """The values (fp32, same shape but for padding) that an operand has in a product; ``start`` names a block."""
        gemm: Gemm = getattr(self.recipe, product)
        spec: Operand = getattr(gemm, side)
        name = PRODUCTS[product][side == "b"] + ("" if start is None else f".{start}")
        matrices, rows, width = x_NRC.shape
        x_NRC = x_NRC.to(self.dtype) if spec.format is None else x_NRC
        if gemm.inner is not None:
            x_NRC = F.pad(x_NRC, (0, -width % (gemm.inner.size or width)))
        if spec.format is None and gemm.inner is None:
            return x_NRC.float()

        def prepared(x_RC: Tensor, spec: Operand, name: str) -> Tensor:
            q = oracle.prepare(x_RC.contiguous(), spec, gemm.inner, self.stream, f"attn.{product}", name)
            return q.blockscaled() * q.tensor_scale

        free = spec.format.block[0] if spec.format else 1
        if spec.format and (spec.format.tensor_scale is True or rows % (free or rows)):
            # a scale or a block that would span two heads: one by one
            return torch.stack([prepared(x_RC, spec, f"{name}.{n}") for n, x_RC in enumerate(x_NRC)])
        if spec.format and free == 0:
            one_head = dataclasses.replace(spec.format, block=(rows, spec.format.block[1]))
            spec = dataclasses.replace(spec, format=one_head)
        return prepared(x_NRC.flatten(0, 1), spec, name).unflatten(0, (matrices, rows))

    def multiply(self, product: str, a_NRC: Tensor, b_NXC: Tensor, start: int) -> Tensor:
        """``a b^T`` in fp32, b already an operand; where it has more contracted keys than a, they are cut."""
        a_NRC = self.operand(product, "a", a_NRC, start)
        return a_NRC @ b_NXC[..., : a_NRC.shape[-1]].mT

    def probabilities(self, k_NTD: Tensor, start: int, stop: int) -> Tensor:
        """p_NRU in fp32, of the queries [start, stop) over the keys [0, stop); k_NTD is the operand of qk."""
        s_NRU = self.multiply("qk", self.rows(self.q_NGTD, start, stop), k_NTD[:, :stop], start) * self.width**-0.5
        s = s_NRU.view(self.batch, self.kv_heads, -1, stop - start, stop)
        if self.bias_B1TT is None:
            index = torch.arange(stop, device=s.device)
            s.masked_fill_(index > index[start:, None], -torch.inf)
        else:
            s += self.bias_B1TT[:, :, None, start:stop, :stop]
        return s_NRU.softmax(dim=-1)

    @staticmethod
    def rows(x_NGTD: Tensor, start: int, stop: int) -> Tensor:
        """x_NRD: a block's queries of all G heads."""
        return x_NGTD[:, :, start:stop].flatten(1, 2)


class AttentionFunction(torch.autograd.Function):
    """Causal attention with the products of an :class:`AttentionRecipe`; the stream is kept for the backward."""

    @staticmethod
    def forward(
        ctx: Any, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, bias_B1TT: Tensor | None, recipe: AttentionRecipe,
        stream: Stream,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(q_BHTD, k_BKTD, v_BKTD, bias_B1TT)
        ctx.recipe, ctx.stream = recipe, stream
        heads = _Heads(q_BHTD, k_BKTD, v_BKTD, bias_B1TT, recipe, stream)
        k_NTD, v_NDT = heads.operand("qk", "b", heads.k_NTD), heads.operand("pv", "b", heads.v_NTD.mT)
        y_NGTD = q_BHTD.new_empty(heads.q_NGTD.shape)
        for start, stop in heads.blocks():
            p_NRU = heads.probabilities(k_NTD, start, stop)
            y_NRD = heads.multiply("pv", p_NRU, v_NDT, start)
            y_NGTD[:, :, start:stop] = y_NRD.unflatten(1, (-1, stop - start)).to(y_NGTD.dtype)
        return y_NGTD.view(q_BHTD.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_BHTD, k_BKTD, v_BKTD, bias_B1TT = ctx.saved_tensors
        heads = _Heads(q_BHTD, k_BKTD, v_BKTD, bias_B1TT, ctx.recipe, ctx.stream)
        k_NTD, kt_NDT = heads.operand("qk", "b", heads.k_NTD), heads.operand("dq", "b", heads.k_NTD.mT)
        v_NTD, do_NGTD = heads.operand("dp", "b", heads.v_NTD), heads.grouped(grads[0])
        dq_NGTD = q_BHTD.new_empty(heads.q_NGTD.shape)
        dk_NTD, dv_NTD = k_BKTD.new_zeros((2, *heads.k_NTD.shape), dtype=torch.float32)
        for start, stop in heads.blocks():
            p_NRU = heads.probabilities(k_NTD, start, stop)
            q_NRD, do_NRD = heads.rows(heads.q_NGTD, start, stop), heads.rows(do_NGTD, start, stop)
            dv_NTD[:, :stop] += heads.multiply("dv", p_NRU.mT, heads.operand("dv", "b", do_NRD.mT, start), start)
            dp_NRU = heads.multiply("dp", do_NRD, v_NTD[:, :stop], start)
            ds_NRU = p_NRU * (dp_NRU - (p_NRU * dp_NRU).sum(dim=-1, keepdim=True))
            dq_NRD = heads.multiply("dq", ds_NRU, kt_NDT, start) * heads.width**-0.5
            dq_NGTD[:, :, start:stop] = dq_NRD.unflatten(1, (-1, stop - start)).to(dq_NGTD.dtype)
            dk_NTD[:, :stop] += heads.multiply("dk", ds_NRU.mT, heads.operand("dk", "b", q_NRD.mT, start), start)
        dk_NTD *= heads.width**-0.5
        if ctx.recipe.smooth_k:  # the adjoint of taking the mean out; zero up to rounding errors of ds
            dk_NTD -= dk_NTD.mean(dim=1, keepdim=True)
        dk, dv = (x.to(heads.dtype).view(k_BKTD.shape) for x in (dk_NTD, dv_NTD))
        return dq_NGTD.view(q_BHTD.shape), dk, dv, None, None, None


class AttentionCore:
    """What a plan puts in the place of a model's attention core; ``recipe = None`` is the model's own again."""

    def __init__(self, plain: Core, recipe: AttentionRecipe | None, clock: Clock, layer: str, policy: Policy) -> None:
        self.plain, self.recipe, self.clock, self.layer, self.policy = plain, recipe, clock, layer, policy

    def __call__(self, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, bias_B1TT: Tensor | None) -> Tensor:
        """Causal attention -> y_BHTD in q's dtype. bias None = plain causal; else it must hold the causal mask too."""
        if self.recipe is None:
            return self.plain(q_BHTD, k_BKTD, v_BKTD, bias_B1TT)
        if self.policy.pad == "refuse":
            self._refuse_ragged(self.recipe, *q_BHTD.shape[2:])
        stream = self.clock.stream(self.layer)
        y_BHTD: Tensor = AttentionFunction.apply(q_BHTD, k_BKTD, v_BKTD, bias_B1TT, self.recipe, stream)
        return y_BHTD

    def _refuse_ragged(self, recipe: AttentionRecipe, tokens: int, width: int) -> None:
        for product, axes in _AXES.items():
            for axis, multiple in zip(axes, getattr(recipe, product).multiples):
                size, name = (tokens, "tokens") if axis == "T" else (width, "head_dim")
                if size % multiple:
                    raise ValueError(
                        f"layer '{self.layer}': attention.{product} has blocks of {multiple}, but there are {size} "
                        f"{name}; set pad: zero or other sizes"
                    )


def apply_attention(
    model: nn.Module, recipe: AttentionRecipe | None, clock: Clock, policy: Policy
) -> dict[str, AttentionCore]:
    """Put the recipe into every attention of a model, in place.

    Args:
        model: its attention modules are those with an attribute ``core``, a callable as :data:`Core` describes.
        recipe: None changes nothing.
        clock, policy: as of the linear layers.

    Returns:
        The new cores by the name of their module; set ``.recipe`` of one to None or to another recipe at any time.

    Raises:
        ValueError: if there is a recipe but no such module.
    """
    if recipe is None:
        return {}
    sites = {name: module for name, module in model.named_modules() if callable(getattr(module, "core", None))}
    if not sites:
        raise ValueError("the precision file has an attention recipe, but no module of the model has an attention core")
    cores = {}
    for name, module in sites.items():
        plain = module.core.plain if isinstance(module.core, AttentionCore) else module.core
        cores[name] = module.core = AttentionCore(plain, recipe, clock, name, policy)
    return cores
