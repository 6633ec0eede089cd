"""Batches: what a run trains on, and how they get to the device."""
