"""Save and load DeepSpeed checkpoints while one rank's file operations fail.

Usage, once per rank: RANK=... WORLD_SIZE=2 python deepspeed_save_failures_worker.py CASES.json FOLDER

FOLDER/rank-RANK.json becomes {case name: results of this rank}. The cases run one after the other in the same engines.
"""

import errno
import importlib
import json
import os
import shutil
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from adax_triton.integrations.deepspeed.checkpoints.atomic_save import folder_to_load
from deepspeed_checkpoint_worker import to_universal
from deepspeed_worker import CASE_DEFAULTS, batch, build_model, deviation, master_weights, start_engine
from torch import Tensor

Failure = dict[str, Any]
SMALL_WEIGHTS_STAY = {"stage3_param_persistence_threshold": 10**5}  # gathered at the end of each save and load


def build(stage: int, seed: int = 0, universal: bool = False) -> Any:
    config = {"checkpoint": {"load_universal": universal}}
    case = {**CASE_DEFAULTS, "stage": stage, "zero": SMALL_WEIGHTS_STAY, "config": config}
    return start_engine(case, build_model(case, seed=seed))


def train(engine: Any) -> None:
    engine.backward(engine(*batch(engine.global_steps, 0, dist.get_rank())))
    engine.step()


def difference(engine: Any, expected: dict[str, Tensor]) -> float:
    return deviation(master_weights(engine), expected)


@contextmanager
def replaced(name: str, replacement: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace a function of a module within the block."""
    module, _, function = name.rpartition(".")
    owner = importlib.import_module(module)
    original = getattr(owner, function)
    setattr(owner, function, replacement(original))
    try:
        yield
    finally:
        setattr(owner, function, original)


def move_away(folder: Path) -> None:
    """Make a folder vanish in one operation.

    Deleting its files could race with a rank that adds some.
    """
    elsewhere = tempfile.mkdtemp(dir=folder.parents[1])
    with suppress(FileNotFoundError):  # it has vanished already
        folder.rename(Path(elsewhere, "vanished"))


@contextmanager
def failing(failure: Failure) -> Iterator[None]:
    """Make a function fail on one rank from its n-th call on.

    With the error "vanishes", move the folder of the function's file away instead.
    """
    calls = 0

    def replacement(original: Callable[..., Any]) -> Callable[..., Any]:
        def fails(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= failure["call"] and failure["error"] == "vanishes":
                path = next(arg for arg in args if isinstance(arg, str))
                move_away(Path(path).parent)
            elif calls >= failure["call"]:
                if failure["function"] == "os.access":
                    return False
                if failure["error"] == "full":  # the error of torch.save on a full disk
                    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 0")
                number = getattr(errno, failure["error"])
                raise OSError(number, os.strerror(number))
            return original(*args, **options)

        return fails

    with ExitStack() as stack:
        if dist.get_rank() == failure["rank"]:
            stack.enter_context(replaced(failure["function"], replacement))
            if failure["error"] == "full":
                full = SimpleNamespace(free=0)
                stack.enter_context(replaced("shutil.disk_usage", lambda _: lambda _: full))
        yield


@contextmanager
def file_system_without(operation: str, number: int) -> Iterator[None]:
    """Simulate a limited file system in the block.

    It has no fsync of folders, or renames only empty folders.
    """

    def is_folder(path: Any) -> bool:
        return stat.S_ISDIR((os.fstat if isinstance(path, int) else os.stat)(path).st_mode)

    def replacement(original: Callable[..., Any]) -> Callable[..., Any]:
        def fails(path: Any, *args: Any) -> Any:
            if is_folder(path) if operation == "fsync" else not is_folder(path) or os.listdir(path):
                raise OSError(number, os.strerror(number))
            return original(path, *args)

        return fails

    with ExitStack() as stack:
        for name in ("os.fsync",) if operation == "fsync" else ("os.rename", "os.replace"):
            stack.enter_context(replaced(name, replacement))
        yield


def error_of(action: Callable[..., Any], *arguments: Any, **options: Any) -> dict[str, Any]:
    began = time.monotonic()
    try:
        action(*arguments, **options)
        error = ""
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    return {"error": error, "seconds": time.monotonic() - began}


def run_failure(failure: Failure, engine: Any, folder: str) -> dict[str, Any]:
    """Run a save or load with a failure, then without it.

    Save and train; save or load with the failure; then train, save and load without it.
    """
    engine.save_checkpoint(folder)
    train(engine)
    action = engine.save_checkpoint if failure["action"] == "save" else engine.load_checkpoint
    if failure["action"] == "load":
        engine.save_checkpoint(folder)
    before = Path(folder, "latest").read_text()
    with failing(failure):
        found = error_of(action, folder, **failure["options"])
    dist.barrier()
    found["left"] = sorted(path.name for path in Path(folder).iterdir() if path.is_dir() and path.name != before)
    found["latest_stayed"] = Path(folder, "latest").read_text() == before
    dist.barrier()
    train(engine)
    engine.save_checkpoint(folder)
    path, _ = engine.load_checkpoint(folder)
    found["saved_then"] = (
        path is not None and os.path.basename(os.path.dirname(path)) == f"global_step{engine.global_steps}"
    )
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    dist.barrier()
    return found


def run_file_system(case: dict[str, Any], folder: str) -> dict[str, Any]:
    """Save on a limited file system, interrupt the last save, and load.

    The file system lacks one operation.
    """
    engine = build(2)
    with file_system_without(case["without"], getattr(errno, case["error"])):
        train(engine)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            for tag in ("first", "first", "second"):
                engine.save_checkpoint(folder, tag=tag)
        weights = master_weights(engine)
        train(engine)
        with failing({"rank": 1, "function": "torch.save", "call": 1, "error": "ENOSPC"}):
            found = error_of(engine.save_checkpoint, folder, "third")
        found |= {f"folder_{tag}": error_of(folder_to_load, folder, tag)["error"] for tag in ("first", "third")}
        texts = [str(warning.message) for warning in caught]
        expected = ("does not support fsync", "cannot rename folders")
        found["warnings"] = [text for text in texts if any(words in text for words in expected)]
    other = build(2, seed=1)
    other.load_checkpoint(folder)
    found["loaded"] = difference(other, weights)
    found["names"] = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
    for each in (engine, other):
        each.destroy()
    return found


def run_universal(failure: Failure, engine: Any, folder: str) -> dict[str, Any]:
    """Load a universal checkpoint with the failure, and again without it."""
    train(engine)
    engine.save_checkpoint(folder, tag="saved")
    to_universal(Path(folder))
    other = build(failure["stage"], seed=1, universal=True)
    with failing(failure):
        found = error_of(other.load_checkpoint, folder, tag="universal")
    dist.barrier()
    other.load_checkpoint(folder, tag="universal")
    found["loaded"] = difference(other, master_weights(engine))
    other.destroy()
    return found


def main(cases_path: str, folder: str) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # avoids its compilation
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=30), verbose=False)
    torch.set_num_threads(1)
    results = {}
    engines = {stage: build(stage) for stage in (2, 3)}
    for number, case in enumerate(json.loads(Path(cases_path).read_text())):
        path = f"{folder}/{number}"
        if "without" in case:
            results[case["name"]] = run_file_system(case, path)
        elif case["action"] == "universal":
            results[case["name"]] = run_universal(case, engines[case["stage"]], path)
        else:
            results[case["name"]] = run_failure(case, engines[case["stage"]], path)
    for stage, engine in engines.items():
        uninterrupted = build(stage)
        while uninterrupted.global_steps < engine.global_steps:
            train(uninterrupted)
        results[f"stage-{stage}"] = {"deviation": difference(engine, master_weights(uninterrupted))}
        uninterrupted.destroy()
        engine.destroy()
    Path(folder, f"rank-{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
