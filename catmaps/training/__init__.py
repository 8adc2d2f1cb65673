"""Training on OLMo-core: loop, loader, checkpoints and reductions are the engine's; what a batch does is ours.

Nothing outside this folder imports the engine; it is the extra `train`.
"""
