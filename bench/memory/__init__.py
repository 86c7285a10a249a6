"""Memory of training, per parameter."""
