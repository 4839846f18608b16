"""Kernels of the estimates. Imported only when one of them is to run."""
