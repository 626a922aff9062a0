"""What a compiler makes of every kernel, without a GPU: `python -m spear_fast.kernels.audit`, see `__main__`."""
