"""Report the kernel for each device and dtype; check its results."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import time

import torch

from adax_triton.optimizers import AdaX, AdaXW
from adax_triton.state.precision import PARAM_DTYPES
from adax_triton.step.backend import REFERENCE, backend_of, explain_backend, has_triton
from adax_triton.step.cpu_kernel import build_problem, describe_cache, instruction_set
from adax_triton.update.coefficients import COEFFICIENT_KEYS, step_scalars
from adax_triton.update.reference import adax_update

_CHECK_SIZES = (1, 1000, 4099)
_CHECK_STEPS = 3
# Largest absolute error in float32 after three steps with lr 5e-3 on weights near 1.
_CHECK_TOLERANCE = 1e-6


def main() -> int:
    """Print the report; return 0 if all checks pass, else 1."""
    print("versions")
    for name, version in versions().items():
        print(f"  {name:<12}{version or 'absent'}")
    print("devices")
    for device in devices():
        print(f"  {device_name(device)}")
        for dtype in PARAM_DTYPES:
            backend, why = explain_backend(device, dtype)
            print(f"    {str(dtype).removeprefix('torch.'):<12}{backend:<10}{why}")
    print(f"cache of CPU kernels\n  {describe_cache()}")
    # Keep this order: triton_check() sets TRITON_INTERPRET, which changes the kernel for CPU tensors, and must set it
    # before DeepSpeed imports Triton.
    native_ok, native = native_check()
    triton_ok, triton = triton_check()
    print(f"self-check\n  {native}\n  {triton}")
    deepspeed_ok, deepspeed = deepspeed_check()
    print(f"DeepSpeed\n  {deepspeed}")
    return 0 if native_ok and triton_ok and deepspeed_ok else 1


def versions() -> dict[str, str | None]:
    """Return {package: version}; None if it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("adax-triton", "torch", "triton", "deepspeed"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def devices() -> list[torch.device]:
    """Return the CPU and all accelerators that PyTorch finds."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if accelerator else 0
    return [torch.device("cpu"), *(torch.device(accelerator.type, index) for index in range(count) if accelerator)]


def device_name(device: torch.device) -> str:
    """Return a device's name for the report."""
    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}"
    return f"{device}: threads: {torch.get_num_threads()}" if device.type == "cpu" else str(device)


def deepspeed_check() -> tuple[bool, str]:
    """Return (ok, message) of the check that DeepSpeed finds AdaX.

    Not ok if DeepSpeed is installed but cannot find AdaX.
    """
    if versions()["deepspeed"] is None:
        return True, 'not installed; pip install "adax-triton[deepspeed]" adds it'
    try:
        from adax_triton.integrations import deepspeed  # noqa: F401
    except Exception as error:  # report any import error
        return False, f"installed, but the adapter cannot be imported: {type(error).__name__}: {error}"
    if getattr(torch.optim, "adax", None) is not AdaX:  # DeepSpeed looks up the lower-cased type in torch.optim
        return (
            False,
            'installed, but "type": "AdaX" does not find this optimizer: torch.optim.adax is another class or missing',
        )
    return True, '"optimizer": {"type": "AdaX"} works after `import adax_triton.integrations.deepspeed`'


def native_check() -> tuple[bool, str]:
    """Compare the native CPU kernel with the float64 reference.

    Builds the kernel if necessary.
    """
    problem = build_problem()
    if problem is not None:
        return True, f"CPU tensors use the reference in PyTorch, several times slower: {problem}"
    return _check(torch.device("cpu"), f"the native kernel on cpu with {instruction_set()}")


def triton_check() -> tuple[bool, str]:
    """Compare the Triton kernel with the float64 reference, interpreted without a GPU."""
    cuda = torch.cuda.is_available()
    if not cuda and importlib.util.find_spec("numpy") is None:
        return True, "the Triton kernel is not checked: without a GPU its interpreter needs numpy; pip install numpy"
    if not has_triton():
        missing = "Triton is not installed; run `pip install triton`"
        return not cuda, missing if cuda else f"the Triton kernel is not checked: {missing} if you have a GPU"
    if not cuda:
        # Takes effect only before Triton is first imported.
        os.environ["TRITON_INTERPRET"] = "1"
    device = torch.device("cuda" if cuda else "cpu")
    return _check(device, f"the Triton kernel on {device_name(device) if cuda else 'cpu, in the interpreter'}")


def _check(device: torch.device, kernel: str) -> tuple[bool, str]:
    start = time.perf_counter()
    try:
        largest = _largest_error(device)
    except Exception as error:  # report any kernel error
        return False, f"{kernel} does not run: {type(error).__name__}: {error}"
    verdict = "agrees" if largest <= _CHECK_TOLERANCE else "DISAGREES"
    return largest <= _CHECK_TOLERANCE, (
        f"{kernel} {verdict} with the float64 reference: largest error {largest:.1e} after {_CHECK_STEPS} steps, "
        f"tolerance {_CHECK_TOLERANCE:.0e}, checked in {time.perf_counter() - start:.1f} s"
    )


def _largest_error(device: torch.device) -> float:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(size, generator=generator).to(device).requires_grad_() for size in _CHECK_SIZES]
    exact = [param.detach().double() for param in params]
    moments = [(torch.zeros_like(param), torch.zeros_like(param)) for param in exact]
    optimizer = AdaXW(params)
    if backend_of(device, torch.float32) == REFERENCE:
        raise RuntimeError(explain_backend(device, torch.float32)[1])
    (group,) = optimizer.param_groups
    hyperparameters = {key: group[key] for key in COEFFICIENT_KEYS}
    for step in range(1, _CHECK_STEPS + 1):
        scalars = step_scalars(step=step, **hyperparameters)
        for param, target, moment in zip(params, exact, moments, strict=True):
            param.grad = torch.randn(param.shape, generator=generator).to(device)
            adax_update(target, param.grad.double(), *moment, **scalars._asdict())
        optimizer.step()
    return max((param.double() - target).abs().max().item() for param, target in zip(params, exact, strict=True))
