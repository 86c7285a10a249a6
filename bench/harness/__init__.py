"""Shared by all benchmarks: devices, clocks, providers, workloads."""
