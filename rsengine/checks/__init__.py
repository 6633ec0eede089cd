"""Proofs about a training step, and what only a GPU can tell of it."""
