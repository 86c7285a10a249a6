"""Code that all benchmarks share.

It has the environment, providers, workloads, correctness check, clock, tables and command line.
"""
