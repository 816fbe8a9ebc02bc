"""Hugging Face Trainer, made decentralized by the two lines marked so.

mpi-dasgd launch -n 4 examples/huggingface_trainer.py
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from mpi_dasgd.integrations.huggingface import DecentralizedCallback  # 1

torch.manual_seed(0)
x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
images = x.float().reshape(-1, 1, 8, 8) / 8 - 1
data = [{"pixel_values": image, "labels": digit} for image, digit in zip(images, y, strict=True)]

model = ViTForImageClassification(
    ViTConfig(
        **{"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10},
        **{"hidden_size": 64, "intermediate_size": 128},
        **{"num_hidden_layers": 2, "num_attention_heads": 4},
    )
)
arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    per_device_train_batch_size=16,
    num_train_epochs=4,
    learning_rate=3e-3,
    warmup_steps=20,
    eval_strategy="epoch",
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
)
trainer = Trainer(
    model,
    arguments,
    train_dataset=data[297:],
    eval_dataset=data[:297],
    compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(1) == p.label_ids).mean()},
    callbacks=[DecentralizedCallback("adpsgd")],  # 2
)
trainer.train()
metrics = trainer.evaluate()
if trainer.is_world_process_zero():
    print(f"{arguments.world_size} ranks, accuracy {100 * metrics['eval_accuracy']:.1f} %")
