"""Triton kernels. They take tensors of addresses and scalars, and import nothing from the rest of the package."""
