"""Triton kernels of the CUDA path. Each is a plain function over tensors; the torch reference is in its test."""
