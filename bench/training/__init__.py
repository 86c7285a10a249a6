"""Training throughput of a small GPT."""
