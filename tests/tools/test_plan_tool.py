"""tools/plan.py: the forecast of a run, its keys and truth, the candidates of parallel=auto, errors in one sentence."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lowprec.config import from_yaml
from lowprec.tools import plan
from tests.layouts import settings, train_on

TINY = ["recipe=bf16_tiny", "train.global_batch=16", "train.micro_batch=2", "model.tie_embeddings=false"]
BIG = ["recipe=nvfp4_12b", "devices=256", "device=b200"]


def json_of(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert plan.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_12b_hybrid(capsys):
    """Published numbers: 12.31 B parameters, 62 blocks of which 2 + 8 in bf16, 10 T tokens, a switch at 82 %."""
    found = json_of(capsys, *BIG, "--what-if", "bf16,fp8_12b")
    assert round(found["parameters"] / 1e9, 2) == 12.31
    assert found["parameters"] == sum(
        size for part, size in found["parameters_by_part"].items() if part != "non_embedding"
    )
    assert (found["block_linears"], found["high_precision_linears"], found["linears"]) == (136, 20, 137)
    assert found["tokens"] == pytest.approx(10e12, rel=1e-5)
    assert len(found["layers"]) == 137 and found["layers"][-1]["rule"] == "lm_head"
    assert {layer["recipe"] for layer in found["layers"][:4]} == {"bf16"}
    steps = found["flops_by_precision"]
    assert sum(steps.values()) == pytest.approx(found["flops_per_token"] * found["tokens_per_step"])
    assert sum(product["flops"] for product in found["products"]) == pytest.approx(sum(steps.values()))
    ideal = steps["fp4"] / 256 / 9e15 + steps["bf16"] / 256 / 2.25e15
    assert found["ideal_step_s"] == pytest.approx(ideal)
    assert [phase["from"] for phase in found["phases"]] == [0.0, 0.82]
    assert found["days"] * 86400 == pytest.approx(
        found["steps"] * sum(phase["share"] * phase["step_s"] for phase in found["phases"])
    )
    assert 0 < found["utilisation"] < found["mfu"] and found["ideal_days"] < found["days"]
    assert sum(found["memory_bytes"].values()) == pytest.approx(found["memory_total_bytes"]) and found["fits"]
    assert found["memory_by_recompute"]["none"] > found["memory_by_recompute"]["full"] == found["memory_total_bytes"]
    assert (
        found["checkpoint_bytes"] == 12 * found["parameters"]
        and found["checkpoint_s"] == found["checkpoint_bytes"] / 1e10
    )
    other = found["what_if"]
    assert other["bf16"]["high_precision_linears"] == 136 and other["fp8_12b"]["high_precision_linears"] == 6
    assert other["bf16"]["ideal_step_s"] > other["fp8_12b"]["ideal_step_s"] > found["ideal_step_s"]
    assert other["bf16"]["utilisation"] == pytest.approx(other["bf16"]["mfu"])


def test_the_page_keeps_its_word(tmp_path, capsys):
    """docs/planner.md shows what the command prints, up to the layers, whose backends depend on the machine."""
    page = Path(__file__).parents[2] / "docs" / "planner.md"
    _, _, rest = page.read_text().partition("<!-- plan -->\n```text\n$ lowprec-plan ")
    command, _, rest = rest.partition("\n")
    copy = tmp_path / "page.md"
    copy.write_text("# A page\n<!-- plan -->\nold\n<!-- end of plan -->\nmore\n")
    assert plan.main([*command.split(), "--write", str(copy)]) == 0
    text = capsys.readouterr().out
    again = f"refresh it: python tools/plan.py {command} --write docs/planner.md"
    assert text.partition("\nlayers: ")[0] == rest.partition("\nlayers: ")[0], again
    written = copy.read_text()
    assert text in written and "old" not in written and written.endswith("<!-- end of plan -->\nmore\n")
    for words in ("nothing is measured", "12.31 B", "nvfp4 x nvfp4_2d", "from 82% of training", "schedule: from 82%"):
        assert words in text, words


@pytest.mark.distributed
def test_bytes_and_checkpoint_are_those_of_a_run(tmp_path, capsys):
    """Two gloo ranks: wire_bytes of metrics.jsonl, and the tensors of the checkpoint, exactly."""
    words = ["recipe=nvfp4_tiny", "comm=nvfp4_fp8", "train.steps=2", "train.sample_tokens=0"]
    words += ["model.dim=128", "model.ffn_dim=512"]
    records = train_on(2, tmp_path, *words)
    saved = tmp_path / "run"
    vocabulary = from_yaml((saved / "config.yaml").read_text()).model.vocab_size
    keys = {word.partition("=")[0] for word in words}
    kept = [word for word in settings(tmp_path) if word.partition("=")[0] not in keys | {"model.vocab_size"}]
    found = json_of(capsys, *kept, *words, f"model.vocab_size={vocabulary}", "devices=2", "device=cpu")
    assert records[-1]["wire_bytes"] == found["wire_bytes_per_step"]
    assert not {"ideal_s", "utilisation", "mfu"} & set(records[-1])  # no CPU's peak is published
    folder = max((saved / "checkpoints").glob("step_*"))
    tensors = FileSystemReader(folder).read_metadata().state_dict_metadata
    saved_bytes = sum(
        t.size.numel() * t.properties.dtype.itemsize
        for key, t in tensors.items()
        if key.startswith(("model.", "optim.")) and isinstance(t, TensorStorageMetadata) and t.size.numel() > 1
    )
    assert found["checkpoint_bytes"] == saved_bytes  # the files hold headers too, some kB a tensor


def test_the_account_of_a_layout(capsys):
    """Bytes by collective; bf16 on the wire is 6 bytes a parameter."""
    found = json_of(capsys, *TINY, "comm=bf16", "parallel=fsdp", "devices=8")
    assert found["layout"]["shard"] == 8 and found["memory_total_bytes"] > 0
    blocks, matrix = 4 * (4 * 128 * 128 + 3 * 128 * 384 + 2 * 128), 4096 * 128
    root = 2 * 2 * matrix + 4 * 128  # its matrices travel in bf16, its norm in fp32
    assert found["wire_bytes_per_step"] == {
        "weight_all_gather": 2 * 2 * blocks + root,
        "gradient_reduce_scatter": 2 * (blocks + 2 * matrix + 128),
    }
    pipe = json_of(capsys, *TINY, "parallel=pp", "--world", "4")
    assert len(pipe["stages"]) == 4 and pipe["bubble"] == 3 / (8 + 3)


def test_candidates_and_choice(capsys):
    """--parallel prints layouts, the choice and the reason; parallel=auto takes it; one rank needs no layout."""
    words = [*TINY, "devices=8", "device=h100"]
    assert plan.main([*words, "--parallel", "--rows", "2"]) == 0
    text = capsys.readouterr().out
    assert "\n->shard 8" in text and "all ranks share a node" in text
    found = json_of(capsys, *words, "--parallel")
    chosen = found["candidates"][found["chosen"]]
    assert json_of(capsys, *words, "parallel=auto")["layout"] == chosen["layout"]
    alone = json_of(capsys, *TINY, "--parallel")
    assert alone["ranks"] == 1 and alone["hardware"]["name"] in ("cpu", "h100_sxm", "b200")


def test_the_command_line_replaces_the_table(capsys):
    """Memory, links, FLOP/s and shares that are given count as they are; a device too small is said to be so."""
    given = ["--device-memory", "5e6", "--inside", "1e9", "--between", "1e8", "--flops", "1e12", "--per-node", "2"]
    found = json_of(capsys, *TINY, "devices=4", "device=b200", *given)
    hardware = found["hardware"]
    assert (hardware["memory_bytes"], hardware["inside_bytes_per_s"], hardware["per_node"]) == (5e6, 1e9, 2)
    assert hardware["flops"] == {"bf16": 1e12} and hardware["compute_share"] == 1.0 and not found["fits"]
    fp4 = json_of(capsys, *TINY, "--parallel", "--hardware", "b200", "--precision", "fp4")["hardware"]
    assert fp4["precision"] == "fp4"
    slow = json_of(capsys, *TINY, "device=b200", "--efficiency", "0.1", "--storage", "1e6")
    assert slow["step_s_by_part"]["compute"] == pytest.approx(10 * slow["ideal_step_s"])
    assert slow["checkpoint_s"] == slow["checkpoint_bytes"] / 1e6


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["recipe=nvfp4_tinny"], "there is no recipe 'nvfp4_tinny' (did you mean nvfp4_tiny?)"),
        ([*TINY, "parallel=single", "--world", "2"], "but 2 were started"),
        ([*TINY, "parallel=deepspeed_zero2"], "DeepSpeed's memory and bytes are its own"),
        ([*TINY, "devices=0"], "--devices 0 must be positive"),
        ([*TINY, "device=b400"], "there is no device 'b400' in the table"),
        ([*TINY, "--hardware", "h100_sxm", "--precision", "fp4"], "h100_sxm lists no FLOP/s in fp4"),
        ([*TINY, "parallel=auto", "--device-memory", "1e6"], "no layout of 1 ranks fits"),
        ([*TINY, "--what-if", "nvfp44"], "there is no recipe 'nvfp44'"),
        ([*TINY, "--write", __file__], "has no place for a plan"),
        (["recipe=nvfp4_12b_tiny", "parallel=tp", "devices=2"], "Mamba-2 blocks"),
    ],
)
def test_errors_are_one_sentence(words: list[str], sentence: str, capsys):
    assert plan.main(words) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_nothing_fits(capsys):
    """--parallel still prints why, and the code says so."""
    assert plan.main([*TINY, "--parallel", "--world", "2", "--device-memory", "1e6"]) == 2
    assert "would fit" in capsys.readouterr().out


def test_the_script_runs():
    """As a file, from another folder, without the package on the path."""
    script = Path(plan.__file__).resolve()
    command = [sys.executable, str(script), *TINY, "--parallel", "--world", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=120, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 0 and "->" in done.stdout, done.stderr
