"""Proofs about a training step, and the checks that need a GPU."""
