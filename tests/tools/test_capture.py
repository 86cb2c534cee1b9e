"""capture: the operands of training itself, from a run folder or a recipe, and a sentence for each mistake."""

from pathlib import Path

import pytest
import torch

from lowprec.launch.train import main as train
from lowprec.tools.capture import Loaded, capture, open_recipe, open_run
from lowprec.train.metrics import read_metrics

LAYERS = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def run(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "nvfp4"
    assert train(["recipe=nvfp4_tiny", f"run.dir={folder}", *settings]) == 0
    return folder


def test_the_next_step_of_training_has_the_same_loss_to_the_last_bit(run: Path) -> None:
    """Checkpoint of step 4 + its plan + its data = step 5 of the run: what is captured is what was trained."""
    loaded = open_run(run, 4)
    assert next_loss(loaded) == logged_loss(run, 5)
    assert [(m.step, m.number) for m in loaded.micros(3)] == [(4, 0), (4, 1), (5, 0)]


def next_loss(loaded: Loaded) -> float:
    micros = loaded.micros(2)
    return (torch.stack([loaded.backward(micro) for micro in micros]).sum() / micros[0].num_targets).item()


def logged_loss(folder: Path, step: int) -> float:
    return next(record["loss"] for record in read_metrics(folder / "metrics.jsonl") if record["step"] == step)


def test_what_a_recipe_remembers_is_loaded_too(settings: list[str], tmp_path: Path) -> None:
    """The same with maxima of earlier steps, which the checkpoint holds; without them the loss is another."""
    delayed = "precision.linear.nvfp4.fprop.x={format: nvfp4, amax: delayed, window: 3}"
    assert train(["recipe=nvfp4_tiny", delayed, f"run.dir={tmp_path}", *settings, "optim.lr=0.02"]) == 0
    loaded = open_run(tmp_path, 4)
    assert next_loss(loaded) == logged_loss(tmp_path, 5)
    for state in loaded.plan.states.values():
        state.tensors = {key: torch.zeros_like(tensor) for key, tensor in state.tensors.items()}
    assert next_loss(loaded) != logged_loss(tmp_path, 5)


def test_operands_are_those_of_the_layer(run: Path) -> None:
    """Shapes, dtype, and dy^T x is the weight gradient that autograd gives."""
    tensors = capture(run)
    assert set(tensors) == {"lm_head", *(f"layers.{i}.{name}" for i in range(2) for name in LAYERS)}
    down = tensors["layers.1.mlp.down_proj"]
    assert (down.x_TK.shape, down.w_NK.shape, down.dy_TN.shape) == ((128, 128), (64, 128), (128, 64))
    assert {t.dtype for t in vars(down).values()} == {torch.bfloat16}

    loaded = open_run(run)
    assert loaded.step == 8
    with loaded.plan.high_precision():
        loaded.backward(loaded.micros(1)[0])
    gradients = {name: layer.weight.grad.clone() for name, layer in loaded.layers().items()}  # type: ignore[union-attr]
    loaded.model.zero_grad()
    for name, c in loaded.capture(high_precision=True).items():
        dw_NK = c.dy_TN.float().T @ c.x_TK.float()
        assert (dw_NK - gradients[name]).norm() < 0.01 * gradients[name].norm()  # autograd's is rounded to bf16


def test_choice_of_layers_and_tokens(run: Path) -> None:
    """`match` is a rule's pattern, `tokens` cuts rows and changes none, and no hook or gradient stays behind."""
    whole, loaded = capture(run, "layers.{last:1}.attn.*"), open_run(run)
    cut = loaded.capture("layers.1.attn.?_proj", tokens=5)
    assert list(cut) == list(whole) == [f"layers.1.{name}" for name in LAYERS[:4]]
    for name, c in cut.items():
        assert torch.equal(c.x_TK, whole[name].x_TK[:5]) and torch.equal(c.dy_TN, whole[name].dy_TN[:5])
    assert not any(layer._forward_hooks for layer in loaded.layers().values())
    assert all(p.grad is None for p in loaded.model.parameters())


def test_a_recipe_without_a_run(settings: list[str]) -> None:
    """--recipe gives the initial weights: those of the run's own first step."""
    loaded = open_recipe("nvfp4_tiny", settings)
    weight = loaded.capture("layers.0.attn.q_proj")["layers.0.attn.q_proj"].w_NK
    generator_independent = open_recipe("nvfp4_tiny", settings).model.layers[0].attn.q_proj.weight
    assert loaded.step == 0 and torch.equal(weight, generator_independent.bfloat16())
    assert 0.015 < weight.float().std() < 0.025  # model.init_std is 0.02


def test_mistakes_get_a_sentence(run: Path, settings: list[str], tmp_path: Path) -> None:
    """No run, no checkpoint, no such step, no such layer, no such recipe or key: each says what there is."""
    with pytest.raises(ValueError, match=r"holds no config\.yaml; give the folder of a run"):
        capture(tmp_path)
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        capture(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint of step 3; it has 4, 8"):
        capture(run, step=3)
    with pytest.raises(ValueError, match=r"no linear layer matches 'nothing'; the model has layers\.0"):
        capture(run, "nothing")
    with pytest.raises(ValueError, match="tokens=0 must be at least 1"):
        capture(run, tokens=0)
    with pytest.raises(ValueError, match="unknown recipe 'nvfp4_tin'; did you mean 'nvfp4_tiny'"):
        open_recipe("nvfp4_tin")
    with pytest.raises(ValueError, match=r"recipe nvfp4_tiny: .*trian"):
        open_recipe("nvfp4_tiny", ["trian.steps=3"])
