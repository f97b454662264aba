"""How a query meets a key: z = score(q, k), the rest as in softmax attention."""
