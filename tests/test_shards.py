"""Shards and LocalParts on one process; with several they are tested by whole runs in test_distributed.py."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from nspo2_trl.engine.eigensolvers import eigh
from nspo2_trl.layout.local_parts import LocalParts, Shards


@pytest.fixture(scope="module", autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_columns_are_cut_padded_and_gathered():
    shards = Shards(7)
    full = torch.randn(2, 3, 7)
    assert torch.equal(shards.gather(shards.cut(full)), full)
    assert torch.equal(shards.exchange(full[None])[0, 0], full)
    assert torch.equal(shards.sum(full), full)
    shards.ranks, shards.width, shards.rank = 3, 3, 2  # what the third of three ranks has of seven columns
    assert torch.equal(shards.cut(full), torch.nn.functional.pad(full[..., 6:], (0, 2)))


def test_ranks_share_the_small_matrices():
    shards, matrix = Shards(4), torch.randn(5, 3, 3, dtype=torch.float64)
    values, vectors = shards.spread(eigh, matrix @ matrix.mT)
    assert torch.equal(values, eigh(matrix @ matrix.mT)[0]) and vectors.shape == (5, 3, 3)


def test_parameters_move_to_their_columns_and_back():
    positions = torch.arange(24).view(2, 3, 4)  # two blocks; of each a parameter (3, 4) and one transposed (4, 3)
    mesh = init_device_mesh("cpu", (1,))
    params = [distribute_tensor(torch.randn(shape), mesh, [Shard(0)]) for shape in ((3, 4), (4, 3))]
    moves = LocalParts(Shards(4), [positions[0], positions[1].mT], params)
    columns = torch.zeros(2, 3, 4)
    moves.take([p.to_local() for p in params], columns)
    assert torch.equal(columns[0], params[0].to_local()) and torch.equal(columns[1], params[1].to_local().mT)
    back = [torch.zeros(3, 4), torch.zeros(4, 3)]
    moves.give(columns, back)
    assert all(torch.equal(part, param.to_local()) for part, param in zip(back, params))


def test_hybrid_sharding_is_refused():
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
    param = distribute_tensor(torch.randn(3, 4), mesh, [Replicate(), Shard(0)])
    with pytest.raises(ValueError, match="NSPO2 supports FSDP2 with .*full sharding"):
        LocalParts(Shards(4), [torch.arange(12).view(3, 4)], [param])
