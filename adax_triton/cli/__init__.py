"""The command `adax-triton`."""
