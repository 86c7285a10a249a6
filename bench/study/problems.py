"""Training problems of the study: networks and two online problems.

A problem builds a `Task` for a seed. Initial weights and batches depend on the seed only, so the rules of a seed see
the same data.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from adax_triton.bench.training.gpt import GPT
from torch import Tensor, nn

from . import text

HELD_OUT = 512  # validation windows of words; a quarter of it for bytes, which are longer


class Task:
    """One training run of a problem.

    Attributes:
        params: the trained tensors.
    """

    params: Sequence[Tensor]

    def loss(self, step: int) -> Tensor:
        """Return the scalar training loss of a step, counted from 1."""
        raise NotImplementedError

    def validate(self) -> float:
        """Return the validation loss; online, the mean since the last call."""
        raise NotImplementedError


class Problem(NamedTuple):
    """A problem and its settings, which are equal for all rules.

    Attributes:
        title, unit: short description and unit of the loss, for tables and pictures.
        build: function of (seed, device) that returns a task.
        horizons: numbers of steps.
        lr: first learning rate that the search tries.
        step_ms: time of a step on one core; the progress bar uses it.
        weight_decay: decoupled.
        max_grad_norm: of clipping; None: no clipping.
        schedule: name in `SCHEDULES`.
        reach: number of first learning rates on each side of the middle one, see `search`.
        online: the result of a run is its mean loss over the second half, not the last validation loss.
    """

    title: str
    unit: str
    build: Callable[[int, torch.device], Task]
    horizons: tuple[int, ...]
    lr: float
    step_ms: float
    weight_decay: float = 0.1
    max_grad_norm: float | None = 1.0
    schedule: str = "cosine"
    reach: int = 1
    online: bool = False


class Supervised(Task):
    """A network that returns the mean loss of (inputs, targets).

    Args:
        model: called with a batch.
        batch: function of the step that returns a training batch.
        held_out: batches of the validation loss.
    """

    def __init__(self, model: nn.Module, batch: Callable[[int], tuple[Tensor, ...]], held_out: list) -> None:
        self.model, self.batch, self.held_out = model, batch, held_out
        self.params = list(model.parameters())

    def loss(self, step: int) -> Tensor:
        """Return the loss of the step's batch."""
        return self.model(*self.batch(step))

    @torch.no_grad()
    def validate(self) -> float:
        """Return the mean loss of the held-out batches."""
        return torch.stack([self.model(*batch) for batch in self.held_out]).mean().item()


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**32)


def _text_task(
    model: nn.Module,
    parts: tuple[Tensor, Tensor],
    context: int,
    targets: slice | int,
    seed: int,
    batch: int,
    held_out_windows: int,
) -> Task:
    """Return the task of a model that reads windows of a text.

    Args:
        model: called with inputs (batch, context) and targets.
        parts: training and held-out tokens.
        context: tokens before the last one of a window.
        targets: which tokens of a window are predicted.
        seed: of the order of the text.
        batch: windows per step.
        held_out_windows: spaced evenly over the held-out tokens.
    """
    train, held_out = parts
    device = next(model.parameters()).device
    offsets = torch.arange(context + 1)

    def windows(source: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        found = source[starts[:, None] + offsets].long().to(device)
        return found[:, :-1].contiguous(), found[:, targets].contiguous()

    def draw(step: int) -> tuple[Tensor, Tensor]:
        return windows(train, torch.randint(len(train) - context, (batch,), generator=_generator(seed, step)))

    starts = torch.linspace(0, len(held_out) - context - 1, held_out_windows).long()
    return Supervised(model, draw, [windows(held_out, starts)])


def gpt(
    seed: int, device: torch.device, *, layers: int = 2, width: int = 64, context: int = 32, batch: int = 8
) -> Task:
    """Predict the next byte of the library's source with a GPT.

    Args:
        seed: of the weights and of the order of the text.
        device: of the model.
        layers, width: of the GPT; its heads have width 32.
        context: bytes per window.
        batch: windows per step.
    """
    torch.manual_seed(seed)
    model = GPT(layers=layers, width=width, heads=width // 32, context=context).to(device)
    return _text_task(model, text.split_bytes(), context, slice(1, None), seed, batch, HELD_OUT // 4)


large_gpt = functools.partial(gpt, layers=8, width=512, context=512, batch=16)


class NextWord(nn.Module):
    """Predict a word from the four before it."""

    def __init__(self, words: int, width: int = 16, hidden: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.hidden = nn.Linear(text.CONTEXT * width, hidden)
        self.output = nn.Linear(hidden, words)
        nn.init.normal_(self.embedding.weight, std=0.1)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss; inputs are (batch, 4) and targets (batch,), int64."""
        return F.cross_entropy(self.output(F.gelu(self.hidden(self.embedding(inputs).flatten(1)))), targets)


def words(seed: int, device: torch.device, *, vocabulary: int = 4096, batch: int = 32) -> Task:
    """Predict the next word of the library's source from an embedding.

    Args:
        seed: of the weights and of the order of the text.
        device: of the model.
        vocabulary: number of words; most are in few batches, so their gradients are sparse.
        batch: predicted words per step.
    """
    torch.manual_seed(seed)
    model = NextWord(vocabulary).to(device)
    return _text_task(model, text.split_words(vocabulary), text.CONTEXT, -1, seed, batch, HELD_OUT)


class Convolutional(nn.Module):
    """Two convolutions with group norm and a linear layer, for 8x8 images."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.GroupNorm(4, 2 * width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * 16, 10),
        )

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss; images are (batch, 1, 8, 8), labels (batch,)."""
        return F.cross_entropy(self.layers(images), labels)


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the images need scikit-learn: pip install 'adax-triton[bench]'") from error
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=_generator(0, 0))
    return (torch.tensor(images).float()[order].view(-1, 1, 8, 8) - 4.9) / 6.0, torch.tensor(labels)[order]


def images(seed: int, device: torch.device, *, noise: float = 0.7, batch: int = 32) -> Task:
    """Classify noisy 8x8 digits with a small convolutional network.

    The last 400 of scikit-learn's 1,797 images are held out.

    Args:
        seed: of the weights, the batches and their noise.
        device: of the model.
        noise: standard deviation of new noise in each batch, in that of the pixels; it keeps the loss away from 0.
        batch: images per step.
    """
    pixels, labels = (tensor.to(device) for tensor in _digits())
    count = len(labels) - 400
    torch.manual_seed(seed)
    model = Convolutional().to(device)

    def noisy(chosen: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        found = pixels[chosen]
        return found + noise * torch.randn(found.shape, generator=generator).to(device), labels[chosen]

    def draw(step: int) -> tuple[Tensor, Tensor]:
        generator = _generator(seed, step)
        return noisy(torch.randint(count, (batch,), generator=generator), generator)

    return Supervised(model, draw, [noisy(torch.arange(count, count + 400), _generator(0, 0))])


class Drift(Task):
    """Online linear regression with a moving target and alternating noise.

    The target weights are a random walk of step `WALK` per step. The noise of the labels is 1 and `NOISE` in turn, for
    `PERIOD` steps each. A long memory then keeps the steps of a quiet phase small. `validate` returns the
    mean squared error against the noiseless target before each update.
    """

    PERIOD, INPUTS, BATCH, WALK, NOISE = 250, 64, 8, 0.02, 30.0

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed = seed
        self.weight = torch.zeros(self.INPUTS, device=device, requires_grad=True)
        self.params = [self.weight]
        self._target = torch.zeros(self.INPUTS)
        self._errors: list[Tensor] = []

    def _next_phase(self, phase: int) -> None:
        generator = _generator(self.seed, phase)
        walk = self.WALK * torch.randn(self.PERIOD, self.INPUTS, generator=generator)
        targets = self._target + walk.cumsum(0)
        self._target = targets[-1]
        inputs = torch.randn(self.PERIOD, self.BATCH, self.INPUTS, generator=generator)
        exact = torch.einsum("pbi,pi->pb", inputs, targets)
        noise = (self.NOISE if phase % 2 else 1.0) * torch.randn(exact.shape, generator=generator)
        self.inputs, self.exact, self.labels = (x.to(self.weight.device) for x in (inputs, exact, exact + noise))

    def loss(self, step: int) -> Tensor:
        """Return the squared error of the step's noisy labels."""
        phase, index = divmod(step - 1, self.PERIOD)
        if index == 0:
            self._next_phase(phase)
        found = self.inputs[index] @ self.weight
        self._errors.append((found.detach() - self.exact[index]).square().mean())
        return (found - self.labels[index]).square().mean()

    def validate(self) -> float:
        """Return the mean error since the last call."""
        mean = torch.stack(self._errors).mean().item()
        self._errors.clear()
        return mean


class Rare(Task):
    """The counter-example to Adam: a rare large gradient outweighs many small ones.

    `COORDINATES` independent x in [-1, 1] start at 0. The loss of x is 1010 x in one of 101 steps, else -10 x, so the
    mean is 10/101 x and -1 is best. The seed draws the phase of each coordinate. `validate` returns the mean loss above
    the best, in [0, 0.198]; it is 0.099 at the start.

    Source: Reddi, Kale, Kumar 2018, arXiv:1904.09237, section 5.
    """

    COORDINATES, PERIOD = 64, 101

    def __init__(self, seed: int, device: torch.device) -> None:
        self.x = torch.zeros(self.COORDINATES, device=device, requires_grad=True)
        self.params = [self.x]
        phases = torch.randint(self.PERIOD, (self.COORDINATES,), generator=_generator(seed, 0))
        is_large = torch.arange(self.PERIOD)[:, None] == phases
        self.slopes = torch.where(is_large, 1010.0, -10.0).to(device)

    @torch.no_grad()
    def _project(self) -> None:
        self.x.clamp_(-1.0, 1.0)

    def loss(self, step: int) -> Tensor:
        """Return the sum of the coordinates' losses."""
        self._project()
        return (self.slopes[step % self.PERIOD] * self.x).sum()

    def validate(self) -> float:
        """Return the mean loss of a coordinate above the best one."""
        self._project()
        return 10.0 / self.PERIOD * (self.x.detach().mean().item() + 1.0)


def _cosine(progress: float) -> float:
    return 0.55 + 0.45 * math.cos(math.pi * progress)


# Factor of the learning rate by the share of the steps after the warm-up that are done.
SCHEDULES: dict[str, Callable[[float], float]] = {"cosine": _cosine, "constant": lambda progress: 1.0}
WARMUP = 0.05  # share of the steps with a linear warm-up


def learning_rate_factor(schedule: str, step: int, steps: int) -> float:
    """Return the factor of the learning rate in a step.

    Args:
        schedule: name in `SCHEDULES`; it follows a linear warm-up.
        step: counted from 1.
        steps: of the run.
    """
    warmup = max(1, round(WARMUP * steps))
    if step <= warmup:
        return step / warmup
    return SCHEDULES[schedule]((step - warmup) / max(1, steps - warmup))


PROBLEMS: dict[str, Problem] = {
    "gpt": Problem("GPT", "nats per byte", gpt, (150, 600, 2400), lr=4e-3, step_ms=6.0),
    "words": Problem("sparse embedding", "nats per word", words, (200, 800, 3200), lr=4e-3, step_ms=2.5),
    "images": Problem("images", "nats", images, (300, 1200, 4800), lr=4e-3, step_ms=1.5),
    "drift": Problem(
        "alternating noise",
        "squared error",
        Drift,
        (1000, 4000, 16000),
        lr=3e-2,
        step_ms=0.25,
        weight_decay=0.0,
        max_grad_norm=None,
        schedule="constant",
        online=True,
    ),
    "rare": Problem(
        "rare large gradients",
        "excess loss",
        Rare,
        (1000, 4000, 16000),
        lr=0.1,
        step_ms=0.2,
        weight_decay=0.0,
        max_grad_norm=None,
        reach=18,  # the whole grid
    ),
    "gpt-large": Problem("large GPT", "nats per byte", large_gpt, (250, 1000, 4000), lr=1e-3, step_ms=60.0),
}
STUDIED = tuple(name for name in PROBLEMS if name != "gpt-large")  # gpt-large needs a GPU
