"""Frameworks that drive the loop themselves: accelerate, Hugging Face Trainer, and Lightning."""

from __future__ import annotations
