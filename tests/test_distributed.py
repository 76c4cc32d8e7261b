"""Two processes with half the batch each train what one trains with the whole batch."""

import copy
import os
import socket
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import visattn


def network() -> nn.Module:
    """Norms in eval mode, so that half a batch is normalised like the whole."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    visattn.insert(model, visattn.CBAM)
    visattn.insert(model, visattn.NonLocal, at="stages[2]")
    return model.eval()


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 64, 64, generator=generator), torch.tensor([0, 1, 2, 3])


def half(rank: int, engine: str, folder: str) -> None:
    device = "cuda" if engine == "nccl" else "cpu"
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=(Path(folder) / "port").read_text())
    dist.init_process_group("nccl" if device == "cuda" else "gloo", rank=rank, world_size=2)
    model = network().to(device)
    images, labels = (part[2 * rank : 2 * rank + 2].to(device) for part in batch())
    if engine == "fsdp":
        mesh = dist.init_device_mesh(device, (2,))
        for inserted in visattn.insertions(model):
            assert all(p.ndim for p in inserted.parameters())  # FSDP refuses scalars
        train(fully_shard(model, mesh=mesh), images, labels)
        state = {name: p.full_tensor() for name, p in model.named_parameters()}
    else:
        train(DistributedDataParallel(model), images, labels)
        state = {name: p.detach().cpu() for name, p in model.named_parameters()}
    if rank == 0:
        torch.save(state, Path(folder) / "weights.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [
        "ddp",
        "fsdp",
        pytest.param("nccl", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")),
    ],
)
def test_two_processes_train_what_one_trains_on_both_halves(engine, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    before = network()
    alone = copy.deepcopy(before)
    train(alone, *batch())
    spawn(half, (engine, str(tmp_path)), nprocs=2)
    together = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert list(together) == [name for name, _ in alone.named_parameters()]
    moved = 0
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(together[name], parameter.detach(), rtol=1e-4, atol=1e-5)
        moved += not torch.equal(parameter, before.get_parameter(name))
    assert moved > 0.9 * len(together)
