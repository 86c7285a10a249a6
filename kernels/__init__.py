"""Triton and C++ kernels. They take tables of addresses and scalars, and import nothing else of the package."""
