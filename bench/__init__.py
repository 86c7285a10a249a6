"""Benchmarks, reached through `adax-triton bench`."""
