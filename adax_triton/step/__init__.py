"""Turn parameter groups into kernel launches and run one optimizer step."""
