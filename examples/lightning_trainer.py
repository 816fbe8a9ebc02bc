"""Lightning's Trainer, made decentralized by the two lines marked so.

mpi-dasgd launch -n 4 examples/lightning_trainer.py
"""

import lightning
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from mpi_dasgd.integrations.lightning import DecentralizedStrategy  # 1


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Sequential(
            torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
        )
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        self.accuracy(self.network(batch[0]), batch[1])
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


lightning.seed_everything(0)
x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
data = TensorDataset(x.float() / 16, y)
training, validation = (torch.utils.data.Subset(data, r) for r in (range(297, 1797), range(297)))

trainer = lightning.Trainer(
    strategy=DecentralizedStrategy("adpsgd"),  # 2
    max_epochs=10,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
trainer.fit(Digits(), DataLoader(training, 32, shuffle=True), DataLoader(validation, 64))
if trainer.is_global_zero:
    accuracy = 100 * float(trainer.callback_metrics["accuracy"])
    print(f"{trainer.world_size} ranks, accuracy {accuracy:.1f} %")
