"""Timing the kernels beside other people's, on one GPU and in one run."""
