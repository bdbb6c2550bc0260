"""`python -m sru_rt bench`: the speed of recurrences and layers beside copies, products and other libraries.

Nothing of it is imported before the command runs. `problem` says what is computed, `parts` at which sizes;
`contestants` are those who compute it, each a small file; `runner` has them measured in processes (`child`) by clocks
(`clocks`), and `report` makes tables and plots of the file that it writes.
"""
