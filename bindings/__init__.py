"""Bindings for array libraries and frameworks, one file each, imported when first used.

A binding turns arrays of its framework into addresses, sizes, a dtype name, a device and a stream, and calls
`sru_rt.launch.run`. NumPy arrays, and arrays of other libraries through DLPack, need no binding.
"""
