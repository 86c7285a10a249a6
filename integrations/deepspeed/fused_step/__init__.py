"""ZeRO optimizer steps with fewer passes over gradients and weights."""
