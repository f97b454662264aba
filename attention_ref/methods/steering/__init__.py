"""Editing weights or heads of a trained model while it runs: p' = edit(p), out = p' v.

No parameter is trained; the maps that the model computed are changed before they mix the values.
"""
