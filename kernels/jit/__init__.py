"""Triton code, one module an op, each with its launchers and compile cases. Imported only when Triton is chosen."""
