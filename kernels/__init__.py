"""Triton and C++ kernels.

They read tables of addresses and scalars, and import nothing else of adax_triton.
"""
