"""The proof that needs no GPU: a strict interpreter, an offline compiler, and what they find."""
