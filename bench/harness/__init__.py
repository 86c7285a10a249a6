"""Shared by all benchmarks: environment, providers, workloads, correctness check, clock, tables, command line."""
