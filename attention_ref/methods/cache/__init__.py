"""The cache of keys and values: out_t = sum over s in K_t of p_ts v_s, with |K_t| at most a budget.

A policy says which indices K_t are kept after each token; the attention over them is the usual one.
"""
