"""Convert state dicts between optimizers and precisions."""
