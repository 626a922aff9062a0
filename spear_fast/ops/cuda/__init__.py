"""CUDA kernels of csrc/cuda built at run time, through CuPy, where the extension was built without nvcc.

A module an op: it computes the launch, as csrc/cuda does in C++ for the extension, and fills in the kernel's arguments.
"""
