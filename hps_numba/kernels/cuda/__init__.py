"""The GPU embedding cache: kernels in Numba CUDA, their layout, and their launches."""
