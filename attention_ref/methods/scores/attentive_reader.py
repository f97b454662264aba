r"""Attentive and impatient reader: one look at a document for a question, or one for each word.

The attentive reader, for document states y and a question u:

.. math::

    m_s &= \tanh(y_s W_{ym} + u W_{um})                                                &(1)\\
    p_s &= e^{m_s \cdot w_{ms}} / \textstyle\sum_{s'} e^{m_{s'} \cdot w_{ms}}          &(2)\\
    r   &= \textstyle\sum_s p_s\, y_s                                                  &(3)\\
    g   &= \tanh(r W_{rg} + u W_{ug})                                                  &(4)

The impatient reader looks again with every state :math:`y^q_i` of the question, remembering r:

.. math::

    m_{is} &= \tanh(y_s W_{dm} + r_{i-1} W_{rm} + y^q_i W_{qm}), \qquad r_0 = 0        &(1)\\
    p_{is} &= e^{m_{is} \cdot w_{ms}} / \textstyle\sum_{s'} e^{m_{is'} \cdot w_{ms}}   &(2)\\
    r_i    &= \textstyle\sum_s p_{is}\, y_s + \tanh(r_{i-1} W_{rr})                    &(3)\\
    g      &= \tanh(r_T W_{rg} + u W_{qg})                                             &(4)

The score is additive attention (scores/additive) with one query; what is new is that keys and
values are the document, the query is a question about it, and g combines what was found with what
was asked. The answer is the entity a with the largest :math:`g \cdot W_a`.

Source: Hermann et al. 2015, section 3; no official code; grade C (well known).
"""

from typing import NamedTuple

import numpy as np

from attention_ref import core


class Look(NamedTuple):
    """One look at the document."""

    m: np.ndarray  # (..., S, M), hidden units
    p: np.ndarray  # (..., S), weights
    lse: np.ndarray  # (...), log of the sum of exponentials, nats


class Cache(NamedTuple):
    """What either backward needs, and what implementers compare with (``p``, ``r``)."""

    y: np.ndarray  # (..., S, Y), states with NaN or infinity replaced by zeros
    words: list  # of (..., U), likewise, for each look of the impatient reader
    u: np.ndarray  # (..., U), likewise
    parameters: tuple  # the matrices, in the order of the arguments
    looks: list  # of Look, a single one for the attentive reader
    p: np.ndarray  # (..., S), weights; (..., T, S) for the impatient reader
    r: list  # of (..., Y): zero, then what was known after each look
    kept: list  # of (..., Y), tanh(r W_rr) of each look of the impatient reader
    out: np.ndarray  # (..., G), without NaN
    live: np.ndarray  # (..., S), True = may be read
    poison: np.ndarray  # (..., 1), True where the output is NaN


def look_forward(h, c, y, w_ms, live, empty_row="zero"):
    """Steps (1) to (3) of either reader: weights of the states, and their sum.

    Parameters
    ----------
    h : ndarray, shape (..., S, M)
        What the document says to the hidden units.
    c : ndarray, shape (..., M)
        What the question, or the question and the memory, says to them.
    y, w_ms, live, empty_row
        As in :func:`attentive_reader_forward`.

    Returns
    -------
    look : Look
        Hidden units, weights, log-sum-exp.
    found : ndarray, shape (..., Y)
        The mixture.
    """
    m = np.tanh(h + c[..., None, :])  # (1)
    z = np.sum(m * w_ms, axis=-1)[..., None, :]
    p, lse = core.softmax_forward(z, live[..., None, :], empty_row)  # (2)
    return Look(m, p[..., 0, :], lse[..., 0]), core.mix_forward(p, y)[..., 0, :]  # (3)


def look_backward(dfound, look, y, w_ms, live):
    """Back through one look.

    Parameters
    ----------
    dfound : ndarray, shape (..., Y)
        Gradient of the mixture.
    look, y, w_ms, live
        From the forward.

    Returns
    -------
    dh, dc, dy, dw_ms : ndarray
        Of the full leading shape; dy is that of y as values only.
    """
    dp = np.sum(dfound[..., None, :] * y, axis=-1)  # (3')
    dy = look.p[..., None] * dfound[..., None, :]
    dz = core.softmax_backward(dp, look.p, live)[..., None]  # (2')
    dh = dz * w_ms * (1.0 - np.square(look.m))  # (1')
    return dh, np.sum(dh, axis=-2), dy, np.sum(dz * look.m, axis=-2)


def _outer(a, b):
    """The gradient of a matrix from its input a and the gradient b of its output."""
    full = np.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    a, b = (np.broadcast_to(x, (*full, x.shape[-1])) for x in (a, b))
    return np.swapaxes(np.reshape(a, (-1, a.shape[-1])), 0, 1) @ np.reshape(b, (-1, b.shape[-1]))


def _open(n, mask, empty_row, hidden, *arrays):
    """Common checks; who is live, arrays without NaN, and which documents are poisoned."""
    full = (*n["..."], n["S"])
    core.check.check_mask(mask, full, axes="(..., S)")
    core.check.option("empty_row", empty_row, core.check.EMPTY_ROWS)
    core.check.memory((*full, hidden), arrays[0].dtype, "the hidden units", "fewer at a time")
    one = arrays[0][..., :1, :]
    mask = None if mask is None else mask[..., None, :]
    live = core.visible(one, arrays[0], mask=mask, empty_row=empty_row)
    y, *questions = arrays
    _, _, y, poison = core.quarantine(np.zeros_like(one), y, y, live, empty_row)
    poison, clean = poison[..., 0], [y]
    for a in questions:
        good = np.isfinite(a)
        clean.append(np.where(good, a, 0.0))
        poison = poison | ~np.all(good, axis=-1, keepdims=True)
    return live[..., 0, :], clean, poison


def attentive_reader_forward(y, u, w_ym, w_um, w_ms, w_rg, w_ug, *, mask=None, empty_row="zero"):
    """Read a document once, with a question in mind.

    Parameters
    ----------
    y : ndarray, shape (..., S, Y)
        States of the document's tokens; in the paper those of a bidirectional LSTM.
    u : ndarray, shape (..., U)
        The question; in the paper the last states of another one, forward and backward.
    w_ym : ndarray, shape (Y, M)
        From the document to the hidden units.
    w_um : ndarray, shape (U, M)
        From the question to the hidden units.
    w_ms : ndarray, shape (M,)
        Read-out of the hidden units.
    w_rg : ndarray, shape (Y, G)
        From what was found to the output.
    w_ug : ndarray, shape (U, G)
        From the question to the output.
    mask : bool ndarray, broadcast to (..., S), optional
        True = may be read; False for padding.
    empty_row : {"zero", "nan", "uniform", "raise"}
        What is found in a document without tokens; the output is then tanh(u w_ug).

    Returns
    -------
    out : ndarray, shape (..., G)
        The joint embedding g of document and question.
    cache : Cache
        For the backward; holds ``p`` and ``r``.

    Raises
    ------
    ShapeError
        When widths, lengths or leading axes do not fit.
    DTypeError
        When an argument is no float32 or float64 array, or the mask is not boolean.
    ParameterError
        When an option is unknown, or a document is empty under "raise".
    MemoryLimitError
        When the hidden units would take more than 2 GiB.

    Notes
    -----
    The recurrent networks that make y and u, and the softmax over the entities that turns g into an
    answer, belong to the caller. In the paper the same sizes are tried for all, 64 to 256; its data
    replace entities by markers that are permuted for each document, so that nothing but reading
    helps. :func:`impatient_reader_forward` is the paper's second reader.

    Source
    ------
    scores/attentive_reader in the catalog; section 3 of the paper; grade C.

    References
    ----------
    Hermann et al. 2015, Teaching Machines to Read and Comprehend.

    Examples
    --------
    >>> import numpy as np
    >>> y, u, one = np.array([[-1.0], [1.0]]), np.zeros(1), np.ones((1, 1))
    >>> w_ms = np.array([np.log(3.0) / np.tanh(1.0) / 2])
    >>> out, cache = attentive_reader_forward(y, u, one, one, w_ms, one, one)
    >>> cache.p.round(12).tolist(), cache.r[-1].round(12).tolist(), out.round(3).tolist()
    ([0.25, 0.75], [0.5], [0.462])
    """
    n = core.check.shapes(
        y=(y, "... S Y"), u=(u, "... U"), w_ym=(w_ym, "Y M"), w_um=(w_um, "U M"),
        w_ms=(w_ms, "M"), w_rg=(w_rg, "Y G"), w_ug=(w_ug, "U G"),
    )  # fmt: skip
    live, (y, u), poison = _open(n, mask, empty_row, n["M"], y, u)

    look, r = look_forward(y @ w_ym, u @ w_um, y, w_ms, live, empty_row)  # (1) (2) (3)
    out = np.tanh(r @ w_rg + u @ w_ug)  # (4)

    return np.where(poison, np.nan, out), Cache(
        y, [], u, (w_ym, w_um, w_ms, w_rg, w_ug), [look], look.p, [0 * r, r], [], out, live, poison
    )


def attentive_reader_backward(dout, cache):
    """Gradients of :func:`attentive_reader_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., G)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "y", "u", "w_ym", "w_um", "w_ms", "w_rg", "w_ug".
    """
    y, _, u, (w_ym, w_um, w_ms, w_rg, w_ug), (look,), _, (_, r), _, out, live, poison = cache
    core.check.cotangent(dout, out.shape)
    dg = np.where(poison, 0.0, dout) * (1.0 - np.square(out))  # (4')
    dh, dc, dy, dw_ms = look_backward(dg @ w_rg.T, look, y, w_ms, live)  # (3') (2') (1')
    du = dg @ w_ug.T + dc @ w_um.T
    return {
        "y": core.sum_to(dy + dh @ w_ym.T, y.shape), "u": core.sum_to(du, u.shape),
        "w_ym": _outer(y, dh), "w_um": _outer(u, dc),
        "w_ms": core.sum_to(dw_ms, w_ms.shape), "w_rg": _outer(r, dg),
        "w_ug": _outer(u, dg),
    }  # fmt: skip


def impatient_reader_forward(
    y, y_q, u, w_dm, w_rm, w_qm, w_ms, w_rr, w_rg, w_qg, *, mask=None, empty_row="zero"
):
    """Read a document again with every word of the question.

    Parameters
    ----------
    y : ndarray, shape (..., S, Y)
        States of the document's tokens.
    y_q : ndarray, shape (..., T, U)
        States of the question's tokens, in their order.
    u : ndarray, shape (..., V)
        The whole question.
    w_dm, w_rm, w_qm : ndarray, shapes (Y, M), (Y, M), (U, M)
        From document, memory and question's token to the hidden units.
    w_ms : ndarray, shape (M,)
        Read-out of the hidden units.
    w_rr : ndarray, shape (Y, Y)
        From the memory to the next.
    w_rg, w_qg : ndarray, shapes (Y, G), (V, G)
        From the last memory and the question to the output.
    mask, empty_row
        As in :func:`attentive_reader_forward`.

    Returns
    -------
    out : ndarray, shape (..., G)
        The joint embedding g.
    cache : Cache
        For the backward; holds ``p`` of all looks, and ``r``.

    Raises
    ------
    ShapeError, DTypeError, ParameterError, MemoryLimitError
        As in :func:`attentive_reader_forward`, and for a question without states.
    """
    n = core.check.shapes(
        y=(y, "... S Y"), y_q=(y_q, "... T U"), u=(u, "... V"), w_dm=(w_dm, "Y M"),
        w_rm=(w_rm, "Y M"), w_qm=(w_qm, "U M"), w_ms=(w_ms, "M"), w_rr=(w_rr, "Y Y"),
        w_rg=(w_rg, "Y G"), w_qg=(w_qg, "V G"),
    )  # fmt: skip
    if n["T"] == 0:
        raise core.errors.ShapeError(f"y_q has shape {y_q.shape}, expected at least one state")
    words = [y_q[..., i, :] for i in range(n["T"])]
    live, (y, u, *words), poison = _open(n, mask, empty_row, n["M"] * n["T"], y, u, *words)
    h, r, looks, kept = y @ w_dm, [np.zeros_like(y, shape=(n["Y"],))], [], []
    for word in words:
        look, found = look_forward(h, r[-1] @ w_rm + word @ w_qm, y, w_ms, live, empty_row)
        looks, kept = [*looks, look], [*kept, np.tanh(r[-1] @ w_rr)]
        r = [*r, found + kept[-1]]  # (3)
    out = np.tanh(r[-1] @ w_rg + u @ w_qg)  # (4)
    p = np.stack([look.p for look in looks], axis=-2)
    parameters = (w_dm, w_rm, w_qm, w_ms, w_rr, w_rg, w_qg)
    cache = Cache(y, words, u, parameters, looks, p, r, kept, out, live, poison)
    return np.where(poison, np.nan, out), cache


def impatient_reader_backward(dout, cache):
    """Gradients of :func:`impatient_reader_forward`: the looks in reverse order.

    Parameters
    ----------
    dout : ndarray, shape (..., G)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under the name of every float array of the forward.
    """
    y, words, u, parameters, looks, _, r, kept, out, live, poison = cache
    w_dm, w_rm, w_qm, w_ms, w_rr, w_rg, w_qg = parameters
    core.check.cotangent(dout, out.shape)
    dg = np.where(poison, 0.0, dout) * (1.0 - np.square(out))  # (4')
    total = {"w_rg": _outer(r[-1], dg), "w_qg": _outer(u, dg)}
    dr, dwords = dg @ w_rg.T, []
    for i in reversed(range(len(looks))):
        dh, dc, dy, dw_ms = look_backward(dr, looks[i], y, w_ms, live)  # (3') (2') (1')
        da = dr * (1.0 - np.square(kept[i]))
        part = {
            "y": core.sum_to(dy + dh @ w_dm.T, y.shape), "w_dm": _outer(y, dh),
            "w_rm": _outer(r[i], dc), "w_qm": _outer(words[i], dc),
            "w_ms": core.sum_to(dw_ms, w_ms.shape), "w_rr": _outer(r[i], da),
        }  # fmt: skip
        total |= {name: total.get(name, 0.0) + g for name, g in part.items()}
        dwords = [core.sum_to(dc @ w_qm.T, words[i].shape), *dwords]
        dr = dc @ w_rm.T + da @ w_rr.T
    return total | {"y_q": np.stack(dwords, axis=-2), "u": core.sum_to(dg @ w_qg.T, u.shape)}


def _case(rng, document=(6, 4), question=(3,), **options):
    """States of 4 and 3 channels, five hidden units, two outputs; entries of half the size."""
    shapes = {
        "y": document, "u": question, "w_ym": (4, 5), "w_um": (3, 5), "w_ms": (5,),
        "w_rg": (4, 2), "w_ug": (3, 2),
    }  # fmt: skip
    return {n: 0.5 * rng.standard_normal(shape) for n, shape in shapes.items()} | options


def _example(rng):
    mask = rng.random((3, 6)) < 0.6
    mask[1] = False
    return {
        "plain": _case(rng),
        "batch": _case(rng, document=(2, 3, 7, 4), question=(2, 3, 3)),
        "questions": _case(rng, question=(5, 3)),
        "mask": _case(rng, document=(3, 6, 4), question=(3, 3), mask=mask),
        "uniform": _case(rng, document=(3, 6, 4), question=(3, 3), mask=mask, empty_row="uniform"),
    }


def _found(rng):
    """The output is tanh of what was found."""
    return _case(rng) | {"w_rg": np.eye(4), "w_ug": np.zeros((3, 4))}


def _additive(kwargs):
    own = {"Wq": kwargs["w_um"], "Wk": kwargs["w_ym"], "w": kwargs["w_ms"]}
    return own | {"q": kwargs["u"][None], "k": kwargs["y"], "v": kwargs["y"]}


SPEC = core.Mechanism(
    key="scores/attentive_reader",
    forward=attentive_reader_forward, backward=attentive_reader_backward, example=_example,
    reduces_to=(
        core.Reduction(
            "scores/additive", "what is found is additive attention with one query", _found,
            _additive, gradients=False, compare=lambda out, other: (out, np.tanh(other[0])),
        ),
    ),
    claim="On synthetic cloze questions with permuted entities the attentive reader answers much "
    "better than a reader with uniform weights, the more so the longer the document.",
    verified_by=("slow loop", "PyTorch"),
)  # fmt: skip
