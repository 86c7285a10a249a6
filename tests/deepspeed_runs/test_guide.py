"""Run every configuration and program of docs/deepspeed.md on gloo CPU ranks.

The memory table is checked too. The test changes "nvme_path" and, without libaio, the device "nvme" to "cpu";
test_deepspeed_nvme.py has more tests of NVMe. It uses the model of deepspeed_worker.py, and two ranks instead of
several GPUs. Oracles: the uninterrupted run for the resumed one, and the sizes of an engine's tensors for the memory.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adax_triton.bench.memory import deepspeed as deepspeed_memory
from paths import ROOT

from adax_triton.cli.main import main

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.deepspeed

GUIDE = ROOT / "docs" / "deepspeed.md"
STEPS = 4
# The sections with a configuration, the folder each runs in, and its number of ranks.
SECTIONS = {
    "ZeRO 2, several GPUs": ("zero2", 2),
    "ZeRO 3, several GPUs": ("zero3", 2),
    "7B on one GPU": ("offload", 1),
    "Smaller states": ("8bit_v16", 2),
    "States on NVMe": ("nvme", 1),
    "From AdamW to AdaX in the middle of a run": ("switch", 2),
    "Resume on fewer GPUs": ("zero2", 1),
}
WRAPPERS = {2: "DeepSpeedZeroOptimizer", 3: "DeepSpeedZeroOptimizer_Stage3"}


def section(heading: str) -> str:
    return GUIDE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]


def configuration(heading: str) -> dict[str, Any]:
    (block,) = section(heading).split("```json\n")[1:]
    return json.loads(block.split("```")[0])


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, launch_deepspeed: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    folder, found = tmp_path_factory.mktemp("guide"), {}
    for ranks in (2, 1):
        cases = [
            {"name": name, "folder": str(folder / place)} for name, (place, count) in SECTIONS.items() if count == ranks
        ]
        found |= launch_deepspeed(folder, cases, "guide_worker.py", ranks)
    return found


def result_of(results: dict[str, Any], heading: str) -> dict[str, Any]:
    result = results[heading]
    assert "failure" not in result, result["failure"]
    return result


def test_every_section_with_a_block_is_run() -> None:
    headings = [part.partition("\n")[0] for part in GUIDE.read_text().split("\n## ")[1:] if "```" in part]
    assert headings == list(SECTIONS)


@pytest.mark.parametrize("heading", SECTIONS)
def test_section_trains_with_the_optimizer_it_names(results: dict[str, Any], heading: str) -> None:
    result, config = result_of(results, heading), configuration(heading)
    assert result["optimizer"] == config["optimizer"]["type"]
    assert result["wrapper"] == WRAPPERS[config["zero_optimization"]["stage"]]
    assert result["steps"] == [STEPS]
    assert result["finite"] and result["moved"] > 1e-4


def test_resume_on_fewer_gpus_continues_exactly(results: dict[str, Any]) -> None:
    result = result_of(results, "Resume on fewer GPUs")
    assert result["loaded_deviation"] == 0.0
    assert result["resume_deviation"] == 0.0


@pytest.mark.parametrize("heading", SECTIONS)
def test_memory_matches_the_engine(results: dict[str, Any], heading: str) -> None:
    result = result_of(results, heading)
    if result["config"]["zero_optimization"].get("offload_optimizer", {}).get("device") == "nvme":
        pytest.skip("states of so small a model stay in memory")
    parts = deepspeed_memory.parts_of(result["config"], SECTIONS[heading][1])
    # Partitions are padded, and the last group of 32 codes may be incomplete.
    assert result["kept"] == pytest.approx({part.name: part.bytes for part in parts}, rel=0.01)


def memory_rows() -> list[list[str]]:
    lines = [line for line in section("Memory").splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_memory_table_is_computed_from_the_configurations() -> None:
    rows = memory_rows()
    assert {row[0] for row in rows} == set(SECTIONS) - {"From AdamW to AdaX in the middle of a run"}
    for heading, gpus, *cells in rows:
        sums = deepspeed_memory.totals(configuration(heading), int(gpus)).values()
        assert cells == [*(f"{size:.2f}" for size in sums), ", ".join(f"{7 * size:.0f}" for size in sums)], heading


def test_command_prints_the_parts_of_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps(configuration("7B on one GPU")))
    assert main(["bench", "memory", "--deepspeed", str(file)]) == 0
    assert "| all | host | 20 | 140.0 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "gpus", "words"),
    [
        ({"optimizer": {"type": "AdamW"}}, 1, "optimizer.type='AdamW'"),
        ({"zero_optimization": {"stage": 0}}, 1, "stage=0"),
        ({"bf16": {"enabled": "auto"}}, 1, 'bf16.enabled="auto"'),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, 1, "data_types="),
        ({}, 0, "gpus must be at least 1, got 0"),
    ],
    ids=lambda value: str(value),
)
def test_unsupported_configuration_raises(change: dict[str, Any], gpus: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        deepspeed_memory.parts_of({**configuration("7B on one GPU"), **change}, gpus)
