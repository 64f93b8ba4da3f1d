"""What attention does, without its maps: means, class rows, distances."""
