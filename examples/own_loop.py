"""A PyTorch loop of your own, made decentralized by the four lines marked so.

mpi-dasgd launch -n 4 examples/own_loop.py
"""

import torch
from sklearn.datasets import load_digits

import mpi_dasgd  # 1

torch.manual_seed(0)
x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
x = x.float() / 16
model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
training = mpi_dasgd.Decentralized(model, optimizer, total_samples=60_000)  # 2

torch.manual_seed(1 + training.rank)  # every rank draws its own batches
while not training.finished:
    batch = torch.randint(297, 1797, (32,))
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
    training.step(len(batch))  # 3, instead of optimizer.step()

training.close()  # 4
training.average()
accuracy = (model(x[:297]).argmax(1) == y[:297]).float().mean().item()
if training.rank == 0:
    print(
        f"{training.size} ranks, {training.total_samples} samples, accuracy {100 * accuracy:.1f} %"
    )
