"""Fixed sparsity: out_t = sum over s in N(t) of p_ts v_s, where N(t) depends on positions alone."""
