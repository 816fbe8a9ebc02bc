"""A PyTorch loop as it was, made decentralized by the lines marked so: `optimizer.step()` stays.

mpi-dasgd launch -n 4 examples/attached_loop.py
"""

import torch
from sklearn.datasets import load_digits

import mpi_dasgd  # 1

torch.manual_seed(0)
x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
x = x.float() / 16
train_set = torch.utils.data.TensorDataset(x[297:], y[297:])

model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
training = mpi_dasgd.attach(model, optimizer, samples_per_step=32)  # 2

sampler = mpi_dasgd.sampler(train_set, training)  # 3: this rank's share of the data
loader = torch.utils.data.DataLoader(train_set, batch_size=32, sampler=sampler)
epochs = 20
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))

for epoch in range(epochs):
    sampler.set_epoch(epoch)
    for inputs, labels in loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()

training.close()  # 4
training.average()  # 5: the mean of the ranks' models
accuracy = (model(x[:297]).argmax(1) == y[:297]).float().mean().item()
if training.rank == 0:
    print(
        f"{training.size} ranks, {training.total_samples} samples, accuracy {100 * accuracy:.1f} %"
    )
