"""What several ops share on Hopper GPUs, by Mosaic GPU."""
