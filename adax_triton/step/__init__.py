"""Turn parameter groups into kernel launches and run one optimizer step.

The step count of a host-counted parameter is an int. That of a device-counted one is a tensor on the parameter's
device, which a kernel advances.
"""
