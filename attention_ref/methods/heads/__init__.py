"""How Q, K, V are made, shared and routed: out_h = attention(q_h, k_g(h), v_g(h)) over heads h."""
