"""DTensor parameters, FSDP2 and torch.distributed.checkpoint, on real gloo processes.

Oracle: the same unsharded model with the full gradients, bit for bit (sharding_runs.py). Each launch runs many cases.
Each test reads the results of one case from all ranks.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharding_launch import Results, launch

from adax_triton import AdaX

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

MASTERS = {
    "fp32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16", "weight_rounding": "stochastic"},
    "bf16-master": {"dtype": "bfloat16", "master_weights": "float32"},
    "bf16-24bit": {"dtype": "bfloat16", "master_weights": "24bit"},
}
MODES: dict[str, dict[str, Any]] = {
    f"{states}-{name}": {"name": f"{states}-{name}", "states": states, **master}
    for states in ("float32", "bfloat16", "8bit_v16", "8bit")
    for name, master in MASTERS.items()
}
MODES["8bit_v16-fp16"] = {
    "name": "8bit_v16-fp16",
    "states": "8bit_v16",
    "dtype": "float16",
    "master_weights": "float32",
}
# One mode per states and master format. The other modes run only the step and save checks.
COPIED = ["float32-fp32", "bfloat16-bf16", "bfloat16-bf16-master", "8bit_v16-fp32", "8bit_v16-fp16", "8bit-bf16-24bit"]
RESHARDED = ["float32-bf16", "bfloat16-bf16-24bit", "8bit_v16-bf16", "8bit_v16-fp16", "8bit-bf16-master"]
CONVERSIONS = {
    f"{source} to {target}": {
        "name": f"{source} to {target}",
        "check": "conversion",
        "source": MODES[source],
        "target": MODES[target],
    }
    for source, target in (
        ("8bit_v16-fp32", "float32-fp32"),
        ("float32-fp32", "bfloat16-fp32"),
        ("float32-fp32", "8bit-fp32"),
        ("8bit-fp32", "8bit_v16-fp32"),
        ("bfloat16-bf16", "8bit_v16-bf16"),
        ("float32-bf16-master", "8bit-bf16-24bit"),
        ("8bit_v16-bf16-24bit", "8bit_v16-bf16-master"),
        ("8bit-bf16", "bfloat16-bf16-master"),
    )
}
MASTERS_OF = ("float32-bf16-master", "8bit-bf16-24bit", "8bit_v16-fp16", "8bit_v16-bf16")
EXPORTS = {f"masters of {name}": {**MODES[name], "check": "masters"} for name in MASTERS_OF}
ONCE = {name: {"check": name} for name in ("columns", "transposed", "errors", "gradients")}
ONCE["backward"] = {"check": "backward", "dtype": "float32", "states": "8bit_v16"}
ON_TWO = {name: {**mode, "checkpoints": True, "copies": name in COPIED} for name, mode in MODES.items()}
ON_FOUR = {name: ON_TWO[name] for name in RESHARDED}
INTERPRETED = {"8bit-bf16-24bit": {**MODES["8bit-bf16-24bit"], "steps": 2, "checkpoints": False}}
MESHES = {f"meshes of {name}": {**MODES[name], "check": "meshes"} for name in ("8bit_v16-bf16-24bit", "8bit-fp32")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharding")


@pytest.fixture(scope="module")
def two(folder: Path) -> Results:
    return launch(folder, 2, ON_TWO | CONVERSIONS | EXPORTS | ONCE)


@pytest.fixture(scope="module")
def four(folder: Path, two: Results) -> Results:
    return launch(folder, 4, ON_FOUR | MESHES)


@pytest.fixture(scope="module")
def interpreted(folder: Path) -> Results:
    return launch(folder, 2, INTERPRETED, interpret="1")


every_mode = pytest.mark.parametrize("mode", MODES)


@every_mode
def test_two_shards_equal_the_unsharded_run(two: Results, mode: str) -> None:
    for result in two[mode]:
        assert result["trajectory"] == []
        # Check the comparison: all parameters moved, and the states have the mode's precision.
        assert result["still"] == []
        assert ("embed.weight/group_exponents" in result["parts"]) == mode.startswith("8bit")
        assert ("gain/master" in result["parts"]) == ("master_weights" in MODES[mode])


@pytest.mark.parametrize("mode", RESHARDED)
def test_four_shards_equal_the_unsharded_run(four: Results, mode: str) -> None:
    assert [result["trajectory"] for result in four[mode]] == [[]] * 4


@pytest.mark.parametrize("mode", INTERPRETED)
def test_triton_kernel_on_two_shards_equals_the_unsharded_run(interpreted: Results, mode: str) -> None:
    assert [result["trajectory"] for result in interpreted[mode]] == [[]] * 2


@every_mode
def test_checkpoint_continues_bit_for_bit(two: Results, mode: str) -> None:
    assert [result["checkpoint"] for result in two[mode]] == [[]] * 2


@pytest.mark.parametrize("mode", RESHARDED)
def test_checkpoint_of_two_shards_loads_into_four(four: Results, mode: str) -> None:
    assert [result["resharded"] for result in four[mode]] == [[]] * 4


@pytest.mark.parametrize("mode", COPIED)
@pytest.mark.parametrize("way", ["deepcopy", "state_dict", "from unsharded", "into unsharded"])
def test_copy_continues_bit_for_bit(two: Results, mode: str, way: str) -> None:
    assert [result[way] for result in two[mode]] == [[]] * 2


@pytest.mark.parametrize("mode", COPIED)
@pytest.mark.parametrize("way", ["torch gathers", "torch distributes"])
def test_torch_full_state_dict(two: Results, mode: str, way: str) -> None:
    assert [result[way] for result in two[mode]] == [[]] * 2


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_conversion_of_shards_equals_the_unsharded_one(two: Results, conversion: str) -> None:
    assert two[conversion] == [{"loaded": [], "stepped": []}] * 2


@pytest.mark.parametrize("mode", MASTERS_OF)
def test_master_weights_equal_the_unsharded_ones(two: Results, mode: str) -> None:
    for result in two[f"masters of {mode}"]:
        assert {check: wrong for check, wrong in result.items() if wrong} == {}


def test_column_shards_differ_only_by_random_bits(two: Results) -> None:
    for result in two["columns"]:
        assert result["float32"] == result["8bit_v16"] == []
        # Three roundings; each may differ by one unit of bfloat16.
        assert 1 - 3 / 128 < result["smallest ratio"] < 1 < result["largest ratio"] < 1 + 3 / 128


def test_transposed_shards_equal_the_unsharded_run(two: Results) -> None:
    assert two["transposed"] == [{"float32": []}] * 2


@pytest.mark.parametrize("kind", ["columns", "rows of 50", "one dimension", "transposed"])
def test_shards_that_split_quantization_groups_raise(two: Results, kind: str) -> None:
    for result in two["errors"]:
        assert result[kind].startswith("ValueError: params[0]: states='8bit_v16' needs shards of whole rows")
        assert result[f"{kind}, kept"] == "accepted"


@pytest.mark.parametrize("kind", ["small", "replicated"])
def test_small_and_replicated_parameters_equal_the_unsharded_run(two: Results, kind: str) -> None:
    assert [result[kind] for result in two["errors"]] == ["[]"] * 2


def test_loading_codes_into_column_shards_raises(two: Results) -> None:
    for result in two["errors"]:
        assert result["codes into columns"].startswith("ValueError: state_dict['state'][0] has states='8bit_v16'")


@pytest.mark.parametrize("kind", ["plain gradient", "sharded gradient"])
def test_plain_gradient_of_a_sharded_parameter_raises_and_vice_versa(two: Results, kind: str) -> None:
    for result in two["errors"]:
        assert result[kind].startswith("TypeError: grad is a ")


@pytest.mark.parametrize("kind", ["partial", "replicated"])
def test_gradient_is_redistributed_to_the_placements_of_its_parameter(two: Results, kind: str) -> None:
    assert [result[kind] for result in two["gradients"]] == [[]] * 2


def test_fsdp2_backward_equals_the_unsharded_run(two: Results) -> None:
    assert two["backward"] == [{"steps": [], "losses": []}] * 2


@pytest.mark.parametrize("case", MESHES)
def test_two_dimensional_meshes_equal_the_unsharded_run(four: Results, case: str) -> None:
    for result in four[case]:
        assert result["HSDP"] == result["FSDP2 with tensor parallelism"] == []
        assert "_StridedShard" in result["strided"]
        assert result["rows"].startswith("ValueError: params[4]: states=")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # this test loads without torch.distributed
@pytest.mark.parametrize("mode", RESHARDED)
def test_sharded_checkpoint_loads_into_an_unsharded_run(
    two: Results, folder: Path, mode: str, native_cpu: torch.device
) -> None:
    from sharding_modes import check_without_shards

    assert check_without_shards(MODES[mode], folder) == []


def test_states_of_offloaded_shards_stay_on_the_cpu() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        # As FSDP2 with CPUOffloadPolicy: CPU shards on a GPU mesh. The test needs no GPU.
        meta = TensorMeta(torch.Size((64, 64)), (64, 1), torch.float32)
        spec = DTensorSpec(init_device_mesh("cuda", (2,)), (Shard(0),), tensor_meta=meta)
        param, grad = (DTensor(torch.ones(32, 64), spec, requires_grad=False) for _ in range(2))
        optimizer = AdaX([param], states="8bit_v16")
        param.grad = grad
        optimizer.step()
        states = [value for name, value in optimizer.state[param].items() if name != "step"]
        assert [state.to_local().device.type for state in states] == ["cpu"] * 3
        assert bool((param.to_local() < 1).all())
    finally:
        dist.destroy_process_group()


def test_import_does_not_import_dtensor() -> None:
    command = "import sys, adax_triton; print('torch.distributed.tensor' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
