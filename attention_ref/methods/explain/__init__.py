r"""Reading attention: from the maps :math:`P_1, \dots, P_L` of a model to what its tokens mean.

Nothing is changed: :math:`\text{relevance} = f(P_1, \dots, P_L, \dots)` is computed from weights,
values or gradients that a forward left behind.
"""
