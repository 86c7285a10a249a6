"""The update of one tensor in PyTorch: formulas, rounding, quantized states."""
