"""FSDP2 on two processes: the weights, logits and gradients of one process, and RoPE in fp32 under mixed precision."""

import os
import socket
import subprocess
import sys

SCRIPT = """
import datetime, sys, torch, torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from lowprec.model import ModelConfig, build
from lowprec.parallel import end_process, stop_world
torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
def config(tied):
    return ModelConfig(vocab_size=63, dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=48, tie_embeddings=tied)
def make(shard, tied):
    with torch.device("meta"):
        model = build(config(tied), torch.float32)
    if shard:
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    model.to_empty(device="cpu").init_weights(0)
    return model
for tied in (False, True):
    one, two = make(False, tied), make(True, tied)
    assert all(isinstance(p, DTensor) for p in two.parameters())
    x = torch.randint(63, (2, 16), generator=torch.Generator().manual_seed(dist.get_rank()))
    ids = torch.arange(16).expand(2, 16) // 6
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q.full_tensor()), name
    logits = one(x, ids), two(x, ids)
    assert torch.equal(*logits)
    for y in logits:
        y.square().sum().backward()
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        dist.all_reduce(p.grad)
        torch.testing.assert_close(q.grad.full_tensor(), p.grad / 2, rtol=1e-4, atol=1e-6)
mixed = build(config(False), torch.bfloat16)
mixed.init_weights(0)
for module in (*mixed.layers, mixed):
    fully_shard(module, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
def look(module, args):
    seen.extend([args[0].dtype, args[1].cos_BT1D.dtype])
mixed.layers[1].attn.register_forward_pre_hook(look)
seen = []
mixed(x, ids)
assert seen == [torch.bfloat16, torch.float32], seen
print("same")
stop_world()
end_process(0)
"""


def test_two_ranks_hold_the_weights_of_one():
    """Sharded init draws the same values (63 rows shard unevenly); forward and backward agree, tied head included."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env=os.environ | {"RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    try:
        results = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (out, err) in zip(ranks, results):
        assert rank.returncode == 0 and out.strip() == "same", err
