r"""How attention is trained, :math:`\theta \leftarrow \theta - \eta\, h`: optimisers, objectives.

The attention stays as it is; what changes is the direction :math:`h` that is made from gradients
of the loss, written as one step, a pure function of parameters and gradients.
"""
