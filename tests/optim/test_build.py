"""The optimizer gets the right groups, the right class and its arguments, and keeps what bf16 would lose."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import lowprec
from lowprec.optim import ALLOWED, OptimConfig, build_optimizer, split_parameters

RECIPES = sorted((Path(lowprec.__file__).parent / "recipes" / "optim").glob("*.yaml"))


class Net(nn.Module):
    """An embedding, a matrix with a bias, a norm, and a head that may be tied."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.proj = nn.Linear(4, 4)
        self.norm = nn.RMSNorm(4)
        self.lm_head = nn.Linear(4, 8, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, x):
        return self.lm_head(self.norm(self.proj(self.embed(x))))


def names(model, parameters):
    by_id = {id(p): name for name, p in model.named_parameters()}
    return [by_id[id(p)] for p in parameters]


def test_groups():
    """Matrices decay; norms, biases and embeddings do not, unless asked; everything is in exactly one group."""
    model = Net()
    decay, rest = split_parameters(model, decay_embeddings=False)
    assert names(model, decay) == ["proj.weight", "lm_head.weight"]
    assert names(model, rest) == ["embed.weight", "proj.bias", "norm.weight"]
    decay, rest = split_parameters(model, decay_embeddings=True)
    assert names(model, decay) == ["embed.weight", "proj.weight", "lm_head.weight"]
    assert names(model, rest) == ["proj.bias", "norm.weight"]


def test_tied_and_frozen_parameters():
    """A tied weight appears once, with the embeddings; a frozen one not at all."""
    model = Net(tied=True)
    model.proj.bias.requires_grad_(False)
    optimizer = build_optimizer(model, OptimConfig())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert names(model, held) == ["proj.weight", "embed.weight", "norm.weight"]


def test_default_is_fused_adamw_with_the_given_numbers():
    """Class, learning rate, betas, eps and each group's decay are those of the config."""
    optimizer = build_optimizer(Net(), OptimConfig(lr=2e-3, weight_decay=0.3, betas=[0.8, 0.9], eps=1e-6))
    assert type(optimizer) is torch.optim.AdamW
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (2e-3, (0.8, 0.9), 1e-6, True)


def test_only_matrices_shrink():
    """With zero gradients one step multiplies the decay group by 1 - lr * weight_decay and leaves the rest."""
    model = Net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 0.95 if name in ("proj.weight", "lm_head.weight") else 1.0
        torch.testing.assert_close(p, before[name] * factor, rtol=1e-6, atol=0)


def test_fp32_masters_keep_updates_that_bf16_loses():
    """1000 steps of relative size 1e-4: fp32 masters under bf16 compute move by 10 %, pure bf16 weights not at all."""
    master = nn.Linear(1, 1, bias=False)
    nn.init.ones_(master.weight)
    low = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(low.weight)
    optimizer = build_optimizer(master, OptimConfig(lr=1e-4, weight_decay=0.0))
    pure = torch.optim.AdamW(low.parameters(), lr=1e-4, weight_decay=0.0, betas=(0.9, 0.95))
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    for _ in range(1000):
        for step, y in ((optimizer, x @ master.weight.to(x.dtype).T), (pure, low(x))):
            step.zero_grad()
            y.sum().backward()
            step.step()
    assert low.weight.item() == 1.0
    assert master.weight.item() == pytest.approx(0.9, rel=1e-3)
    state = optimizer.state[master.weight]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "cls"),
    [
        (OptimConfig("torch.optim.SGD", betas=None, eps=None, kwargs={"momentum": 0.9}), torch.optim.SGD),
        (OptimConfig("torch.optim.Adam", kwargs={"amsgrad": True}), torch.optim.Adam),
        (OptimConfig("torch.optim.NAdam"), torch.optim.NAdam),
        (OptimConfig("torch.optim.AdamW", kwargs={"foreach": False}), torch.optim.AdamW),
    ],
)
def test_other_optimizers_train(config, cls):
    """Other torch classes take the same config, with their own arguments, and lower a loss."""
    torch.manual_seed(0)
    model, x = Net(), torch.arange(8)
    optimizer = build_optimizer(model, config)
    assert type(optimizer) is cls
    assert all(optimizer.defaults[name] == value for name, value in config.kwargs.items())
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(nn.functional.cross_entropy(model(x), x))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"_target_": "os.system"}, r"not in an allowed package: it must begin with one of \['torch.optim.', "),
        ({"_target_": "torch.optimizer.AdamW"}, "not in an allowed package"),
        ({"_target_": "torch.optim.AdamX"}, r"did you mean Adam"),
        ({"_target_": "torch.optim.Optimizer"}, "is no optimizer"),
        ({"_target_": "torch.optim.lr_scheduler.StepLR"}, "is no optimizer"),
        ({"_target_": "lowprec.optim.build_optimizer"}, "is no optimizer"),
        ({"_target_": "torch.optim.nowhere.AdamW"}, "needs the module 'torch.optim.nowhere'"),
        (
            {"kwargs": {"amsgrab": True}},
            r"does not take \['amsgrab'\] \(did you mean amsgrad\?\): its arguments are \['lr'",
        ),
        ({"_target_": "torch.optim.SGD"}, r"does not take \['betas', 'eps'\].*left out with null"),
    ],
)
def test_mistakes_are_named(arguments, words):
    """A target outside the list, a name that is no optimizer and an unknown argument each raise one sentence."""
    with pytest.raises(ValueError, match=words):
        build_optimizer(Net(), OptimConfig(**arguments))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lr": 0.0}, "optim.lr is 0.0"),
        ({"weight_decay": -0.1}, "optim.weight_decay is -0.1"),
        ({"betas": [0.9, 1.0]}, r"optim.betas is \[0.9, 1.0\]"),
        ({"eps": 0.0}, "optim.eps is 0.0"),
    ],
)
def test_impossible_numbers_are_named(arguments, words):
    """Each raises one sentence when the config is made."""
    with pytest.raises(ValueError, match=words):
        OptimConfig(**arguments)


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    """An allowed package that is missing gives its name, not a traceback from inside."""
    monkeypatch.setitem(__import__("sys").modules, "torchao", None)
    with pytest.raises(ValueError, match=r"needs the module 'torchao.*install it"):
        build_optimizer(Net(), OptimConfig("torchao.optim.AdamW8bit"))


def test_low_precision_parameters_are_refused():
    """bf16 parameters cannot be masters: the sentence names the first; so does a model with nothing to train."""
    with pytest.raises(ValueError, match=r"Parameter embed.weight is torch.bfloat16: .* fp32 master weights"):
        build_optimizer(Net().bfloat16(), OptimConfig())
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(Net().requires_grad_(False), OptimConfig())


def test_allowed_prefixes_end_at_a_dot():
    """So that no other package can pass by sharing the beginning of its name."""
    assert all(prefix.endswith(".") for prefix in ALLOWED)


def test_every_recipe_builds():
    """Each YAML names every field, comments each key, and builds an optimizer whose target it names."""
    assert "adamw" in {path.stem for path in RECIPES}
    for path in RECIPES:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(OptimConfig), OmegaConf.load(path)))
        assert set(OmegaConf.load(path)) == set(OptimConfig.__dataclass_fields__)
        assert all("#" in line for line in path.read_text().splitlines())
        assert type(build_optimizer(Net(), config)).__name__ == config._target_.rpartition(".")[2]
