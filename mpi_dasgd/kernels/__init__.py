"""Arithmetic over whole models: compiled where possible, NumPy elsewhere, with the same bits."""
