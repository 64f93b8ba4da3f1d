# torch and timm export more than they say, and take more than their types allow:
# pyright: reportMissingImports=false, reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false
"""timm's model in training under torch's DistributedDataParallel, a process a device: what a mesh of ours is compared with."""

import time
from dataclasses import asdict
from typing import Any

from bench.marked import out_of_memory, say
from bench.peers import on_torch
from bench.timing import summary


def sweep(request: dict[str, Any]) -> None:
    """As `bench.trial.sweep`, of a training step on request["data"] devices; `batches` are of all of them."""
    import torch.multiprocessing as processes

    if request["mode"] != "train":
        raise ValueError("a peer on several devices trains and no more: --mode train")
    processes.spawn(_work, args=(request, on_torch.free_port()), nprocs=request["data"])


def _work(rank: int, request: dict[str, Any], port: int) -> None:
    import torch

    gpu = torch.cuda.is_available()
    device = torch.device(f"cuda:{rank}" if gpu else "cpu")
    if gpu:
        torch.cuda.set_device(device)
    address, cards = f"tcp://127.0.0.1:{port}", request["data"]
    torch.distributed.init_process_group("nccl" if gpu else "gloo", init_method=address, rank=rank, world_size=cards)
    try:
        for batch in request["batches"]:
            _time(rank, request, device, batch, torch)
        if rank == 0:
            say({"end": "all batch sizes measured"})
    except Exception as error:
        if not out_of_memory(error):
            raise
        if rank == 0:
            say({"end": "out of memory"})
    finally:
        torch.distributed.destroy_process_group()


def _time(rank: int, request: dict[str, Any], device, batch: int, torch) -> None:
    """Says the images/s of one batch size, on process 0."""
    gpu, cards = device.type == "cuda", request["data"]
    module, config = on_torch.build(request, device)
    module = on_torch.compiled(module.train(), request["compile"])
    model = torch.nn.parallel.DistributedDataParallel(module, device_ids=[rank] if gpu else None)
    fused = {"fused": True} if gpu else {}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, **fused)
    dtype = getattr(torch, request["dtype"])
    x = torch.randn((batch // cards, 3, *config.image_shape), device=device)
    labels = torch.arange(batch // cards, device=device) % config.num_classes

    def step() -> float:
        begun = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = torch.nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    for _ in range(3):
        step()
    # as many steps on every process, by the clock of the slowest
    count = torch.tensor(max(5.0, request["seconds"] / step()), device=device)
    torch.distributed.all_reduce(count, op=torch.distributed.ReduceOp.MIN)
    timing = summary([step() for _ in range(int(count.item()))], 1)
    if rank == 0:
        say({"batch": batch, "images_per_second": batch / timing.median, **asdict(timing), "used": 0})
