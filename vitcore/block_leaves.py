"""The parameters of the halves of a block, as lists of `Leaf`: attention, the paper's MLP and a gated one.

A list is of one layer, with neither the layer axis nor "blocks" in front (`vitcore/blocks.py`).
"""

from vitcore.parameters import COLUMNS, ROWS, Leaf, Name, Split, dense, norm, normal, xavier, zeros

# Which of q, k and v have a bias, by `ViTConfig.qkv_bias`
QKV_BIASES = {"qkv": ("query", "key", "value"), "qv": ("query", "value"), "none": ()}


def attention_leaves(config, tokens: int | None = None) -> tuple[Leaf, ...]:
    """The leaves of an attention half. tokens: that each token sees, itself included; default: all of an image."""
    d, n = config.width, config.num_heads
    h, t, seen = d // n, config.tokens, tokens or config.tokens
    heads = Split(model=("num_heads", n))
    return (
        *norm(
            ("norm1",),
            d,
            names={"release": "{block}/{norm1}", "timm": "{block}.norm1", "transformers": "{block}.{norm1}"},
        ),
        Leaf(
            path=("qkv", "kernel"),
            shape=(3, d, d),
            initial=xavier,
            split=(None, ROWS, heads._replace(rest=True)),
            key=2,
            names={
                "release": _qkv("{{block}}/{{attention}}/{0}/kernel", ("query", "key", "value"), shape=(d, n, h)),
                "timm": (Name("{block}.attn.qkv.weight", axes=(0, 2, 1), shape=(3 * d, d)),),
                "transformers": _qkv("{{block}}.{{{0}}}.weight", ("query", "key", "value"), axes=(1, 0)),
            },
            multiply_adds={"projections": 3 * t * d * d, "attention": 2 * t * seen * d},
        ),
        *_qkv_bias(config),
        Leaf(
            path=("out", "kernel"),
            shape=(d, d),
            initial=xavier,
            split=(heads._replace(data=True), COLUMNS),
            key=3,
            names={
                "release": (Name("{block}/{attention}/out/kernel", shape=(n, h, d)),),
                "timm": (Name("{block}.attn.proj.weight", axes=(1, 0)),),
                "transformers": (Name("{block}.{out}.weight", axes=(1, 0)),),
            },
            multiply_adds={"projections": t * d * d},
        ),
        Leaf(
            path=("out", "bias"),
            shape=(d,),
            initial=zeros,
            names={
                "release": (Name("{block}/{attention}/out/bias"),),
                "timm": (Name("{block}.attn.proj.bias"),),
                "transformers": (Name("{block}.{out}.bias"),),
            },
        ),
    )


def _qkv_bias(config) -> tuple[Leaf, ...]:
    """The biases of q, k and v, of those that have one."""
    d, n, has = config.width, config.num_heads, QKV_BIASES[config.qkv_bias]
    if not has:
        return ()
    whole = len(has) == 3
    return (
        Leaf(
            path=("qkv", "bias"),
            shape=(len(has), d),
            initial=zeros,
            split=(None, Split(model=("num_heads", n))),
            names={
                "release": _qkv("{{block}}/{{attention}}/{0}/bias", has, shape=(n, d // n)) if whole else (),
                "timm": (Name("{block}.attn.qkv.bias", shape=(3 * d,)),)
                if whole
                else tuple(Name(f"{{block}}.attn.{name[0]}_bias", part=(i,)) for i, name in enumerate(has)),
                "transformers": _qkv("{{block}}.{{{0}}}.bias", has),
            },
        ),
    )


def _qkv(text: str, names: tuple[str, ...], **own) -> tuple[Name, ...]:
    """The names of q, k and v where they are arrays of their own."""
    return tuple(Name(text.format(name), part=(i,), **own) for i, name in enumerate(names))


def mlp_leaves(config) -> tuple[Leaf, ...]:
    """The leaves of an MLP half."""
    d, f, t = config.width, config.mlp_dim, config.tokens
    columns = Split(model=("mlp_dim", f))
    return (
        *_mlp_norm(d),
        *dense(
            ("mlp_in",),
            (d, f),
            xavier,
            bias=normal(1e-6),
            split=(ROWS, columns._replace(rest=True)),
            key=4,
            bias_split=(columns,),
            bias_key=5,
            names={
                "release": "{block}/{mlp}/Dense_0",
                "timm": "{block}.mlp.fc1",
                "transformers": "{block}.{mlp_in}",
            },
            multiply_adds={"mlp": t * d * f},
        ),
        *_mlp_out(config, {"release": "{block}/{mlp}/Dense_1", "timm": "{block}.mlp.fc2", "transformers": "{block}.{mlp_out}"}),
    )


def _mlp_norm(width: int) -> tuple[Leaf, Leaf]:
    names = {"release": "{block}/{norm2}", "timm": "{block}.norm2", "transformers": "{block}.{norm2}"}
    return norm(("norm2",), width, names=names)


def _mlp_out(config, names) -> tuple[Leaf, Leaf]:
    d, f = config.width, config.mlp_dim
    return dense(
        ("mlp_out",),
        (f, d),
        xavier,
        bias=normal(1e-6),
        split=(Split(data=True, model=("mlp_dim", f)), COLUMNS),
        key=6,
        bias_key=7,
        names=names,
        multiply_adds={"mlp": config.tokens * d * f},
    )


def gated_leaves(config) -> tuple[Leaf, ...]:
    """The leaves of a gated MLP half: both projections of its input in one, in files in one array or in two."""
    d, f, t = config.width, config.mlp_dim, config.tokens
    columns = Split(model=("mlp_dim", f))

    def names(leaf: str, packed, axes) -> dict[str, tuple[Name, ...]]:
        v2, v3 = {"form": "dinov2"}, {"form": "dinov3"}
        own = {"timm": ("fc1_g", "fc1_x"), "transformers": ("gate_proj", "up_proj")}
        two = {
            naming: tuple(Name(f"{{block}}.mlp.{part}.{leaf}", part=(i,), axes=axes, when=v3) for i, part in enumerate(parts))
            for naming, parts in own.items()
        }
        whole = {"axes": packed, "shape": (2 * f, d) if packed else (2 * f,)}
        return {
            "timm": (Name(f"{{block}}.mlp.fc1.{leaf}", when={"form": ""}, **whole), *two["timm"]),
            "transformers": (Name(f"{{block}}.mlp.weights_in.{leaf}", when=v2, **whole), *two["transformers"]),
        }

    return (
        *_mlp_norm(d),
        Leaf(
            path=("mlp_gated", "kernel"),
            shape=(2, d, f),
            initial=xavier,
            split=(None, ROWS, columns._replace(rest=True)),
            names=names("weight", (0, 2, 1), (1, 0)),
            multiply_adds={"mlp": 2 * t * d * f},
        ),
        Leaf(
            path=("mlp_gated", "bias"),
            shape=(2, f),
            initial=normal(1e-6),
            split=(None, columns),
            names=names("bias", None, None),
        ),
        *_mlp_out(config, {"timm": "{block}.mlp.fc2", "transformers": "{block}.{gated_out}"}),
    )
