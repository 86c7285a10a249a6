"""The state of each parameter: precision, allocation, checks, checkpoints."""
