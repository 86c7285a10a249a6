"""Triton and C++ kernels. They read tables of addresses and scalars, and import no other module."""
