"""Losses and noise on attention: p' = r(p, noise) or L + R(p), to train with."""
