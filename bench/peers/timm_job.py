# torch and timm export more than they say, and take more than their types allow:
# pyright: reportMissingImports=false, reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false
"""timm's way of training on a folder of images, for `bench.job` to compare our trainer with: its loader, its model, torch's DDP.

    python -m bench.peers.timm_job < request.json        marked JSON lines on stdout, as `bench.trial` has them

A request: data (a folder with train/ and val/), model, size, batch (of all cards), cards, workers (of a card), steps, every
(steps between evaluations, and saves; the clock starts at the first), dtype, dropout, tuned. As timm's users run it:
`create_loader` with its prefetcher, AdamW, autocast. tuned: pinned memory, fused AdamW and compiled blocks besides. The images are
cropped and flipped, as ours, and no more: timm's default would change their colours, which costs its workers much.
"""

import json
import multiprocessing
import os
import sys
import tempfile
import time
from typing import Any

from bench.marked import say
from bench.peers import on_torch


def _loaders(request: dict[str, Any], device, cards: int):
    """timm's loaders of train/ and val/."""
    from timm.data import ImageDataset, create_loader

    same = dict(
        input_size=(3, request["size"], request["size"]),
        batch_size=request["batch"] // cards,
        num_workers=request["workers"],
        distributed=cards > 1,
        pin_memory=request["tuned"],
        device=device,
        interpolation="bilinear",
    )
    train, val = (ImageDataset(os.path.join(request["data"], split)) for split in ("train", "val"))
    return create_loader(train, is_training=True, color_jitter=None, **same), create_loader(val, is_training=False, **same)


class _Trainer:
    """A process's part of the run."""

    def __init__(self, request: dict[str, Any], rank: int):
        from vitcore import variant

        torch = on_torch.prepare()
        torch.set_num_threads(max(1, torch.get_num_threads() // request["cards"]))  # of both, as many as cores
        self.torch, self.request, self.rank, self.cards = torch, request, rank, request["cards"]
        self.gpu = torch.cuda.is_available()
        self.device = torch.device(f"cuda:{rank}" if self.gpu else "cpu")
        if self.gpu:
            torch.cuda.set_device(self.device)
        torch.backends.cudnn.benchmark = True
        on_torch.import_timm()
        self.train, self.val = _loaders(request, self.device, self.cards)
        classes = len(self.train.dataset.reader.class_to_idx)
        config = variant(request["model"], image_size=request["size"], num_classes=classes)
        self.module: Any = on_torch.timm_model(config, dropout=request["dropout"]).to(self.device)
        if request["tuned"]:
            on_torch.compiled(self.module, "blocks")
        self.model = self.module
        if self.cards > 1:
            self.model = torch.nn.parallel.DistributedDataParallel(self.module, device_ids=[rank] if self.gpu else None)
        fused = {"fused": True} if request["tuned"] and self.gpu else {}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.05, **fused)
        self.dtype = getattr(torch, request["dtype"])

    def logits(self, images):
        with self.torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != self.torch.float32):
            return self.model(images)

    def sync(self) -> float:
        """The time, when the device is done."""
        if self.gpu:
            self.torch.cuda.synchronize()
        return time.perf_counter()

    def step(self, images, labels):
        loss = self.torch.nn.functional.cross_entropy(self.logits(images).float(), labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss

    def evaluate(self) -> float:
        """The share of val/ that is right."""
        self.model.eval()
        sums = self.torch.zeros(2, device=self.device)
        with self.torch.inference_mode():
            for images, labels in self.val:
                right = (self.logits(images.to(self.device)).argmax(-1) == labels.to(self.device)).sum()
                sums += self.torch.stack([right.float(), right.new_tensor(float(len(labels)))])
        if self.cards > 1:
            self.torch.distributed.all_reduce(sums)
        self.model.train()
        return (sums[0] / sums[1]).item()

    def save(self, folder: str) -> None:
        if self.rank == 0:
            self.torch.save({"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}, f"{folder}/last.pth")

    def run(self, folder: str) -> dict[str, Any]:
        """Trains; images/s behind the warm-up: of the steps alone, and of all that the run did."""
        request, done, aside, epoch = self.request, 0, 0.0, 0
        begun, loss, accuracy = 0.0, None, 0.0
        self.model.train()
        while done < request["steps"]:
            if self.cards > 1:
                self.train.sampler.set_epoch(epoch)
            epoch += 1
            for images, labels in self.train:
                loss = self.step(images.to(self.device), labels.to(self.device))
                done += 1
                if done % request["every"] == 0 or done == request["steps"]:
                    stood = self.sync()
                    accuracy = self.evaluate()
                    self.save(folder)
                    aside += self.sync() - stood
                    if done == request["every"]:  # all is compiled, and every worker there
                        begun, aside = self.sync(), 0.0
                    if self.rank == 0:
                        say({"step": done, "loss": float(loss.detach()), "accuracy": accuracy})
                if done == request["steps"]:
                    break
        seconds = self.sync() - begun
        images = (done - request["every"]) * request["batch"]
        assert loss is not None
        rates = {"whole": images / seconds, "training": images / (seconds - aside)}
        return {**rates, "loss": float(loss.detach()), "accuracy": accuracy}


def _work(rank: int, request: dict[str, Any], port: int, folder: str) -> None:
    """One card's process."""
    import torch

    if request["cards"] > 1:
        # torchrun's processes fork their readers; those of one that was spawned would be spawned too, one after another: minutes
        multiprocessing.set_start_method("fork", force=True)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        address = f"tcp://127.0.0.1:{port}"
        torch.distributed.init_process_group(backend, init_method=address, rank=rank, world_size=request["cards"])
    try:
        found = _Trainer(request, rank).run(folder)
    finally:
        if request["cards"] > 1:
            torch.distributed.destroy_process_group()
    if rank == 0:
        say(found)


def main() -> None:
    request = json.load(sys.stdin)
    import torch.multiprocessing as processes

    with tempfile.TemporaryDirectory() as folder:
        if request["cards"] == 1:
            _work(0, request, 0, folder)
        else:
            processes.spawn(_work, args=(request, request["port"], folder), nprocs=request["cards"])


if __name__ == "__main__":
    main()
