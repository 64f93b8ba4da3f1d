"""Whether a training step fits the memory of its devices, asked of the compiled program before the first step runs.

A step that does not fit would otherwise end a run in its middle: with an evaluation, a save or a batch on its way beside it, at a
step that nobody can foretell. What is counted: the program's arguments, results and temporaries, and three batches of images
besides, one on its way to the step and two to an evaluation. An evaluation itself is a forward pass of as many images at most, and
needs less than the step.
"""

import contextlib

import jax

BESIDE = 3  # batches of images on a device beside those that the step reads


class TooLarge(ValueError):
    """A step does not fit: one line with what it needs, what there is, and what to change."""


def needed(analysis, images: int) -> int:
    """Bytes a device that a compiled step needs: of its memory analysis, and of the batches beside. images: bytes of a device's."""
    program = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return program + analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes + BESIDE * images


def limit_of(device: jax.Device) -> int | None:
    """Bytes that programs may take of a device's memory; None where nothing says, as on a CPU."""
    with contextlib.suppress(NotImplementedError, jax.errors.JaxRuntimeError):
        return (device.memory_stats() or {}).get("bytes_limit")
    return None


def check(analysis, images: int, *, limit: int, kept: int, batch_size: int, parts: int, device: str) -> None:
    """Raises TooLarge where a step of this memory analysis does not fit.

    images: bytes of the images on one device. limit: bytes there are. kept: bytes of the state on one device, which a smaller batch
    leaves as they are; all the rest is taken to grow with the batch. batch_size: of the whole run, a multiple of `parts`.
    """
    need = needed(analysis, images)
    if need <= limit:
        return
    share = max(0.0, limit - kept) / max(1, need - kept)
    fits = int(batch_size * share) // parts * parts
    smaller = f"--batch-size {fits} fits by this estimate, and " if fits else ""
    raise TooLarge(
        f"a step of {batch_size} images needs {need / 2**30:.1f} GiB on each {device}, which has {limit / 2**30:.1f} GiB for it "
        f"({kept / 2**30:.1f} GiB are the model's state): {smaller}--accumulate or --remat keep the batch and need less"
    )
