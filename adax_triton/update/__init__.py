"""The mathematics of one tensor, in PyTorch."""
