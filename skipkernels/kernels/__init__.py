"""Kernels written in Python: ``triton``, one op a file. Those in C++ and CUDA are in csrc."""
