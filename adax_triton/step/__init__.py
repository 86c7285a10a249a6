"""Turn parameter groups into kernel launches and run one optimizer step.

The step count of a host-counted parameter is an int. The step count of a device-counted parameter is a tensor on its
device, and a kernel increments it.
"""
