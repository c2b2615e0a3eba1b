"""A small ResNet trained by PyTorch on the CPU, with PyTorch's batch norm and with fastbn's: losses and time a step.

python -m fastbn.bench.torch_training [channels] [batch] [pixels]

Three models: PyTorch's, `convert(model)`, and `convert(model, fuse=True)`, whose ReLUs right behind a batch norm (seven
of thirteen) are part of it.

Two OpenMP runtimes in one process spin against each other; OMP_WAIT_POLICY=passive lets them sleep. The models take
turns, step by step, so that all see the same machine; the medians are printed, of time by the clock and of processor
time, which other programs disturb less.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from typing import Any


def resnet(width: int) -> Any:
    """Three stages of two blocks, as in He et al. (2015), section 4.2, from `width` channels to four times as many."""
    from torch import nn

    class Block(nn.Module):  # type: ignore[misc, unused-ignore]
        def __init__(self, before: int, channels: int, stride: int) -> None:
            super().__init__()
            self.way = nn.Sequential(
                nn.Conv2d(before, channels, 3, stride, 1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
                nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
                nn.BatchNorm2d(channels),
            )
            self.short = nn.Sequential()
            if stride > 1 or before != channels:
                self.short = nn.Sequential(nn.Conv2d(before, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

        def forward(self, x: Any) -> Any:
            return nn.functional.relu(self.way(x) + self.short(x))

    blocks = [
        Block(width * before, width * channels, stride)
        for before, channels, stride in ((1, 1, 1), (1, 1, 1), (1, 2, 2), (2, 2, 1), (2, 4, 2), (4, 4, 1))
    ]
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), *blocks),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)),
    )


class Training:
    """A model, its optimizer, and the losses and times of its steps."""

    def __init__(self, model: Any) -> None:
        import torch

        self.model, self.losses = model.train(), []  # type: ignore[var-annotated]
        self.clock, self.processor = [], []  # type: ignore[var-annotated]
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step(self, images: Any, labels: Any) -> None:
        from torch.nn.functional import cross_entropy

        start, used = time.perf_counter(), time.process_time()
        loss = cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.clock.append(time.perf_counter() - start)
        self.processor.append(time.process_time() - used)
        self.losses.append(loss.item())


def compare(steps: int, width: int, batch: int, size: int = 32) -> dict[str, Training]:
    """The same model and the same data by all three."""
    import torch

    from fastbn.torch import convert

    torch.manual_seed(0)
    model = resnet(width)
    runs = {"PyTorch": Training(copy.deepcopy(model)), "fastbn": Training(convert(copy.deepcopy(model)))}
    runs["fused"] = Training(convert(copy.deepcopy(model), fuse=True))
    labels = torch.arange(batch) % 10
    patterns = torch.randn(10, 3, size, size)
    for step in range(steps):
        images = patterns[labels] + torch.randn(batch, 3, size, size)
        for name in list(runs)[:: 1 if step % 2 else -1]:
            runs[name].step(images, labels)
    return runs


def main() -> None:
    width, batch, size = (int(a) for a in (*sys.argv[1:], *("32", "32", "32")[len(sys.argv) - 1 :]))
    runs = compare(30, width, batch, size)
    for name, run in runs.items():
        clock, processor = (1e3 * statistics.median(times[5:]) for times in (run.clock, run.processor))
        print(f"{name:8} {clock:8.1f} ms a step, {processor:8.1f} ms of processor time, loss {run.losses[-1]:.6f}")
    apart = max(max(losses) - min(losses) for losses in zip(*(run.losses for run in runs.values()), strict=True))
    print(f"losses differ by {apart:.1e} at most")


if __name__ == "__main__":
    main()
