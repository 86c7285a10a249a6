"""Telemetry of DTensor parameters on two gloo ranks. Oracle: the unsharded run.

As a script, once per rank: RANK=... WORLD_SIZE=2 python test_telemetry_sharding.py STORE. It writes `RANK.json` next to
STORE: the telemetry of two steps of each case, sharded and unsharded.
"""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from adax_triton import AdaX

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

CASES: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "float32"},
    "8bit_v16": {"dtype": "float32", "states": "8bit_v16"},
    "8bit, 24bit": {"dtype": "bfloat16", "states": "8bit", "master_weights": "24bit"},
}


def numbers(optimizer: AdaX) -> dict[str, Any]:
    found = optimizer.read_telemetry(per_parameter=True)
    groups = {f"group {index}": list(group) for index, group in enumerate(found.groups)}
    return {**groups, **{name: list(numbers) for name, numbers in found.params.items()}}


def model_case(case: dict[str, Any], mesh: Any) -> list[dict[str, Any]]:
    """Return the telemetry of an FSDP2 model and of the unsharded model."""
    from sharding_runs import DTYPES, Model, options, train
    from torch.distributed.fsdp import fully_shard

    found = []
    for sharded in (True, False):
        torch.manual_seed(0)
        model = Model().to(DTYPES[case["dtype"]])
        if sharded:
            fully_shard(model.hidden, mesh=mesh)
            fully_shard(model, mesh=mesh)
        run = model, AdaX(model.named_parameters(), telemetry=True, **options(case))
        steps = [numbers(train(run, [step])[1]) for step in range(2)]
        found.append({f"{step}: {name}": row for step, rows in enumerate(steps) for name, row in rows.items()})
    return found


def order_case(mesh: Any) -> list[dict[str, Any]]:
    """Return the telemetry of a case where rank 1 needs two launches.

    One of its shards is unaligned.
    """
    from torch.distributed.tensor import DTensor, Shard

    found = []
    for sharded in (True, False):
        params = []
        for index in range(3):
            full = torch.randn(6, 40, generator=torch.Generator().manual_seed(index))
            if sharded:
                buffer = torch.empty(121)
                shard = buffer[1:] if index == 1 and dist.get_rank() == 1 else buffer[:120]
                shard = shard.view(3, 40).copy_(full[3 * dist.get_rank() :][:3])
                full = DTensor.from_local(shard, mesh, [Shard(0)], run_check=False)
            params.append(torch.nn.Parameter(full))
            params[-1].grad = params[-1].detach() * (index + 1)
        optimizer = AdaX(params, telemetry=True)
        optimizer.step()
        found.append(numbers(optimizer))
    return found


def main(store: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    mesh = init_device_mesh("cpu", (2,))
    results = {name: model_case(case, mesh) for name, case in CASES.items()}
    results["order"] = order_case(mesh)
    Path(store).with_name(f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=["1", "0"], ids=["kernel", "cpu"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of each rank."""
    if request.param == "1":
        pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("telemetry")
    interpret = {"TRITON_INTERPRET": request.param}
    run_ranks(Path(__file__).resolve(), [str(folder / "store")], 2, folder, interpret, folder / "ranks.log")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", [*CASES, "order"])
def test_telemetry_of_each_rank_equals_the_unsharded_run(results: list[dict[str, Any]], name: str) -> None:
    for sharded, unsharded in (result[name] for result in results):
        assert sharded.keys() == unsharded.keys() and len(unsharded) > 3
        for owner, row in unsharded.items():
            assert sharded[owner] == pytest.approx(row, rel=1e-6, abs=0.0), owner
            assert sharded[owner][-2:] == row[-2:], owner  # counts
            assert row[0] > 0.0 and row[1] > 0.0, owner


if __name__ == "__main__":
    main(*sys.argv[1:])
