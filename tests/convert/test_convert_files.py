"""Test `adax-triton convert` on files.

Oracles: the functions of `convert.state_dicts`, and an optimizer of the target precision that loads the source.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint import format_utils
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn import Parameter

from adax_triton import AdamW, AdaX, AdaXW
from adax_triton.cli.main import main
from adax_triton.convert.state_dicts import adam_from_adax, adax_from_adam, from_released_adax, from_torch_adam

pytestmark = pytest.mark.usefixtures("native_cpu")
SHAPES = ((64, 80), (7,), (5, 3))  # only the first is large enough to be quantized


def trained(optimizer_class: type, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    optimizer = optimizer_class([{"params": params[:1]}, {"params": params[1:], "lr": 0.02}], **options)
    for _ in range(3):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
        optimizer.step()
    return optimizer


def convert_file(tmp_path: Path, state_dict: Any, *options: str) -> Any:
    """Save a state dict, run the command, return the converted file's content."""
    source, target = tmp_path / "source.pt", tmp_path / "target.pt"
    torch.save(state_dict, source)
    before = source.read_bytes()
    assert main(["convert", str(source), str(target), *options]) == 0
    assert source.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.pt", "target.pt"]
    return torch.load(target, weights_only=True)


def equal(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(equal(found[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(equal, found, expected))
    return bool(found == expected)


def as_released(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Keep only the group keys of the paper's released code."""
    kept = ("params", "lr", "betas", "eps", "weight_decay")
    return {**state_dict, "param_groups": [{key: group[key] for key in kept} for group in state_dict["param_groups"]]}


def test_command_equals_the_functions(tmp_path: Path) -> None:
    torch_adamw = trained(torch.optim.AdamW).state_dict()
    released = as_released(trained(AdaX, eps=1e-6).state_dict())
    cases = [
        (torch_adamw, ["--to", "adamw"], from_torch_adam(torch_adamw)),
        (torch_adamw, ["--to", "adaxw", "--beta2", "1e-3"], adax_from_adam(from_torch_adam(torch_adamw), beta2=1e-3)),
        (released, ["--to", "adax"], from_released_adax(released, decoupled_weight_decay=False)),
        (released, ["--to", "adam"], adam_from_adax(from_released_adax(released, decoupled_weight_decay=False))),
    ]
    for index, (given, options, expected) in enumerate(cases):
        (folder := tmp_path / str(index)).mkdir()
        assert equal(convert_file(folder, given, *options), expected)


@pytest.mark.parametrize(
    ("make", "kind", "source_kind"),
    [
        (lambda: trained(torch.optim.Adam, lr=0.01), "adax", "torch-adam"),
        (lambda: trained(torch.optim.AdamW, betas=(0.8, 0.999)), "adamw", "torch-adamw"),
        (lambda: trained(AdamW), "adaxw", "adamw"),
        (lambda: trained(AdaX), "adam", "adax"),
    ],
    ids=["torch-adam", "torch-adamw", "AdamW", "AdaX"],
)
def test_round_trip_is_within_one_ulp(tmp_path: Path, make: Any, kind: str, source_kind: str) -> None:
    given = make().state_dict()
    middle, end = tmp_path / "middle", tmp_path / "end"
    middle.mkdir(), end.mkdir()
    found = convert_file(end, convert_file(middle, given, "--to", kind), "--to", source_kind)
    assert found["param_groups"] == given["param_groups"]
    for key, state in given["state"].items():
        assert float(found["state"][key]["step"]) == float(state["step"])
        for name in ("exp_avg", "exp_avg_sq"):
            value = found["state"][key][name]
            up, down = (
                torch.nextafter(state[name], torch.full_like(state[name], limit)) for limit in (torch.inf, -torch.inf)
            )
            assert bool(((down <= value) & (value <= up)).all())


def test_groups_of_deepspeed_adam_are_accepted(tmp_path: Path) -> None:
    given = trained(torch.optim.AdamW).state_dict()
    expected = adax_from_adam(from_torch_adam(given))
    for group in given["param_groups"]:  # the keys of deepspeed.ops.adam.FusedAdam
        kept = {key: group[key] for key in ("params", "lr", "betas", "eps", "weight_decay")}
        group.clear()
        group.update(kept, bias_correction=True)
    assert equal(convert_file(tmp_path, given, "--to", "adaxw"), expected)


@pytest.mark.parametrize("states", ["float32", "bfloat16", "8bit_v16", "8bit"])
@pytest.mark.parametrize("before", ["float32", "8bit_v16"])
def test_states_equal_those_an_optimizer_loads(tmp_path: Path, before: str, states: str) -> None:
    optimizer = trained(AdaXW, states=before)
    found = convert_file(tmp_path, optimizer.state_dict(), "--states", states)
    loading = trained(AdaXW, states=states)
    loading.load_state_dict(optimizer.state_dict())
    assert equal(found, loading.state_dict())


def test_masters_equal_those_an_optimizer_loads(tmp_path: Path) -> None:
    optimizer = trained(AdaXW, torch.bfloat16, master_weights="float32", states="8bit_v16")
    found = convert_file(tmp_path, optimizer.state_dict(), "--master-weights", "24bit", "--states", "bfloat16")
    loading = trained(AdaXW, torch.bfloat16, master_weights="24bit", states="bfloat16")
    loading.load_state_dict(optimizer.state_dict())
    assert equal(found, loading.state_dict())


def test_float32_exceptions_are_kept(tmp_path: Path) -> None:
    optimizer = trained(AdaXW, states="8bit_v16", keep_float32=lambda param: True)
    found = convert_file(tmp_path, optimizer.state_dict(), "--states", "8bit")
    assert equal(found["state"], optimizer.state_dict()["state"])


def test_key_selects_the_state_dict_in_a_file(tmp_path: Path) -> None:
    given = trained(torch.optim.Adam).state_dict()
    found = convert_file(tmp_path, {"step": 3, "optimizer": given}, "--to", "adam", "--key", "optimizer", "--lr", "0.5")
    expected = copy.deepcopy(from_torch_adam(given))
    for group in expected["param_groups"]:
        group["lr"] = 0.5
    assert equal(found, {"step": 3, "optimizer": expected})


def test_each_state_dict_of_a_list_is_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [trained(torch.optim.AdamW).state_dict(), trained(torch.optim.AdamW, lr=0.5).state_dict()]
    found = convert_file(
        tmp_path, {"epoch": 1, "optimizer_states": given}, "--to", "adaxw", "--key", "optimizer_states"
    )
    expected = [adax_from_adam(from_torch_adam(state_dict)) for state_dict in given]
    assert equal(found, {"epoch": 1, "optimizer_states": expected})
    assert "target.pt: 6 states in 4 groups" in capsys.readouterr().out


def test_checkpoint_of_torch_distributed_is_converted_as_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = torch.nn.Linear(5, 3)
    adamw, adaxw = torch.optim.AdamW(model.parameters()), AdaXW(model.parameters())
    model(torch.ones(2, 5)).sum().backward()
    adamw.step()
    adamw.zero_grad()
    source, target = tmp_path / "source", tmp_path / "target"
    checkpoint.save({"optimizer": get_optimizer_state_dict(model, adamw)}, checkpoint_id=source)
    assert main(["convert", str(source), str(target), "--to", "adaxw"]) == 1
    assert "make a file of it with dcp_to_torch_save" in capsys.readouterr().err

    format_utils.dcp_to_torch_save(source, tmp_path / "source.pt")
    files = [str(tmp_path / name) for name in ("source.pt", "target.pt")]
    assert main(["convert", *files, "--to", "adaxw", "--key", "optimizer"]) == 0
    format_utils.torch_save_to_dcp(files[1], target)
    found = get_optimizer_state_dict(model, adaxw)
    checkpoint.load({"optimizer": found}, checkpoint_id=target)
    set_optimizer_state_dict(model, adaxw, found)
    assert equal(adaxw.state_dict(), adax_from_adam(from_torch_adam(adamw.state_dict())))


def adax() -> Any:
    return trained(AdaX).state_dict()


def without_bias_correction() -> Any:
    state_dict = trained(torch.optim.Adam).state_dict()
    state_dict["param_groups"][1]["bias_correction"] = False
    return state_dict


BAD_INPUTS: list[tuple[Any, list[str], list[str]]] = [
    (adax, [], ["nothing to convert to", "--to"]),
    (adax, ["--to", "adaxw"], ["decoupled_weight_decay=False", "'adax'"]),
    (adax, ["--to", "adax", "--beta2", "0.9"], ["beta2=0.9", "'adax'"]),
    (adax, ["--to", "adam", "--beta2", "1e-4"], ["beta2=0.0001"]),
    (adax, ["--to", "released-adax"], ["eps_placement", "'unnormalized'"]),
    (adax, ["--master-weights", "24bit"], ["no masters", "weights"]),
    (lambda: trained(torch.optim.Adam).state_dict(), ["--states", "8bit_v16"], ["need a state dict of adax_triton"]),
    (without_bias_correction, ["--to", "adax"], ["param_groups'][1]['bias_correction'] is False"]),
    (lambda: trained(AdaX, states="8bit_v16").state_dict(), ["--to", "adam"], ["states='float32'"]),
    (lambda: {"model": 1, "optimizer": adax()}, ["--to", "adam"], ["give --key optimizer"]),
    (lambda: {"optimizer_states": [adax()]}, ["--to", "adam"], ["give --key optimizer_states"]),
    (
        lambda: {"optimizer_states": [adax(), without_bias_correction()]},
        ["--to", "adam", "--key", "optimizer_states"],
        ["source.pt['optimizer_states'][1]: ", "bias_correction"],
    ),
    (lambda: {"optimizer_states": []}, ["--to", "adam", "--key", "optimizer_states"], ["is not the state dict"]),
    (lambda: {"model": 1}, ["--to", "adam"], ["pass a file that holds optimizer.state_dict()"]),
    (lambda: [1], ["--to", "adam"], ["holds a list"]),
    (lambda: {"state": {}, "param_groups": [], "more": Path}, ["--to", "adam"], ["weights_only=True"]),
]


@pytest.mark.parametrize(("make", "options", "words"), BAD_INPUTS)
def test_bad_input_prints_one_line_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Any, options: list[str], words: list[str]
) -> None:
    source, target = tmp_path / "source.pt", tmp_path / "target.pt"
    torch.save(make(), source)
    assert main(["convert", str(source), str(target), *options]) == 1
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("adax-triton convert: ")]
    for word in words:
        assert word in message
    assert [path.name for path in tmp_path.iterdir()] == ["source.pt"]


def test_existing_target_and_missing_source_are_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source.pt"
    torch.save(adax(), source)
    before = source.read_bytes()
    assert main(["convert", str(source), str(source), "--to", "adam"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert source.read_bytes() == before
    assert main(["convert", str(tmp_path / "absent.pt"), str(tmp_path / "target.pt"), "--to", "adam"]) == 1
    assert "neither a file nor a folder" in capsys.readouterr().err
