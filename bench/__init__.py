"""Benchmarks, run by `adax-triton bench`."""
