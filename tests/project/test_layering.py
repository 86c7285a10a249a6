"""Who may import whom, read from the sources; and the rules of size and name that keep the tree readable."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"adax_triton": "adax_triton", "kernels": "adax_triton.kernels", "integrations": "adax_triton.integrations"}
FRAMEWORKS = {"deepspeed", "transformers", "accelerate", "lightning", "pytorch_lightning"}
# What a module of the package may import of the package; what is missing here may import nothing of ours.
ALLOWED = {
    "adax_triton": {
        *("adam", "conversion", "flat_buffer", "gradient_release", "horizon", "optimizer", "reference"),
        *("schedule", "step", "telemetry", "telemetry_logging", "version"),
    },
    "adax_triton.adam": {"control", "moment_optimizer"},
    "adax_triton.optimizer": {"control", "moment_optimizer"},
    "adax_triton.moment_optimizer": {
        *("", "checkpoint", "control", "frozen_warning", "horizon", "hyperparameters", "master_weights", "parameters"),
        *("precision", "schedule", "state_tensors", "telemetry"),
        *("step.backend", "step.collect", "step.external_grads", "step.launch", "step.plan", "step.scalars"),
    },
    "adax_triton.step.plan": {
        *("control", "device_tables", "gradient_norm", "step_counts", "telemetry", "tensor_step", "uninterrupted"),
        *("step.backend", "step.collect", "step.external_grads", "step.launch", "step.scalars", "step.unchanged"),
        "kernels",
    },
    "adax_triton.step.unchanged": {"state_tensors", "step.collect"},
    "adax_triton.step.external_grads": {
        *("compact", "control", "device_tables", "flat_buffer", "precision", "state_tensors", "step_counts"),
        *("tensor_step", "step.collect"),
    },
    "adax_triton.step.launch": {
        *("device_tables", "schedule", "telemetry", "tensor_step"),
        *("step.backend", "step.cpu_kernel", "step.reference_steps", "step.scalars"),
        "kernels",
    },
    "adax_triton.step.collect": {
        *("control", "device_tables", "flat_buffer", "parameters", "state_tensors", "step_counts"),
        *("step.backend", "step.scalars"),
    },
    "adax_triton.step.backend": {"step.cpu_kernel", "kernels"},
    "adax_triton.step.reference_steps": {"compact", "control", "reference", "schedule", "stored", "tensor_step"},
    "adax_triton.step.scalars": {"control", "device_tables", "hyperparameters", "rounding", "schedule", "kernels"},
    "adax_triton.step.cpu_kernel": {"kernels"},
    "adax_triton.gradient_release": {
        *("control", "device_tables", "gradient_norm", "moment_optimizer", "parameters", "sharding"),
    },
    "adax_triton.frozen_warning": {"step.scalars", "device_tables", "horizon", "hyperparameters", "schedule"},
    "adax_triton.gradient_norm": {"control", "step.launch"},
    "adax_triton.step_counts": {"device_tables"},
    "adax_triton.telemetry": {"device_tables", "kernels"},
    "adax_triton.telemetry_logging": {"moment_optimizer", "telemetry"},
    "adax_triton.checkpoint": {
        *("compact", "hyperparameters", "precision", "schedule", "sharding", "state_tensors", "step_counts", "stored"),
    },
    "adax_triton.compact": {"rounding"},
    "adax_triton.hyperparameters": {"precision", "schedule"},
    "adax_triton.master_weights": {"sharding", "state_tensors", "stored"},
    "adax_triton.parameters": {"precision", "sharding"},
    "adax_triton.precision": {"compact"},
    "adax_triton.sharding": {"compact"},
    "adax_triton.state_tensors": {"flat_buffer", "precision", "sharding", "tensor_step"},
    "adax_triton.stored": {"compact", "reference", "rounding", "schedule"},
    "adax_triton.tensor_step": {"compact", "flat_buffer"},
    "adax_triton.horizon": {"schedule"},
    "adax_triton.conversion": {"converted_states", "hyperparameters", "schedule"},
    "adax_triton.converted_states": {"hyperparameters", "step_counts"},
    "adax_triton.device_tables": {"kernels.tables"},
    "adax_triton.kernels.adax_step": {
        *("kernels", "kernels.compact", "kernels.launch", "kernels.rounding", "kernels.telemetry", "kernels.variants"),
    },
    "adax_triton.kernels.grad_stats": {"kernels.adax_step", "kernels.launch", "kernels.variants"},
    "adax_triton.kernels.schedule": {"kernels.adax_step", "kernels.launch", "kernels.rounding"},
    "adax_triton.kernels.telemetry": {"kernels.launch", "kernels.tables"},
    "adax_triton.kernels.compact": {"kernels", "kernels.rounding"},
    "adax_triton.kernels.variants": {"kernels.launch"},
    "adax_triton.doctor": {
        "step.backend",
        "step.cpu_kernel",
        "optimizer",
        "precision",
        "reference",
        "schedule",
        "integrations",
    },
    "adax_triton.cli": {"convert_command", "doctor", "version", "bench"},
    "adax_triton.convert_command": {"bench.progress", "convert", "integrations.deepspeed_convert", "precision"},
    "adax_triton.convert": {"conversion", "converted_states", "optimizer", "precision"},
    "adax_triton.integrations.deepspeed": {
        *("moment_optimizer", "integrations.deepspeed_checkpoints", "integrations.deepspeed_fuse"),
        *("integrations.deepspeed_in_use", "integrations.deepspeed_refusals", "integrations.deepspeed_repairs"),
        "integrations.deepspeed_switch",
    },
    "adax_triton.integrations.deepspeed_refusals": {
        *("", "moment_optimizer", "integrations.deepspeed_checkpoints", "integrations.deepspeed_fuse"),
        "integrations.deepspeed_in_use",
    },
    "adax_triton.integrations.deepspeed_repairs": {"moment_optimizer"},
    "adax_triton.integrations.deepspeed_in_use": {
        *("hyperparameters", "integrations.deepspeed_universal", "moment_optimizer"),
    },
    "adax_triton.integrations.huggingface": {"integrations.deepspeed", "moment_optimizer"},
    "adax_triton.integrations.deepspeed_checkpoints": {
        *("integrations.deepspeed_complete", "integrations.deepspeed_failures", "integrations.deepspeed_universal"),
        *("moment_optimizer", "state_tensors"),
    },
    "adax_triton.integrations.deepspeed_complete": {
        *("integrations.deepspeed_failures", "integrations.deepspeed_universal", "moment_optimizer"),
    },
    "adax_triton.integrations.deepspeed_convert": {
        *(
            "convert",
            "integrations.deepspeed_complete",
            "integrations.deepspeed_switch",
            "integrations.deepspeed_universal",
        ),
    },
    "adax_triton.integrations.deepspeed_fuse": {
        *("integrations.deepspeed_fuse_hooks", "integrations.deepspeed_fuse_steps", "moment_optimizer"),
        *("state_tensors", "step.collect"),
    },
    "adax_triton.integrations.deepspeed_fuse_hooks": {"precision", "step.external_grads"},
    "adax_triton.integrations.deepspeed_fuse_steps": {
        "integrations.deepspeed_fuse_hooks",
        "precision",
        "step.external_grads",
    },
    "adax_triton.integrations.deepspeed_universal": {"moment_optimizer", "precision", "state_tensors"},
    "adax_triton.integrations.deepspeed_switch": {"conversion", "moment_optimizer"},
}


def sources() -> list[tuple[str, Path]]:
    found = []
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            names = path.relative_to(ROOT / folder).with_suffix("").parts
            found.append((".".join([package, *(name for name in names if name != "__init__")]), path))
    return found


def imported(path: Path, module: str) -> set[str]:
    """Absolute names of the modules a file imports, at the top or within functions."""
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            origin = f"{base}.{node.module}".rstrip(".") if node.level and node.module else node.module or base
            whole_modules = node.module is None or origin in ("adax_triton.bench", "adax_triton.integrations")
            names |= {f"{origin}.{alias.name}" for alias in node.names} if whole_modules else {origin}
    return names


def test_modules_import_only_what_lies_below_them() -> None:
    for module, path in sources():
        ours = {name for name in imported(path, module) if name.split(".")[0] == "adax_triton"}
        relative = {name.removeprefix("adax_triton").removeprefix(".") for name in ours}
        allowed = ALLOWED.get(module, set())
        assert not {name for name in relative if name not in allowed and name.split(".")[0] not in allowed}, module


def test_only_integrations_import_frameworks() -> None:
    for module, path in sources():
        roots = {name.split(".")[0] for name in imported(path, module)}
        if not module.startswith("adax_triton.integrations."):
            assert not roots & FRAMEWORKS, module
        if not module.startswith("adax_triton.kernels"):
            assert "triton" not in roots, module


def test_reader_of_imports_sees_every_form() -> None:
    path = ROOT / "adax_triton" / "step" / "backend.py"
    names = {"os", "torch", "adax_triton.step.cpu_kernel", "adax_triton.kernels.launch"}
    assert names <= imported(path, "adax_triton.step.backend")
    path = ROOT / "adax_triton" / "cli.py"
    assert {"adax_triton.bench.step_report", "adax_triton.doctor"} <= imported(path, "adax_triton.cli")


def python_files() -> list[Path]:
    folders = ("adax_triton", "kernels", "integrations", "bench", "tests", "examples")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_files_are_short_and_plainly_named() -> None:
    for path in python_files():
        text = path.read_text()
        assert len(text.splitlines()) <= 500, path
        assert path.stem not in {"utils", "common", "helpers", "misc", "base", "config"}, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                where = f"{path}: {node.name}"
                assert not body or node.end_lineno - body[0].lineno < 60, f"{where} is long"
                assert path.parent.name == "tests" or node.args.kwarg is None, f"{where} swallows unknown arguments"
