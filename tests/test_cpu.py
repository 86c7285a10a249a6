"""The compiled CPU path. Oracle: the reference in float64, by the two-reference rule."""

import re
import subprocess
import sys

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from adax_triton import compiled as compiled_module
from adax_triton.compiled import ANY, _program, compiled_program
from adax_triton.cpu import (
    COMPILE_FROM_NUMEL,
    EAGER_CHUNK,
    GATHERED_NUMEL,
    update_cpu,
    update_eager,
    update_small_cpu,
    update_stored,
)
from adax_triton.reference import adax_update
from adax_triton.schedule import StepScalars, step_scalars
from adax_triton.tensor_step import TensorStep

DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float64),
]


def scalars_of(step: int) -> StepScalars:
    return step_scalars(
        step=step,
        lr=1e-2,
        betas=(0.9, 1e-4),
        eps=1e-12,
        weight_decay=0.1,
        decoupled_weight_decay=True,
        second_moment="adax",
        eps_placement="normalized",
        maximize=False,
    )


def make_tensors(numel: int, param_dtype: torch.dtype, grad_dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = torch.float64 if param_dtype == torch.float64 else torch.float32
    return [
        torch.randn(numel, generator=generator).to(param_dtype),
        torch.randn(numel, generator=generator).to(grad_dtype),
        torch.randn(numel, generator=generator).to(state),
        torch.rand(numel, generator=generator).to(state),
    ]


@pytest.mark.parametrize(("param_dtype", "grad_dtype"), DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_compiled_update_is_as_accurate_as_the_formula(param_dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    compiled = make_tensors(COMPILE_FROM_NUMEL + 13, param_dtype, grad_dtype)
    formula = [tensor.clone() for tensor in compiled]
    exact = [tensor.double() for tensor in compiled]
    for step in (1, 2, 3):
        update_cpu(*compiled, scalars_of(step))
        adax_update(*formula, **scalars_of(step)._asdict())
        adax_update(*exact, **scalars_of(step)._asdict())
    for index in (0, 2, 3):
        allowed = 2 * (formula[index].double() - exact[index]).abs().max() + 1e-15
        assert (compiled[index].double() - exact[index]).abs().max() <= allowed
    assert not torch.equal(compiled[0], make_tensors(COMPILE_FROM_NUMEL + 13, param_dtype, grad_dtype)[0])


def test_compiled_update_has_l2_decay_and_maximizes() -> None:
    compiled = make_tensors(COMPILE_FROM_NUMEL, torch.float32, torch.float32)
    exact = [tensor.double() for tensor in compiled]
    scalars = scalars_of(2)._replace(l2=0.25, grad_factor=-1.0)
    update_cpu(*compiled, scalars)
    adax_update(*exact, **scalars._asdict())
    for index in (0, 2, 3):
        torch.testing.assert_close(compiled[index].double(), exact[index], rtol=1e-6, atol=1e-6)


def test_new_scalars_and_sizes_do_not_compile_again() -> None:
    tensors = make_tensors(4 * COMPILE_FROM_NUMEL, torch.float32, torch.float32)
    update_cpu(*tensors, scalars_of(1))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step, numel in ((1, COMPILE_FROM_NUMEL), (2, COMPILE_FROM_NUMEL + 1), (16, 3 * COMPILE_FROM_NUMEL)):
            update_cpu(*(tensor[:numel] for tensor in tensors), scalars_of(step)._replace(decay=0.0, step_size=1.0))


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_step_beside_a_float32_copy_is_that_of_float32_weights(grad_dtype: torch.dtype) -> None:
    weights, grad, exp_avg, exp_avg_sq = make_tensors(COMPILE_FROM_NUMEL + 13, torch.float32, grad_dtype)
    copies = [tensor.clone() for tensor in (weights, exp_avg, exp_avg_sq)]
    step = TensorStep(weights.bfloat16(), grad, copies[1], copies[2], 0, master=copies[0], param_is_copy=True)
    for count in (1, 2):
        scalars = scalars_of(count)._replace(grad_factor=1.0 / count)
        update_cpu(weights, grad.float(), exp_avg, exp_avg_sq, scalars)
        update_stored(step, scalars, (0, 0))
        assert all(map(torch.equal, copies, (weights, exp_avg, exp_avg_sq)))
        assert torch.equal(step.param, weights.bfloat16())


def step_of_halves() -> TensorStep:
    numel = 2 * COMPILE_FROM_NUMEL
    tensors = [tensor.bfloat16() for tensor in make_tensors(numel, torch.bfloat16, torch.bfloat16)]
    return TensorStep(*tensors, scalar_row=0, states="bfloat16", master=torch.zeros(numel, dtype=torch.int8))


@pytest.mark.skipif(
    not torch.__version__.startswith(compiled_module.BETTER_VECTORS_OF), reason="another PyTorch's loops"
)
def test_compiled_loops_take_no_vector_apart() -> None:
    step = step_of_halves()
    _program.cache_clear()
    with torch._inductor.config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(update_stored, step, scalars_of(2), (1, 2))
    assert len(codes) == 1 and "sqrt()" in codes[0] and "VectorizedN<int32_t,2>::loadu(&" in codes[0]
    assert "tmpbuf" not in codes[0]
    # A length in a load of int32, or of half a vector, is a detour through memory.
    loads = re.findall(r"Vectorized(?:N?)<([^>]*)>::loadu\(\w+_ptr\d+ \+ [^;]*;", codes[0])
    assert set(loads) == {"at::BFloat16", "int32_t,2"}
    assert not re.search(r"int32_t,2>::loadu\([^;&]*, static_cast", codes[0])


def test_loops_of_another_pytorch_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [step_of_halves() for _ in range(2)]
    update_stored(steps[0], scalars_of(2), (1, 2))
    monkeypatch.setattr(compiled_module, "BETTER_VECTORS_OF", ())
    _program.cache_clear()
    with torch._inductor.config.patch(force_disable_caches=True):
        update_stored(steps[1], scalars_of(2), (1, 2))
    _program.cache_clear()
    assert all(map(torch.equal, steps[0].written, steps[1].written))


def test_programs_are_called_with_any_sizes_and_return_what_they_compute() -> None:
    def halves(values: torch.Tensor, absent: None, scale: torch.Tensor, negate: bool) -> torch.Tensor:
        total = (values * scale).sum()
        return -total if negate else total

    for negate in (False, True):
        program = compiled_program(halves, ((torch.float32, (ANY,)), None, (torch.float32, (1,))), (negate,))
        assert program is not None
        for numel in (0, 1, 2, COMPILE_FROM_NUMEL, 3 * COMPILE_FROM_NUMEL + 1):
            values = torch.ones(numel + 7)[7:]  # a view that begins anywhere
            found = program(values, None, torch.tensor([2.0]))
            assert float(found) == (-2.0 if negate else 2.0) * numel


def largest_allocation(update: object, tensors: list[torch.Tensor]) -> int:
    update(*tensors, scalars_of(2))
    with torch.profiler.profile(profile_memory=True) as profile:
        update(*tensors, scalars_of(3))
    return max((event.cpu_memory_usage for event in profile.events()), default=0)


def test_update_makes_no_temporary_of_the_tensors_size() -> None:
    tensors = make_tensors(16 * EAGER_CHUNK, torch.float32, torch.float32)

    def whole_formula(*tensors_and_scalars: object) -> None:
        adax_update(*tensors_and_scalars[:4], **tensors_and_scalars[4]._asdict())

    assert largest_allocation(whole_formula, tensors) >= tensors[0].nbytes  # the profiler does see temporaries
    assert largest_allocation(update_cpu, tensors) < 4096
    assert largest_allocation(update_eager, tensors) < tensors[0].nbytes // 4


def test_eager_chunks_equal_the_whole_formula() -> None:
    chunked = make_tensors(3 * EAGER_CHUNK + 5, torch.float32, torch.float32)
    whole = [tensor.clone() for tensor in chunked]
    update_eager(*chunked, scalars_of(1))
    adax_update(*whole, **scalars_of(1)._asdict())
    assert all(torch.equal(one, other) for one, other in zip(chunked, whole, strict=True))


@pytest.mark.parametrize("batch", [GATHERED_NUMEL, 500], ids=["one-batch", "many-batches"])
def test_small_tensors_together_equal_each_alone(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adax_triton.cpu.GATHERED_NUMEL", batch)
    sizes = (3, 0, 400, 101, 499, 500, 501, 1)
    together = [make_tensors(size, torch.float32, torch.bfloat16) for size in sizes]
    alone = [[tensor.clone() for tensor in tensors] for tensors in together]
    update_small_cpu([tuple(tensors) for tensors in together], scalars_of(2))
    for tensors in alone:
        update_eager(*tensors, scalars_of(2))
    for one, other in zip(together, alone, strict=True):
        assert all(map(torch.equal, one, other))


def test_missing_compiler_is_told_once_and_steps_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    program = (
        "import torch, warnings\n"
        "from adax_triton import AdaXW\n"
        f"p = torch.ones({COMPILE_FROM_NUMEL}, requires_grad=True)\n"
        "p.grad = torch.ones_like(p)\n"
        "o = AdaXW([p], weight_decay=0.0)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    o.step(); o.step(); o.step()\n"
        "ours = [str(w.message) for w in caught if 'adax_triton' in str(w.message)]\n"
        "print(len(ours), 'no-such-compiler' in ours[0], float(p[0]))\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    count, names_compiler, weight = done.stdout.split()
    assert (count, names_compiler) == ("1", "True")
    # m of three equal gradients: 0.1, 0.19, 0.271; v is 1 throughout.
    assert float(weight) == pytest.approx(1 - 5e-3 * (0.1 + 0.19 + 0.271), rel=1e-6)
