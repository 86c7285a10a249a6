"""DeepSpeed checkpoints: save, load, convert."""
