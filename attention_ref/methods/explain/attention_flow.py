r"""Attention rollout and attention flow: how much of each input token reaches each output token.

Softmax attention shows one layer at a time. Layers are joined here in two ways, both with the
residual connection as a loop of weight r on every token:

.. math::

    A_l      &= \operatorname{rows}\bigl((1 - r)\, \tfrac1H \textstyle\sum_h P_{lh} + r I\bigr),
                \qquad \operatorname{rows}(M)_{ij} = M_{ij} / \textstyle\sum_k M_{ik}        &(1)\\
    R        &= A_L A_{L-1} \cdots A_1                                                      &(2)\\
    F_{ij}   &= \max \text{flow from } (L, i) \text{ to } (0, j), \text{ where the arc }
                (l, a) \to (l-1, b) \text{ carries at most } A_{l,ab}                       &(3)

Rollout (2) multiplies proportions along every path and adds over paths; flow (3) lets a path
carry as much as its narrowest arc. The paths of (2) together are one admissible flow, so
:math:`R_{ij} \le F_{ij} \le \min(1, \sum_a A_{1,aj})` whenever the rows of the maps sum to 1.

Source: Abnar and Zuidema 2020, section 3; official files read: attention_graph_util.py and
corel_bert_sst.py of samiraabnar/attention_flow; grade A.
"""

import numpy as np

from attention_ref import core

METHODS = ("rollout", "flow")


def mixing(maps, residual=0.5):
    """What one layer passes on: the mean over heads, the residual loop, rows scaled to sum 1.

    Parameters
    ----------
    maps : ndarray, shape (L, ..., H, T, T)
        Attention weights.
    residual : float, 0 <= residual <= 1
        Weight r of the loop.

    Returns
    -------
    ndarray, shape (L, ..., T, T)
        A row of zeros stays zero when r = 0.
    """
    mean = np.mean(maps, axis=-3) * (1.0 - residual)
    token = np.arange(maps.shape[-1], like=maps)
    joined = np.where(token[:, None] == token, mean + residual, mean)
    total = np.sum(joined, axis=-1, keepdims=True)
    return joined / np.where(total <= 0, 1.0, total)


def rollout(layers):
    """The product of the layers, the newest on the left.

    Parameters
    ----------
    layers : ndarray, shape (L, ..., T, T)
        From :func:`mixing`; layer 0 is the one next to the input.

    Returns
    -------
    ndarray, shape (..., T, T)
    """
    joint = layers[0]
    for layer in range(1, layers.shape[0]):
        joint = layers[layer] @ joint
    return joint


def network(layers):
    """The layered graph as a matrix of capacities; token t above layer l is node l T + t.

    Parameters
    ----------
    layers : ndarray, shape (L, T, T)
        From :func:`mixing`.

    Returns
    -------
    ndarray, shape ((L + 1) T, (L + 1) T)
        ``capacity[a, b]`` of the arc from a to b.
    """
    L, T, _ = layers.shape
    capacity = np.zeros_like(layers, shape=((L + 1) * T, (L + 1) * T))
    for layer in range(L):
        upper, lower = (layer + 1) * T, layer * T
        capacity[upper : upper + T, lower : lower + T] = layers[layer]
    return capacity


def maximum_flow(capacity, source, sink):
    """The largest flow between two nodes, by shortest augmenting paths (Edmonds and Karp).

    Parameters
    ----------
    capacity : ndarray, shape (N, N)
        What each arc carries at most, not negative.
    source, sink : int
        Two different nodes.

    Returns
    -------
    float
        In the unit of the capacities.
    """
    room, total = np.copy(capacity), np.zeros_like(capacity, shape=())
    while True:
        path = _shortest_path(room, source, sink)
        if not path:
            return total
        narrowest = min(room[a, b] for a, b in path)
        for a, b in path:
            room[a, b] -= narrowest
            room[b, a] += narrowest
        total = total + narrowest


def _shortest_path(room, source, sink):
    """Arcs with room from source to sink, as few as possible; an empty list when there are none."""
    parent = np.full(len(room), -1)
    frontier = np.array([source])
    while parent[sink] < 0:
        widest = np.argmax(room[frontier], axis=0)  # of the arcs into each node
        fresh = np.any(room[frontier] > 0, axis=0) & (parent < 0)
        if not np.any(fresh):
            return []
        parent[fresh] = frontier[widest[fresh]]
        frontier = np.flatnonzero(fresh)
    path = []
    while sink != source:
        path.append((parent[sink], sink))
        sink = parent[sink]
    return path


def flow(layers):
    """One maximum flow for every pair of an output and an input token.

    Parameters
    ----------
    layers : ndarray, shape (L, ..., T, T)
        From :func:`mixing`; a NumPy array.

    Returns
    -------
    ndarray, shape (..., T, T)
    """
    L, *lead, T, _ = layers.shape
    out = []
    for place in np.ndindex(*lead):
        capacity = network(layers[(slice(None), *place)])
        out += [maximum_flow(capacity, L * T + i, j) for i, j in np.ndindex(T, T)]
    return np.reshape(np.array(out, dtype=layers.dtype), (*lead, T, T))


def attention_flow_score(maps, *, method="rollout", residual=0.5, normalize=False):
    """Relevance of every input token for every output token, from the maps of all layers.

    Parameters
    ----------
    maps : ndarray, shape (L, ..., H, T, T)
        Attention weights, stacked over layers, the one next to the input first; rows are queries.
    method : {"rollout", "flow"}
        Product of the layers (2), or maximum flow (3).
    residual : float, 0 <= residual <= 1, dimensionless
        Weight r of the residual connection.
    normalize : bool
        Divide each row of the result by its sum, as the authors' code does with flows.

    Returns
    -------
    ndarray, shape (..., T, T)
        Entry (i, j): relevance of input token j for output token i. Rows of a rollout sum to 1
        when those of the maps do; rows of flows sum to at least as much.

    Raises
    ------
    ShapeError
        When the maps lack an axis, are not square, or there is no layer, head or token.
    DTypeError
        When the maps are no float32 or float64 array, or no NumPy array under "flow".
    ParameterError
        When an option is outside its domain, or a map holds NaN or a negative number under "flow".

    Notes
    -----
    The paper takes r = 1/2 and so do its authors' files, which then report ratios of flows: here
    flows are as they are unless ``normalize``. With a causal mask early tokens collect relevance
    in every layer, as there is nothing else that the first rows can see. A NaN in the maps makes a
    rollout NaN wherever it takes part. The flow costs T^2 maximum flows on (L + 1) T nodes, in
    Python: it is meant for tens of tokens, and for NumPy arrays only.

    Source
    ------
    explain/attention_flow in the catalog; section 3 of the paper and the authors' files; grade A.

    References
    ----------
    Abnar and Zuidema 2020, Quantifying Attention Flow in Transformers.

    Examples
    --------
    Token 1 reads token 0 below, token 0 reads token 1 above:

    >>> import numpy as np
    >>> below, above = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[0.0, 1.0], [0.0, 1.0]])
    >>> maps = np.stack([below, above])[:, None]
    >>> attention_flow_score(maps).tolist()
    [[0.75, 0.25], [0.5, 0.5]]
    >>> attention_flow_score(maps, method="flow").tolist()
    [[1.0, 0.5], [0.5, 0.5]]
    """
    core.check.shapes(maps=(maps, "... H T T"))
    if len(maps.shape) < 4 or 0 in (maps.shape[0], *maps.shape[-3:]):
        raise core.errors.ShapeError(
            f"maps has shape {tuple(maps.shape)}, expected (L, ..., H, T, T) with at least one "
            "layer, head and token; hint: np.stack(maps) and [:, None] for a single head"
        )
    core.check.option("method", method, METHODS)
    core.check.number("residual", residual, low=0, high=1)

    layers = mixing(maps, residual)  # (1)
    if method == "rollout":
        out = rollout(layers)  # (2)
    else:
        _capacities(maps)
        out = flow(layers)  # (3)

    if normalize:
        total = np.sum(out, axis=-1, keepdims=True)
        out = out / np.where(total <= 0, 1.0, total)
    return out


def _capacities(maps):
    """Refuse what no network can carry."""
    if not isinstance(maps, np.ndarray):
        raise core.errors.DTypeError(
            f"maps is a {type(maps).__name__}, expected a NumPy array for method='flow'; "
            "hint: method='rollout' runs on arrays of other libraries"
        )
    if not np.all(np.isfinite(maps) & (maps >= 0)):
        raise core.errors.ParameterError(
            "maps holds NaN, infinity or a negative number, expected capacities >= 0 for "
            "method='flow'"
        )


def _maps(rng, *shape):
    """Random rows that sum to 1, and two entries that are exactly 0."""
    z = np.exp(1.5 * rng.standard_normal(shape))
    z[..., 0, -1] = 0.0
    return z / np.sum(z, axis=-1, keepdims=True)


def _example(rng):
    """Both methods, with and without batch axes, causal maps, several residual weights."""
    causal = np.tril(_maps(rng, 3, 2, 4, 4))
    return {
        "plain": {"maps": _maps(rng, 3, 2, 4, 4)},
        "flow": {"maps": _maps(rng, 3, 2, 4, 4), "method": "flow"},
        "batch": {"maps": _maps(rng, 2, 3, 2, 5, 5), "residual": 0.3},
        "flow-batch": {"maps": _maps(rng, 2, 2, 3, 4, 4), "method": "flow", "residual": 0.25},
        "one-layer": {"maps": _maps(rng, 1, 2, 6, 6), "residual": 0.1},
        "flow-one-layer": {"maps": _maps(rng, 1, 3, 5, 5), "method": "flow"},
        "no-residual": {"maps": _maps(rng, 4, 1, 3, 3), "residual": 0.0},
        "flow-no-residual": {"maps": _maps(rng, 3, 1, 3, 3), "residual": 0.0, "method": "flow"},
        "causal": {"maps": causal},
        "flow-causal": {"maps": causal, "method": "flow", "normalize": True},
        "flow-heads": {"maps": _maps(rng, 2, 4, 5, 5), "method": "flow", "normalize": True},
    }


SPEC = core.Analysis(
    key="explain/attention_flow",
    score=attention_flow_score,
    example=_example,
    flags=frozenset({"no_foreign"}),  # the flow; the row's tests run the rollout on them
    claim=(
        "Rollout and flow rank input tokens more like their importance by blanking out than the "
        "attention of the last layer does."
    ),
    verified_by=("slow loop", "NetworkX"),
)
