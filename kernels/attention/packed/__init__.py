"""Attention of images of few tokens: many images a grid step, side by side in the rows of one product."""
