r"""Theorems about attention, checked in numbers: a construction, the quantities, a counterexample.

Nothing is changed: for softmax attention :math:`P = \operatorname{softmax}(Z)` a row says what
:math:`P` can be, or what it computes, builds the object that proves it, and measures the bound.
"""
