"""Discrete models on the same trunk, to compare the flow with: autoregressive, masked diffusion, uniform diffusion.

A family is a module of three functions: `loss`, what a batch is trained on; `bound`, how likely it finds texts;
`sample`, from nothing or a prompt to text. `families.py` lists them. They ask of a network only that it is a
`Predictor`. Times are the flow's: t = 0 is noise, t = 1 is data. Imports torch, numpy and `catmaps.flow`.
"""
