"""What others run, to compare ours with: attention alone (`attention`), whole models on a TPU (`vit`), on torch (`on_torch`)."""

TORCH = ("timm", "transformers")  # run on a device, in a process of their own, where they are installed
FLAX = "flax"  # the public JAX release's ViT, for the TPU compiler
