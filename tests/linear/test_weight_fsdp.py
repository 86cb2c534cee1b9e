"""FSDP2 that gathers codes trains bit for bit as FSDP2 that gathers bf16, on two real ranks."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lowprec.linear import QuantizedLinear, load_recipe
from lowprec.linear.weight import (
    CodedWeight,
    codes_refusal,
    encode_weight,
    local_amax,
    needs_amax,
    payload,
    payload_bytes,
)
from lowprec.numerics import Clock
from tests.ranks import run

pytestmark = pytest.mark.distributed
RECIPES = ("nvfp4", "halo1_int8", "tetrajet_v2")
WIDTH, INNER, STEPS = 64, 96, 3


class Gather:
    """The least that makes FSDP2 gather a layer's codes."""

    def __init__(self, layer):
        self.layer, self.amax, self.payload, self.scale = layer, None, None, None
        rows = layer.weight._local_tensor
        assert codes_refusal(layer.recipe, *rows.shape) is None
        rows.fsdp_pre_all_gather, rows.fsdp_post_all_gather = self.before, self.after

    def own_amax(self):
        return local_amax(self.layer.weight.to_local(), self.layer.recipe)

    def new_step(self, amax):
        """After the optimizer: the whole weight has another maximum, the rows other codes."""
        self.amax, self.payload = amax, None

    def before(self, mesh, outer_size, outer_stride, module, mp_policy):
        if self.payload is None:  # the backward gathers what the forward has encoded
            rows, recipe = self.layer.weight.to_local().detach(), self.layer.recipe
            q = encode_weight(rows, recipe, self.amax if needs_amax(recipe) else None)
            self.payload, self.scale = payload(q), q.tensor_scale
        return (self.payload,), tuple(outer_size)

    def after(self, outputs, shape, dtype, *, out=None):
        if out is not None:
            return out.refill(self.layer.recipe, self.scale)
        bytes_WB = outputs[0].view(dist.get_world_size(), -1)
        return CodedWeight.of(bytes_WB, self.layer.recipe, shape, self.scale, dtype), outputs


class Block(nn.Module):
    def __init__(self, name, recipe, clock):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)  # a parameter that is gathered as it is, next to codes
        self.up = QuantizedLinear(WIDTH, INNER, recipe=recipe, clock=clock, layer=f"{name}.up")
        self.down = QuantizedLinear(INNER, WIDTH, bias=False, recipe=recipe, clock=clock, layer=f"{name}.down")

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


def train(recipe, coded, reshard):
    """Outputs, input gradients, gradients and weights of every step, and what type the unsharded weights had."""
    torch.manual_seed(0)
    clock = Clock(1)
    model = nn.Sequential(*(Block(f"layers.{i}", load_recipe(recipe), clock) for i in range(2)))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model:
        fully_shard(block, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mp_policy=policy, reshard_after_forward=reshard)
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    gathers = [Gather(layer) for layer in layers] if coded else []
    optimizer, seen, types = torch.optim.SGD(model.parameters(), lr=0.5), [], set()
    model[1].down.register_forward_hook(lambda layer, *_: types.add(type(layer.weight).__name__))
    for clock.step in range(STEPS):
        if gathers:
            amaxes = torch.stack([gather.own_amax() for gather in gathers])
            dist.all_reduce(amaxes, dist.ReduceOp.MAX)  # of all layers in one
            for gather, amax in zip(gathers, amaxes):
                gather.new_step(amax)
        for clock.micro in range(2):
            data = torch.Generator().manual_seed(10 * clock.step + 2 * clock.micro + dist.get_rank())
            x = torch.randn(24, WIDTH, generator=data).bfloat16().requires_grad_()
            y = model(x)
            y.float().square().mean().backward()
            seen += [y.detach(), x.grad]
        seen += [p.grad.to_local().clone() for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        seen += [p.to_local().detach().clone() for p in model.parameters()]
    params = model[0]._get_fsdp_state()._fsdp_param_group.fsdp_params
    [gathered] = [p.all_gather_outputs[0] for p in params if p._module_info.module is model[0].down]
    return [t.float().numpy() for t in seen], types, (gathered.dtype, gathered.numel())


def compare(reshard):
    """Whether all numbers are equal, by recipe."""
    equal = {}
    for recipe in RECIPES:
        (plain, plain_types, _), (codes, codes_types, gathered) = (train(recipe, c, reshard) for c in (False, True))
        assert plain_types == {"Parameter"} and codes_types == {"CodedWeight"}
        assert gathered == (torch.uint8, 2 * payload_bytes(load_recipe(recipe), WIDTH // 2, INNER))
        equal[recipe] = [bool((a == b).all()) for a, b in zip(plain, codes, strict=True)]
    return equal


@pytest.mark.parametrize("reshard", [True, False])
def test_gathering_codes_trains_as_gathering_bf16(reshard):
    """Outputs, gradients and weights of three steps of two micro-batches are equal; what was gathered are the codes."""
    for equal in run(2, compare, reshard):
        assert all(all(numbers) for numbers in equal.values()), equal
