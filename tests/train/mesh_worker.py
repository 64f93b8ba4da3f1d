"""Ten training steps on one mesh, in a process of its own: `python mesh_worker.py DATAxMODEL OUT.npz [accumulate [remat part]]`.

Dropout is on, the batch is fixed, parameters start the same: what is left to differ between meshes is rounding.
"""

import sys

from train import mesh as meshes


def main(shape_text: str, out: str, accumulate: str = "1", remat: str = "0", part: str = "") -> None:
    shape = meshes.parse(shape_text)
    meshes.prepare(shape)

    import jax
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from train.optim import optimizer, schedule
    from train.step import StepOptions, make_init, make_train_step
    from vitcore import layers, variant

    if part:
        layers.PART = int(part)
    mesh, _ = meshes.make(shape)
    # T = 17, as wide as Nano; 8 heads and 16 examples, so that every mesh of the test divides them
    config = variant("ViT-Nano/2", image_size=8, channels=1, num_classes=10, num_heads=8, representation_size=64, dropout=0.1)
    tx = optimizer(schedule(base_lr=1e-3, total_steps=100, warmup_steps=3), base_lr=1e-3, weight_decay=0.1)
    options = StepOptions(clip_norm=1.0, accumulate=int(accumulate), remat=int(remat), polyak=0.9, label_smoothing=0.1, seed=7)
    state = make_init(config, mesh, tx, options)(jax.random.key(0))
    # a head of zeros would leave the blocks without a gradient, and Adam would blow the rounding of the first ones up
    head = state.params["head"]
    head["kernel"] = jax.device_put(0.3 * jax.random.normal(jax.random.key(1), head["kernel"].shape), head["kernel"].sharding)
    step = make_train_step(config, mesh, tx, options)
    rng = np.random.default_rng(0)
    place = NamedSharding(mesh, P("data"))
    losses, norms = [], []
    for _ in range(10):
        images = jax.device_put(rng.uniform(-1, 1, (32, 8, 8, 1)).astype(np.float32), place)
        labels = jax.device_put(rng.integers(0, 10, 32), place)
        state, metrics = step(state, images, labels)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["gradient_norm"]))
    trees = {"params": state.params, "average": state.average}
    flat = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(trees)}
    split = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves((state.params, state.opt_state)))
    flat |= {"losses": np.array(losses), "norms": np.array(norms), "devices": np.array(mesh.devices.size), "split": np.array(split)}
    np.savez(out, allow_pickle=False, **flat)


if __name__ == "__main__":
    main(*sys.argv[1:])
