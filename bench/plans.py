"""Which kernels run an op at a named shape on a TPU generation, and how they are cut: the ops' own plans, printed.

python -m bench.kernels --plan --target v3 v5e --op attention_half --shape B/16@224 --batch 64
"""

from dataclasses import fields, is_dataclass, replace
from typing import Any

import jax.numpy as jnp

from bench.shapes import SHAPES
from kernels.attention import plan as attention
from kernels.attention.tiling import Shape as AttentionShape
from kernels.device import DEVICES, Device, MiB
from kernels.layer_norm import plan as layer_norm
from kernels.mlp import plan as mlp
from kernels.patch_embed import plan as patch_embed
from kernels.vmem import limit
from vitcore import ViTConfig


def plan_of(op: str, shape: str, batch: int, dtype: str, device: Device, *, keep: bool = False) -> Any:
    """The plan that an op makes for a named shape; keep: where it can keep more than x. NotImplementedError where no tiles fit."""
    c = SHAPES[shape].config
    return of(op, c, batch, c.tokens, dtype, device, keep=keep and op == "mlp_half")


def of(op: str, c: ViTConfig, batch: int, tokens: int, dtype: Any, device: Device, *, keep: bool = False) -> Any:
    """`plan_of` a model's shape; tokens: of an image, with padding that the model adds."""
    kind = jnp.dtype(dtype)
    if op == "patch_embed":
        rows, columns = c.grid
        return patch_embed.plan(
            patch_embed.Shape(
                batch=batch,
                channels=c.channels,
                rows=rows,
                columns=columns,
                patch=c.patch_size,
                width=c.width,
                tokens=tokens,
                itemsize=kind.itemsize,
            ),
            device,
        )
    if op == "mlp_half":
        return mlp.plan(mlp.Shape(batch, tokens, c.width, c.mlp_dim, kind.itemsize), device, keep=keep)
    if op == "layer_norm":
        return layer_norm.plan((batch * tokens, c.width), device)
    of_attention = AttentionShape(batch, tokens, c.width, c.num_heads, c.width // c.num_heads, kind)
    return attention.core_plan(of_attention, device) if op == "attention" else attention.plan(of_attention, device, keep=keep)


def changed(plan: Any, changes: dict[str, Any]) -> Any:
    """A plan with other values in its fields: {"backward": {"rows": 256}} changes the rows of its part `backward`.

    ValueError for a field that there is not.
    """
    known = [f.name for f in fields(plan)]
    if unknown := set(changes) - set(known):
        raise ValueError(f"{type(plan).__name__} has no field {', '.join(sorted(unknown))}; it has {', '.join(known)}")

    def value(name: str, given: Any) -> Any:
        if isinstance(given, dict):
            return changed(getattr(plan, name), given)
        return tuple(given) if isinstance(given, list) else given

    return replace(plan, **{name: value(name, given) for name, given in changes.items()})


def lines(plan: Any, device: Device, name: str = "") -> list[str]:
    """A plan as text, a line a kernel or pass: what was chosen, the VMEM counted for it and the limit that it gets."""
    inner = [(f.name, getattr(plan, f.name)) for f in fields(plan)]
    own = [(key, value) for key, value in inner if not is_dataclass(value)]
    needs = dict(own).get("needs", 0)
    text = ", ".join(f"{key} {value}" for key, value in own if key != "needs")
    if needs:
        vmem = f"{needs / MiB:.1f} MiB of VMEM counted, limit {limit(device, needs) / MiB:.0f}"
        text = f"{text}; {vmem}" if text else vmem
    found = [f"  {name:<32}{type(plan).__name__:<18}{text}"]
    for key, value in inner:
        if is_dataclass(value):
            found += lines(value, device, f"{name}.{key}" if name else key)
    return found


def show(targets, ops, shapes, batch: int, dtype: str, *, keep: bool = False) -> list[dict[str, Any]]:
    """Prints the plans, and returns them as records."""
    records: list[dict[str, Any]] = []
    for target in targets:
        for shape in shapes:
            for op in ops:
                print(f"{target} {op} {shape}, batch {batch}, {dtype}")
                try:
                    text = lines(plan_of(op, shape, batch, dtype, DEVICES[target], keep=keep), DEVICES[target])
                except NotImplementedError as error:
                    text = [f"  {error}"]
                print("\n".join(text), flush=True)
                records.append({"target": target, "op": op, "shape": shape, "batch": batch, "dtype": dtype, "plan": text})
    return records
