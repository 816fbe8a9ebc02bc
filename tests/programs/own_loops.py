"""Training loops as users write them, without and with one line of `attach`.

``own_loops.py LOOP ALGORITHM SAMPLES SEED...`` prints the loss of the trained model by seed, as
JSON: with the algorithm ``none`` in one process in plain torch, else on all ranks of the job, where
each rank has its share of the same batches, so that the samples are as many.
"""

from __future__ import annotations

import io
import itertools
import json
import sys
from collections.abc import Iterator
from pydoc_data.topics import topics

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import mpi_dasgd
from tests.support.pace import keep_pace

BATCH = 64  # of all ranks together
CONTEXT = 32  # characters


class Transformer(nn.Module):
    """A character-level language model whose output weights are those of its embedding."""

    def __init__(self, characters: int, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.position = nn.Parameter(torch.zeros(CONTEXT, width))
        layer = nn.TransformerEncoderLayer(
            width, 2, 2 * width, dropout=0.1, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, characters, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(x) + self.position, self.mask, is_causal=True))


class ResNet(nn.Module):
    """A small residual network with batch-norm, for images of 8x8."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(16, 16, 3, padding=1, bias=False),
                nn.BatchNorm2d(16),
                nn.ReLU(),
                nn.Conv2d(16, 16, 3, padding=1, bias=False),
                nn.BatchNorm2d(16),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for block in self.blocks:
            x = (x + block(x)).relu()
        return self.head(x.mean((2, 3)))


def text_batches(text: Tensor, size: int, seed: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of pieces of a text, and of the characters that follow."""
    random = np.random.default_rng(seed)
    while True:
        start = torch.from_numpy(random.integers(len(text) - CONTEXT - 1, size=size))
        pieces = text[start[:, None] + torch.arange(CONTEXT + 1)]
        yield pieces[:, :-1], pieces[:, 1:]


@torch.no_grad()
def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The loss in evaluation mode; the model is in training mode again afterwards."""
    model.eval()
    loss = cross_entropy(model(x).flatten(0, -2), y.flatten()).item()
    model.train()
    return loss


def train_transformer(algorithm: str, seed: int, samples: int) -> float:
    """AdamW with groups, warm-up and cosine, clipping, dropout, tied weights."""
    text = "".join(topics[name] for name in sorted(topics))[:150_000]
    codes = {character: code for code, character in enumerate(sorted(set(text)))}
    data = torch.tensor([codes[character] for character in text])
    data, test = data[:-15_000], data[-15_000:]
    torch.manual_seed(seed)
    model = Transformer(len(codes))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    steps = samples // BATCH
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=steps // 10)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - steps // 10)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [steps // 10])
    training, rank, ranks = attach(algorithm, model, optimizer)
    torch.manual_seed(seed * 1000 + rank)  # dropout
    batches = text_batches(data, BATCH // ranks, (seed, rank))
    for x, y in itertools.islice(batches, steps):
        optimizer.zero_grad()
        cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        stay_together(training)
    assert model.head.weight is model.embedding.weight
    finish(training)
    return loss_of(model, *next(text_batches(test, 400, (0,))))


def train_resnet(algorithm: str, seed: int, samples: int) -> float:
    """SGD with momentum and one cycle; evaluates, saves and loads in mid-run."""
    images, classes = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(classes)
    data, test = TensorDataset(x[:1280], y[:1280]), (x[1280:], y[1280:])
    torch.manual_seed(seed)
    model = ResNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    epochs, steps = samples // len(data), len(data) // BATCH
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs * steps)
    training, _, ranks = attach(algorithm, model, optimizer)
    if training is None:
        order = torch.Generator().manual_seed(seed)
        loader = DataLoader(data, BATCH, shuffle=True, drop_last=True, generator=order)
    else:
        sampler = mpi_dasgd.sampler(data, training, seed=seed)
        loader = DataLoader(data, BATCH // ranks, sampler=sampler, drop_last=True)
    for epoch in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
            scheduler.step()
            stay_together(training)
        before = loss_of(model, *test)
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        if epoch == epochs // 2:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            file.seek(0)
            state = torch.load(file)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            assert loss_of(model, *test) == before
    finish(training)
    return loss_of(model, *test)


def attach(
    algorithm: str, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[mpi_dasgd.Decentralized | None, int, int]:
    """Return the training, rank and number of ranks; without training for ``none``."""
    if algorithm == "none":
        return None, 0, 1
    training = mpi_dasgd.attach(model, optimizer, algorithm)
    return training, training.rank, training.size


def stay_together(training: mpi_dasgd.Decentralized | None) -> None:
    """Keep the ranks together: of half a second of training one may miss the most."""
    if training is not None and training.algorithm.description.never_waits:
        keep_pace(training)


def finish(training: mpi_dasgd.Decentralized | None) -> None:
    """Leave the model that was trained."""
    if training is not None:
        training.finish()
        training.average()
        training.close()


def main() -> None:
    torch.set_num_threads(1)
    loop, algorithm, samples, *seeds = sys.argv[1:]
    train = {"transformer": train_transformer, "resnet": train_resnet}[loop]
    losses = {int(seed): train(algorithm, int(seed), int(samples)) for seed in seeds}
    sys.stdout.write(json.dumps(losses) + "\n")


if __name__ == "__main__":
    main()
