"""Batches: what a run trains on, and how it gets to the device."""
