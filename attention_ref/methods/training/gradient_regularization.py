r"""Gradient regularisation: descend the loss plus its squared slope, with one more gradient a step.

A model trained by plain gradient descent minimises L; here the objective is

.. math::

    \tilde L(\theta) = L(\theta) + \tfrac{\gamma}{2} \lVert \nabla L(\theta) \rVert^2, \qquad
    \nabla \tilde L = g + \gamma H g, \quad g = \nabla L(\theta),\ H = \nabla^2 L(\theta)

and :math:`H g` is the product itself or one of two differences of gradients along g:

.. math::

    g        &= \nabla L(\theta)                                                            &(1)\\
    \Delta_F &= \bigl(\nabla L(\theta + \epsilon g) - g\bigr) / \epsilon, \quad
    \Delta_B  = \bigl(g - \nabla L(\theta - \epsilon g)\bigr) / \epsilon, \quad
    \Delta_E  = H g                                                                        &(2)\\
    \theta'  &= \theta - \eta\, (g + \gamma \Delta)                                         &(3)

All three are equal for a quadratic loss; elsewhere forward and backward differences leave
:math:`H g` by terms of order :math:`\epsilon` and of opposite sign. Forward with
:math:`\gamma = \epsilon` is the step of sharpness-aware minimisation, :math:`\theta' = \theta -
\eta \nabla L(\theta + \epsilon g)`, its radius being :math:`\epsilon \lVert g \rVert`.

Source: Karakida et al. 2023, the two differences and the relation to sharpness-aware
minimisation; grade C.
"""

import numpy as np

from attention_ref import core

VARIANTS = ("forward", "backward", "exact")


def along(theta, step, direction):
    """theta + step direction, for an array or name by name for a dict.

    Parameters
    ----------
    theta, direction : ndarray or dict of ndarray
        Of one structure.
    step : float
        How far.

    Returns
    -------
    ndarray or dict of ndarray
    """
    if isinstance(theta, dict):
        return {name: x + step * direction[name] for name, x in theta.items()}
    return theta + step * direction


def gradient_regularization_step(
    theta, gradient, *, eta, gamma, eps=0.05, variant="forward", hessian_product=None, **batch
):
    """One step of gradient descent on the loss plus half its squared slope.

    Parameters
    ----------
    theta : ndarray, or dict of ndarray
        Parameters; a dict as in ``attention_ref.nn.optim``.
    gradient : callable
        ``gradient(theta, **batch)``: the gradient of the loss, of the structure of theta.
    eta : float, > 0
        Learning rate.
    gamma : float, >= 0, in the unit of eta
        Weight of the squared slope; 0 is gradient descent.
    eps : float, > 0, in the unit of eta
        Step along the gradient, which is not normalised; unused by "exact".
    variant : {"forward", "backward", "exact"}
        How H g is computed (2).
    hessian_product : callable, optional
        ``hessian_product(theta, direction, **batch)``: H times a direction; for "exact".
    **batch
        Handed to ``gradient`` and ``hessian_product`` by name, e.g. the data of this step.

    Returns
    -------
    ndarray, or dict of ndarray
        The new parameters.

    Raises
    ------
    ShapeError
        When a gradient has not the shape of its parameter.
    DTypeError
        When a parameter or a gradient is no float32 or float64 array.
    ParameterError
        When a number or the variant is outside its domain, names of gradients and parameters
        differ, or "exact" comes without ``hessian_product``.

    Notes
    -----
    Forward and backward call ``gradient`` twice a step, or once when gamma is 0. The paper finds
    forward differences with a large eps better than the exact product. Sharpness-aware
    minimisation is usually written with a radius rho of the ascent: that is eps = gamma =
    rho / norm of g, chosen anew at every step.

    Source
    ------
    training/gradient_regularization in the catalog; grade C.

    References
    ----------
    Karakida, Takase, Hayase and Osawa 2023, Understanding Gradient Regularization in Deep
    Learning.

    Examples
    --------
    L = theta^4 / 4 at theta = 1: g = 1, and (1.5^3 - 1) / 0.5 = 4.75 stands for H g = 3.

    >>> import numpy as np
    >>> theta = np.array([1.0])
    >>> step = {"eta": 0.1, "gamma": 0.2, "eps": 0.5}
    >>> gradient_regularization_step(theta, lambda x: x**3, **step).round(12).tolist()
    [0.805]
    """
    core.check.number("eta", eta, low=0, open_low=True)
    core.check.number("gamma", gamma, low=0)
    core.check.number("eps", eps, low=0, open_low=True)
    core.check.option("variant", variant, VARIANTS)
    if variant == "exact" and hessian_product is None:
        raise core.errors.ParameterError(
            "hessian_product is None, expected a callable for variant='exact'; "
            "hint: variant='forward' needs gradients only"
        )
    for name, x in _named("theta", theta).items():
        core.check.shapes(**{name: (x, "... N")})

    g = _like(theta, gradient(theta, **batch), "gradient")  # (1)
    if gamma == 0:
        return along(theta, -eta, g)
    if variant == "forward":
        ahead = _like(theta, gradient(along(theta, eps, g), **batch), "gradient")
        slope = along(g, gamma / eps, along(ahead, -1.0, g))  # (2), g + gamma Delta
    elif variant == "backward":
        behind = _like(theta, gradient(along(theta, -eps, g), **batch), "gradient")
        slope = along(g, gamma / eps, along(g, -1.0, behind))
    else:
        product = _like(theta, hessian_product(theta, g, **batch), "hessian_product")
        slope = along(g, gamma, product)
    return along(theta, -eta, slope)  # (3)


def _named(name, tree):
    """Label -> array: one entry for an array."""
    if isinstance(tree, dict):
        return {f"{name}[{key!r}]": x for key, x in tree.items()}
    return {name: tree}


def _like(theta, found, name):
    """Refuse what is not of the structure and the shapes of theta."""
    want, got = _named("theta", theta), _named("theta", found)
    if set(want) != set(got):
        raise core.errors.ParameterError(
            f"{name} returned {', '.join(sorted(got))}, expected {', '.join(sorted(want))}"
        )
    for label, x in want.items():
        core.check.cotangent(got[label], x.shape, f"{name} of {label}")
    return found


def quartic_gradient(theta, *, matrix, weight):
    """Gradient of sum_i weight_i theta_i^4 / 4 + theta . matrix theta / 2, for examples.

    Parameters
    ----------
    theta : ndarray, shape (..., N)
        Parameters.
    matrix : ndarray, shape (N, N)
        Symmetric.
    weight : ndarray, shape (N,)
        0 makes the loss quadratic.

    Returns
    -------
    ndarray, shape (..., N)
    """
    core.check.shapes(theta=(theta, "... N"), matrix=(matrix, "N N"), weight=(weight, "N"))
    return theta @ matrix + weight * theta * np.square(theta)


def quartic_hessian_product(theta, direction, *, matrix, weight):
    """The Hessian of the same loss times a direction.

    Parameters
    ----------
    theta, direction : ndarray, shape (..., N)
        Where, and what is multiplied.
    matrix, weight : ndarray, shapes (N, N), (N,)
        As in :func:`quartic_gradient`.

    Returns
    -------
    ndarray, shape (..., N)
    """
    core.check.shapes(theta=(theta, "... N"), matrix=(matrix, "N N"), weight=(weight, "N"))
    return direction @ matrix + 3.0 * weight * np.square(theta) * direction


def _example(rng):
    """Quadratic and quartic losses, every variant, parameters with and without batch axes."""

    def case(shape, quartic=1.0, **options):
        N = shape[-1]
        root = rng.standard_normal((N, N))
        return {
            "theta": rng.standard_normal(shape),
            "gradient": quartic_gradient,
            "matrix": root @ root.T / N,
            "weight": quartic * rng.random(N),
        } | options

    exact = {"variant": "exact", "hessian_product": quartic_hessian_product}
    return {
        "plain": case((5,), eta=0.1, gamma=0.3, eps=0.2),
        "backward": case((4,), eta=0.1, gamma=0.3, eps=0.2, variant="backward"),
        "exact": case((3,), eta=0.2, gamma=0.1, **exact),
        "quadratic": case((6,), 0.0, eta=0.1, gamma=0.4, eps=1.5),
        "no-penalty": case((5,), eta=0.3, gamma=0.0),
        "ascent-and-descent": case((4,), eta=0.05, gamma=0.1, eps=0.1),
        "batch": case((2, 3, 4), eta=0.1, gamma=0.2, eps=0.1, variant="backward"),
    }


SPEC = core.Training(
    key="training/gradient_regularization",
    step=gradient_regularization_step,
    example=_example,
    claim=(
        "In sparse regression with a diagonal linear network the penalty by forward differences "
        "gives a smaller L1 norm and test error than plain gradient descent."
    ),
    verified_by=("slow loop", "closed form on a quadratic"),
)
