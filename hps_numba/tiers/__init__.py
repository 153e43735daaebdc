"""Storage below the GPU cache."""
