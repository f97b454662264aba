"""Synthetic benchmarks: a generator of tokens whose rules are known, x ~ task(rng), answer = f(x).

Nothing about attention changes here; what a mechanism can and cannot do shows on inputs whose
right answers follow from the rules.
"""
