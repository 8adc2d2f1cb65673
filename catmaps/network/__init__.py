"""The architecture: a bidirectional transformer with adaptive norms. Imports torch only; knows no flow mathematics.

Modules that losses differentiate along time have a twin method that maps (value, tangent) to (value, tangent), written
by hand: it works under sharding, checkpointing and compilation, where forward-mode AD does not, and costs less.
"""
