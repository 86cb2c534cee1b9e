"""tools/plan.py: the account of a run, the candidates of parallel=auto, and errors in one sentence."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lowprec.tools import plan

TINY = ["recipe=bf16_tiny", "train.global_batch=16", "train.micro_batch=2", "model.tie_embeddings=false"]


def json_of(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert plan.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_account_of_a_layout(capsys):
    """The plan of the precision, then memory and bytes by collective; bf16 on the wire is 6 bytes a parameter."""
    assert plan.main([*TINY, "parallel=fsdp_tp", "--world", "4"]) == 0
    text = capsys.readouterr().out
    for words in ("layers.0-3.attn.q_proj", "shard 2 x tp 2; 4 ranks", "memory of a rank", "activation_all_gather"):
        assert words in text
    found = json_of(capsys, *TINY, "comm=bf16", "parallel=fsdp", "--world", "8")
    assert found["layout"]["shard"] == 8 and found["memory_bytes"] > 0
    (stage,) = found["stages"]
    blocks, matrix = 4 * (4 * 128 * 128 + 3 * 128 * 384 + 2 * 128), 4096 * 128
    root = 2 * 2 * matrix + 4 * 128  # its matrices travel in bf16, its norm in fp32
    assert stage["wire_bytes"]["weight_all_gather"] == 2 * 2 * blocks + root
    assert stage["wire_bytes"]["gradient_reduce_scatter"] == 2 * (blocks + 2 * matrix + 128)
    pipe = json_of(capsys, *TINY, "parallel=pp", "--world", "4")
    assert len(pipe["stages"]) == 4 and pipe["bubble"] == 3 / (8 + 3)


def test_candidates_and_choice(capsys):
    """--parallel prints layouts, the choice and the reason; parallel=auto takes it; one rank needs no layout."""
    words = [*TINY, "--world", "8", "--hardware", "h100_sxm"]
    assert plan.main([*words, "--parallel", "--rows", "2"]) == 0
    text = capsys.readouterr().out
    assert "\n->shard 8" in text and "all ranks share a node" in text
    found = json_of(capsys, *words, "--parallel")
    chosen = found["candidates"][found["chosen"]]
    assert json_of(capsys, *words, "parallel=auto")["layout"] == chosen["layout"]
    alone = json_of(capsys, *TINY, "--parallel")
    assert alone["ranks"] == 1 and alone["hardware"]["name"] in ("cpu", "h100_sxm", "b200")


def test_the_command_line_replaces_the_data_sheet(capsys):
    """Memory, links and FLOP/s that are given count as they are."""
    given = ["--device-memory", "5e9", "--inside", "1e9", "--between", "1e8", "--flops", "1e12", "--per-node", "2"]
    hardware = json_of(capsys, *TINY, "--parallel", "--world", "4", "--hardware", "b200", *given)["hardware"]
    assert (hardware["memory_bytes"], hardware["inside_bytes_per_s"], hardware["per_node"]) == (5e9, 1e9, 2)
    assert hardware["flops"] == {"bf16": 1e12} and hardware["compute_share"] == 1.0
    fp4 = json_of(capsys, *TINY, "--parallel", "--hardware", "b200", "--precision", "fp4")["hardware"]
    assert fp4["precision"] == "fp4"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["recipe=nvfp4_tinny"], "there is no recipe 'nvfp4_tinny' (did you mean nvfp4_tiny?)"),
        ([*TINY, "--world", "3"], "cannot be shared evenly by 3 data-parallel ranks"),
        ([*TINY, "parallel=single", "--world", "2"], "but 2 were started"),
        ([*TINY, "parallel=deepspeed_zero2"], "DeepSpeed's memory and bytes are its own"),
        ([*TINY, "--world", "0"], "--world 0 must be positive"),
        ([*TINY, "--hardware", "h100_sxm", "--precision", "fp4"], "h100_sxm lists no FLOP/s in fp4"),
        ([*TINY, "parallel=auto", "--device-memory", "1e6"], "no layout of 1 ranks fits"),
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
