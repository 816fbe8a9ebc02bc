"""Networks of the built-in tasks."""

from __future__ import annotations

from torch import nn

from mpi_dasgd.errors import UserError

__all__ = ["build"]


def build(name: str, features: int, classes: int) -> nn.Module:
    """Return a network for inputs of `features` values.

    Args:
        name: logistic; mlp (one hidden layer of 128); cnn (two 3x3 convolutions of 16 and 32
            channels, 9,930 parameters on 8x8 images); cnn_1m (1.2 M parameters, 28x28 images);
            mlp_25m (25.1 M parameters, 1024-4096-4096-classes).
        features: values per sample; the convolutional networks take square images.
        classes: number of classes.

    Raises:
        UserError: the network does not fit the data.
    """
    side = round(features**0.5)
    if name.startswith("cnn") and side * side != features:
        raise UserError(
            f"task.model: {name!r} takes square images, but samples have {features} values"
        )
    if name == "logistic":
        return nn.Linear(features, classes)
    if name == "mlp":
        return nn.Sequential(nn.Linear(features, 128), nn.ReLU(), nn.Linear(128, classes))
    if name == "mlp_25m":
        return nn.Sequential(
            nn.Linear(features, 4096),
            nn.ReLU(),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Linear(4096, classes),
        )
    if name == "cnn":
        return nn.Sequential(
            nn.Unflatten(1, (1, side, side)),
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(32 * (side // 2) ** 2, classes),
        )  # fmt: skip
    if name == "cnn_1m":
        return nn.Sequential(
            nn.Unflatten(1, (1, side, side)),
            nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * ((side - 4) // 2) ** 2, 128), nn.ReLU(),
            nn.Linear(128, classes),
        )  # fmt: skip
    raise UserError(f"task.model: {name!r} is not known")
