"""Attention over channels and grids: what is weighed is a channel, a place, a part of an image."""
