"""One run in several processes, launched by torchrun or by ``--processes``."""
