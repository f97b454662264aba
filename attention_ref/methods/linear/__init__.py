"""No n x n matrix: weights phi(q) . phi(k), so that sum_s phi(k_s) v_s^T is formed only once."""
