"""Bindings for frameworks that record what is done to their arrays, a package each, imported when first used.

A binding prepares passes of the core for shapes and dtypes, and runs them on addresses (`sru_rt.passes`). NumPy and
CuPy arrays, and arrays of other libraries through DLPack, need none.
"""
