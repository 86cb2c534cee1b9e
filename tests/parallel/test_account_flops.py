"""FLOPs by precision: their sum is what torch counts while a model trains; each product runs in the right one."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lowprec.linear import Plan, Rule, load_precision, load_recipe
from lowprec.model import MambaConfig, ModelConfig, build, cross_entropy, flops_per_token
from lowprec.parallel.devices import ALIASES, HARDWARE, device_named, recognised
from lowprec.parallel.estimate import HARDWARE as SAME
from lowprec.parallel.ideal import flops_by_precision, ideal_s, narrowest, products

DENSE = ModelConfig(vocab_size=96, dim=32, layers=3, heads=4, kv_heads=2, ffn_dim=80)
HYBRID = replace(
    DENSE,
    layers=4,
    activation="relu2",
    rope_theta=None,
    pattern="M-*M",
    mamba=MambaConfig(heads=16, head_dim=4, groups=2, state=16),  # products of whole tiles: nothing is padded
)
B200, H100 = HARDWARE["b200"], HARDWARE["h100_sxm"]


def planned(config: ModelConfig, recipe: str, **changes: object) -> tuple[torch.nn.Module, Plan]:
    """A quantised recipe everywhere but in the head."""
    model = build(config)
    rules = (Rule("lm_head", "bf16"), Rule("*", recipe))
    plan = Plan.of(model, replace(load_precision(recipe), rules=rules, **changes))
    plan.apply(model)
    return model, plan


@pytest.mark.parametrize(
    ("config", "recipe"), [(DENSE, "bf16"), (replace(DENSE, ffn_dim=96), "nvfp4"), (HYBRID, "fp8_tensorwise")]
)
def test_what_torch_counts(config: ModelConfig, recipe: str) -> None:
    """Every matrix product of every linear layer in forward and backward, exactly; quantised or not."""
    model, plan = planned(config, recipe, backend="torch")
    model.init_weights(0)
    tokens_BT = torch.randint(96, (2, 32))
    with FlopCounterMode(display=False) as counted:
        cross_entropy(model(tokens_BT), tokens_BT)[0].backward()
    matrices = sum(counted.get_flop_counts()["Global"].get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    found = products(plan, config, 32)
    linears = [product for product in found if product.role in ("fprop", "dgrad", "wgrad")]
    assert matrices == 2 * 32 * sum(product.flops for product in linears)
    assert sum(product.flops for product in found) == pytest.approx(flops_per_token(config, 32)["total"], rel=1e-12)


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [
        ("bf16", ("bf16", "bf16", "bf16")),
        ("nvfp4", ("fp4", "fp4", "fp4")),
        ("mxfp8", ("fp8", "fp8", "fp8")),
        ("fp8_hybrid", ("fp8", "fp8", "fp8")),
        ("fp8_rowwise_hp_wgrad", ("fp8", "fp8", "bf16")),
        ("halo1_int8", ("int8", "int8", "int8")),
    ],
)
def test_the_precision_of_a_product(recipe: str, wanted: tuple[str, ...]) -> None:
    """The narrowest that holds the codes of both operands."""
    linear = load_recipe(recipe)
    assert (narrowest(linear.fprop), narrowest(linear.dgrad), narrowest(linear.wgrad)) == wanted


def test_the_device_decides_what_runs() -> None:
    """H100 has no FP4: the same run is bf16 there; the switch at 82 % makes the forward bf16 everywhere."""
    _, plan = planned(replace(DENSE, ffn_dim=96), "nvfp4_late_bf16")
    config = replace(DENSE, ffn_dim=96)
    early, late = (products(plan, config, 32, progress) for progress in (0.0, 0.9))
    assert set(flops_by_precision(early, H100)) == {"bf16"}
    assert "no FP4 units" in next(p for p in early if p.precision == "fp4").why(H100)
    _, integers = planned(config, "halo1_int8")
    assert set(flops_by_precision(products(integers, config, 32), HARDWARE["b300"])) == {"bf16"}  # INT8 is slower there
    assert "int8" in flops_by_precision(products(integers, config, 32), B200)
    before, after = flops_by_precision(early, B200), flops_by_precision(late, B200)
    assert after["fp4"] == pytest.approx(before["fp4"] * 2 / 3)
    assert sum(after.values()) == sum(before.values())
    seconds = ideal_s(before, 1000, B200, 2)
    assert seconds["fp4"] == before["fp4"] * 1000 / (9e15 * 2)


def test_devices() -> None:
    """Aliases, names that devices give themselves, and a sentence for the rest."""
    assert SAME is HARDWARE and all(name in HARDWARE for name in ALIASES.values())
    assert device_named("h100") is H100
    for name, known in [
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200_nvl72"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
    ]:
        found = recognised(name)
        assert found is not None and found.name == known
    assert recognised("NVIDIA H100 PCIe") is None  # another clock: its peak is not that of SXM
    with pytest.raises(ValueError, match="there is no device 'b400' in the table; choose one of b200"):
        device_named("b400")
    for device in HARDWARE.values():
        assert device.source and device.flops["bf16"] > 0
