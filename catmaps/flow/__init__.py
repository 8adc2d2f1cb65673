"""The mathematics of categorical flow maps. Imports torch (and numpy for its counter noise), nothing of ours outside.

Conventions: t = 0 is noise, t = 1 is data, 0 <= s <= t <= 1; times are per position, of shape (B, L), or (B, 1) and
broadcast; a position at s = t = 1 is clean text. Equation numbers are those of docs/maths.md.
"""
