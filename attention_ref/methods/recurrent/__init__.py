"""A state that is carried from token to token: S_t = f(S_{t-1}, k_t, v_t), out_t = S_t^T q_t."""
