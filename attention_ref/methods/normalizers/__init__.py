"""From scores to weights: p = normalise(z), the scores and the mixing as in softmax attention."""
