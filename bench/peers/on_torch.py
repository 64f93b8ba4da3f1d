# pyright: reportMissingImports=false
"""The same models by timm and by transformers, on torch: forward passes and training steps to compare ours with.

Neither is a dependency: a peer runs in its own process and only where it is installed. Both run as their users run them fast:
`scaled_dot_product_attention`, torch.compile, and in bfloat16 weights of that type for a forward pass, autocast with fused Adam
for training. The number of parameters must be ours.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import socket
import sys
import types
from collections.abc import Callable
from typing import Any

from vitcore import ViTConfig, variant
from vitcore.families import leaves
from vitcore.parameters import count


def missing(peer: str) -> str:
    """What has to be installed before `peer` can run; empty if it can."""
    names = [name for name in ("torch", peer) if importlib.util.find_spec(name) is None]
    return f"--peer {peer} needs {' and '.join(names)}: pip install {' '.join(names)}" if names else ""


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules `torchvision.*` whose every name is an empty class: timm imports some at the top of files that a ViT never uses."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = lambda name: _empty(name)
        return module

    def exec_module(self, module):
        pass


class _Anything(type):
    """A class whose every attribute is another such class."""

    def __getattr__(cls, name):
        return _empty(name)


def _empty(name: str):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything(name, (), {})


def import_timm():
    """timm's class of Vision Transformers. Where there is no torchvision, its names that timm imports are stand-ins."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # missing, or built for another torch
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.meta_path.insert(0, _StandIn())
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer


def timm_model(config: ViTConfig, *, dropout: float = 0.0):
    """timm's model of a configuration. dropout: behind the position embedding and each projection, where ours has it."""
    return import_timm()(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_dim / config.width,
        num_classes=config.num_classes,
        pos_drop_rate=dropout,
        proj_drop_rate=dropout,
    )


def _transformers(config: ViTConfig):
    from transformers import ViTConfig as Config
    from transformers import ViTForImageClassification

    model = ViTForImageClassification(
        Config(
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_size=config.width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            intermediate_size=config.mlp_dim,
            num_labels=config.num_classes,  # pyright: ignore[reportCallIssue]
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
        )
    )
    if model.config._attn_implementation != "sdpa":
        raise ValueError(f"transformers chose attention {model.config._attn_implementation!r}, not sdpa")
    return model


def _blocks(model):
    """The transformer blocks of either library's model: the longest list of equal modules."""
    import torch

    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList | torch.nn.Sequential)]
    same = [m for m in lists if len(m) > 1 and len({type(x) for x in m}) == 1]
    return max(same, key=len)


def _parameters(config: ViTConfig) -> int:
    """Parameters of our model."""
    return count(leaves(config))


def compiled(model, how: str):
    """torch.compile of the whole model, of its blocks (one compilation serves all), or none."""
    import torch

    if how == "whole":
        return torch.compile(model)
    if how == "blocks":
        for block in _blocks(model):
            block.compile()
    return model


def prepare():
    """torch, set as for all peers."""
    import torch

    torch.set_float32_matmul_precision("high")  # as jax's default on a GPU
    torch._dynamo.config.automatic_dynamic_shapes = False  # every batch size gets code of its own, as under jax.jit
    torch._dynamo.config.cache_size_limit = 256
    return torch


def build(request: dict[str, Any], device):
    """(a peer's model on a device, its configuration as ours). ValueError where the model is not ours."""
    torch = prepare()
    config = variant(request["model"], image_size=request["size"], num_classes=1000)
    rate = request.get("dropout", 0.0)
    if rate and request["library"] != "timm":
        raise ValueError(f"--dropout {rate} is for --peer timm: leave one of them out")
    with torch.device(device):  # weights are drawn where they are used
        model: Any = timm_model(config, dropout=rate) if request["library"] == "timm" else _transformers(config)
    count = sum(p.numel() for p in model.parameters())
    if count != _parameters(config):
        raise ValueError(f"{request['library']} has {count:,} parameters for {request['model']}, not {_parameters(config):,}")
    return model.to(device), config


def peer(request: dict[str, Any]) -> Callable[[int], Any]:
    """A function batch -> Stepper of a peer's model, on the GPU where torch has one, else on the CPU.

    request: library, model, size, mode, dtype, dropout, compile ("whole" | "blocks" | "off"). ValueError where the model is not
    ours.
    """
    torch = prepare()

    from bench.timing import Stepper

    gpu = torch.cuda.is_available()
    if request["platform"] == "gpu" and not gpu:
        raise ValueError("jax sees a GPU and torch does not: install a torch built for it")
    device = torch.device("cuda" if gpu else "cpu")
    dtype = getattr(torch, request["dtype"])
    model, config = build(request, device)
    train = request["mode"] == "train"
    model = model.train(train)
    if not train:
        model = model.to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True) if train else None
    model = compiled(model, request["compile"])
    sync = torch.cuda.synchronize if gpu else (lambda: None)

    def logits(x):
        out = model(x)
        return out if isinstance(out, torch.Tensor) else out.logits

    def steps(batch: int):
        x = torch.randn((batch, 3, *config.image_shape), device=device, dtype=torch.float32 if train else dtype)
        labels = torch.arange(batch, device=device) % config.num_classes

        def forward():
            with torch.inference_mode():
                logits(x)
            sync()

        def step():
            assert optimizer is not None
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                loss = torch.nn.functional.cross_entropy(logits(x), labels)
            loss.backward()
            optimizer.step()
            sync()

        if gpu:
            torch.cuda.empty_cache()
        return Stepper(step if train else forward)

    return steps
