"""What `scripts/fuzz_check.py` is made of: whole files of every kind, and ways to damage them."""
