"""Attention rollout and flow: slow loops by paths and cuts, hand example, planted truth, bounds."""

import math

import networkx
import numpy as np
import pytest

import attention_ref
from attention_ref import core, engine
from attention_ref.kit.checks import cases
from attention_ref.methods.explain.attention_flow import (
    attention_flow_score,
    maximum_flow,
    mixing,
    network,
)

SPEC = attention_ref.get("explain/attention_flow")
EQUIVALENT = {
    "mixing: token = np.arange(maps.shape[-1], like=maps)  ->  "
    "token = -np.arange(maps.shape[-1], like=maps)": "only compared with itself",
    "mixing: -1  ->  -2": "the maps are square",
    "mixing: 1.0  ->  2.0 (2)": "divides a row of zeros",
    "network: capacity = np.zeros_like(layers, shape=((L + 1) * T, (L + 1) * T))  ->  "
    "capacity = -np.zeros_like(layers, shape=((L + 1) * T, (L + 1) * T))": "-0 is 0",
    "_shortest_path: -1  ->  -2": "any negative number says: not seen",
    "attention_flow_score: 1.0  ->  2.0": "divides a row of zeros",
}
"""Mutants of the method that compute the same, and why."""


def slow_layers(maps, place, residual):
    """One batch member: layers as nested lists of numbers."""
    L, H, T = maps.shape[0], maps.shape[-3], maps.shape[-1]
    layers = []
    for l in range(L):
        rows = []
        for i in range(T):
            row = []
            for j in range(T):
                mean = math.fsum(float(maps[(l, *place)][h, i, j]) for h in range(H)) / H
                row.append((1.0 - residual) * mean + (residual if i == j else 0.0))
            total = math.fsum(row)
            rows.append([x / total if total else 0.0 for x in row])
        layers.append(rows)
    return layers


def slow_paths(layers, level, i, j):
    """Sum over all paths from (level, i) down to (0, j) of the product of their arcs."""
    if level == 0:
        return 1.0 if i == j else 0.0
    row = layers[level - 1][i]
    return math.fsum(row[b] * slow_paths(layers, level - 1, b, j) for b in range(len(row)))


def slow_cut(layers, i, j):
    """The smallest cut between (L, i) and (0, j): every subset of the nodes between is tried."""
    L, T = len(layers), len(layers[0])
    best = math.inf
    for subset in range(2 ** ((L - 1) * T)):
        side = [[b == j for b in range(T)]]  # False: with the source, True: with the sink
        side[0] = [True if b == j else None for b in range(T)]  # None: leads nowhere, cuts nothing
        for l in range(1, L):
            side.append([bool(subset >> ((l - 1) * T + b) & 1) for b in range(T)])
        side.append([False if a == i else None for a in range(T)])
        cut = 0.0
        for l in range(1, L + 1):
            for a in range(T):
                for b in range(T):
                    if side[l][a] is False and side[l - 1][b] is True:
                        cut += layers[l - 1][a][b]
        best = min(best, cut)
    return best


def slow_attention_flow(maps, method="rollout", residual=0.5, normalize=False):
    """Rollout as a sum over paths, flow as a minimum over cuts."""
    T = maps.shape[-1]
    out = np.zeros((*maps.shape[1:-3], T, T))
    for place in np.ndindex(*maps.shape[1:-3]):
        layers = slow_layers(maps, place, residual)
        for i in range(T):
            row = []
            for j in range(T):
                if method == "rollout":
                    row.append(slow_paths(layers, len(layers), i, j))
                else:
                    row.append(slow_cut(layers, i, j))
            total = math.fsum(row) if normalize else 1.0
            for j in range(T):
                out[(*place, i, j)] = row[j] / total if total else 0.0
    return out


def drawn(seed, *shape):
    """Random maps whose rows sum to 1."""
    return np.random.default_rng(seed).dirichlet(np.full(shape[-1], 0.6), size=shape[:-1])


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    found = attention_flow_score(**kwargs)
    np.testing.assert_allclose(found, slow_attention_flow(**kwargs), rtol=0, atol=2e-15)


# Two heads, two layers, three tokens; r = 1/2. The means of the heads are
#   below (1, 0, 0), (1/2, 1/2, 0), (0, 1/2, 1/2)   above (0, 0, 1), (0, 1, 0), (0, 0, 1)
#   A_1 = (1, 0, 0), (1/4, 3/4, 0), (0, 1/4, 3/4)   A_2 = (1/2, 0, 1/2), (0, 1, 0), (0, 0, 1)
BELOW = [[[1, 0, 0], [1, 0, 0], [0, 1, 0]], [[1, 0, 0], [0, 1, 0], [0, 0, 1]]]
ABOVE = [[[0, 0, 1], [0, 1, 0], [0, 0, 1]], [[0, 0, 1], [0, 1, 0], [0, 0, 1]]]
EXAMPLE = np.array([BELOW, ABOVE], dtype=float)


def test_worked_example():
    np.testing.assert_array_equal(
        mixing(EXAMPLE),
        [[[1, 0, 0], [0.25, 0.75, 0], [0, 0.25, 0.75]], [[0.5, 0, 0.5], [0, 1, 0], [0, 0, 1]]],
    )
    rollout = attention_flow_score(EXAMPLE)
    np.testing.assert_array_equal(rollout, [[0.5, 0.125, 0.375], [0.25, 0.75, 0], [0, 0.25, 0.75]])
    flow = attention_flow_score(EXAMPLE, method="flow")  # 0 -> 2 -> 1: the narrower arc is 1/4
    np.testing.assert_array_equal(flow, [[0.5, 0.25, 0.5], [0.25, 0.75, 0], [0, 0.25, 0.75]])
    shares = attention_flow_score(EXAMPLE, method="flow", normalize=True)
    np.testing.assert_array_equal(shares[0], [0.4, 0.2, 0.4])


def test_residual_weights_by_hand():
    """r = 1/5: mean (0, 1) becomes (1/5, 4/5); a row without keys becomes the token itself."""
    maps = np.array([[[[0.0, 1.0], [0.0, 0.0]]]])
    np.testing.assert_allclose(
        attention_flow_score(maps, residual=0.2), [[0.2, 0.8], [0, 1]], rtol=1e-15
    )
    np.testing.assert_array_equal(attention_flow_score(maps, residual=0.0), [[0, 1], [0, 0]])
    np.testing.assert_array_equal(attention_flow_score(maps, residual=1), np.eye(2))
    for method in ("rollout", "flow"):
        none = attention_flow_score(0 * maps, method=method, residual=0, normalize=True)
        np.testing.assert_array_equal(none, np.zeros((2, 2)))


def test_what_reads_an_empty_row_is_lost_unless_normalized():
    """Token 0 reads itself and token 1, half each; token 1 had read nothing."""
    maps = np.array([[[[1.0, 0.0], [0.0, 0.0]]], [[[0.5, 0.5], [0.0, 1.0]]]])
    for method in ("rollout", "flow"):
        kwargs = {"method": method, "residual": 0.0}
        np.testing.assert_array_equal(attention_flow_score(maps, **kwargs), [[0.5, 0], [0, 0]])
        shares = attention_flow_score(maps, **kwargs, normalize=True)
        np.testing.assert_array_equal(shares, [[1, 0], [0, 0]])


def test_flow_takes_back_what_an_earlier_path_used():
    """The path 0-1-2-5 is taken first and must be undone in part: without that the flow is 1."""
    capacity = np.zeros((6, 6))
    for a, b in ((0, 1), (1, 2), (2, 5), (0, 3), (3, 2), (1, 4), (4, 5)):
        capacity[a, b] = 1.0
    capacity[1, 2] = 3.0
    assert maximum_flow(capacity, 0, 5) == 2.0
    assert maximum_flow(capacity, 5, 0) == 0.0
    np.testing.assert_array_equal(capacity[1, 2], 3.0)


@pytest.mark.parametrize("seed", range(4))
def test_networkx_agrees(seed):
    maps = drawn(seed, 3, 2, 5, 5)
    maps[maps < 0.1] = 0.0
    found = attention_flow_score(maps, method="flow", residual=0.2)
    graph = networkx.DiGraph()
    layers = mixing(maps, 0.2)
    for layer, a, b in np.ndindex(3, 5, 5):
        graph.add_edge((layer + 1, a), (layer, b), capacity=layers[layer, a, b])
    for i, j in np.ndindex(5, 5):
        theirs = networkx.maximum_flow_value(graph, (3, i), (0, j))
        assert math.isclose(found[i, j], theirs, abs_tol=1e-15)


@pytest.mark.parametrize("seed", range(4))
def test_networkx_agrees_on_any_graph(seed):
    """Not only layered ones: arcs both ways and cycles."""
    rng = np.random.default_rng(seed)
    capacity = rng.random((8, 8)) * (rng.random((8, 8)) < 0.4) * (1 - np.eye(8))
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(8))
    for a, b in np.argwhere(capacity):
        graph.add_edge(int(a), int(b), capacity=capacity[a, b])
    for sink in range(1, 8):
        theirs = networkx.maximum_flow_value(graph, 0, sink)
        assert math.isclose(maximum_flow(capacity, 0, sink), theirs, abs_tol=1e-14)


def test_network_by_hand():
    layers = np.array([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
    want = np.zeros((6, 6))
    want[2:4, 0:2], want[4:6, 2:4] = layers
    np.testing.assert_array_equal(network(layers), want)


def test_planted_permutations_are_found():
    """Each layer copies along a permutation: the composed one, newest last, comes out."""
    rng = np.random.default_rng(1)
    orders = [rng.permutation(6) for _ in range(3)]
    maps = np.stack([np.eye(6)[order] for order in orders])[:, None]
    origin = orders[0][orders[1][orders[2]]]  # token i reads orders[2][i] above, and so on down
    for method in ("rollout", "flow"):
        found = attention_flow_score(maps, method=method, residual=0.0)
        np.testing.assert_array_equal(found, np.eye(6)[origin])
    assert not np.array_equal(origin, orders[2][orders[1][orders[0]]])


def test_planted_route_is_found_where_the_last_layer_points_elsewhere():
    """Token 5 reads 3, which had read 1: both measures name 1, the last layer's map names 3."""
    maps = np.full((2, 1, 6, 6), 1 / 6)
    maps[0, 0, 3] = np.eye(6)[1]
    maps[1, 0, 5] = np.eye(6)[3]
    for method in ("rollout", "flow"):
        found = attention_flow_score(maps, method=method, residual=0.1)[5]
        others = [j for j in range(6) if j != 1]
        assert np.all(found[1] > 2 * found[others])
    assert maps[1, 0, 5, 1] == 0.0


@pytest.mark.parametrize("method", ["rollout", "flow"])
def test_one_layer_is_that_layer(method):
    maps = drawn(2, 1, 3, 5, 5)
    found = attention_flow_score(maps, method=method, residual=0.25)
    np.testing.assert_allclose(found, 0.75 * maps[0].mean(0) + 0.25 * np.eye(5), atol=1e-15)


@pytest.mark.parametrize("method", ["rollout", "flow"])
def test_identity_layers_change_nothing(method):
    maps = np.broadcast_to(np.eye(4), (3, 2, 4, 4))
    np.testing.assert_array_equal(attention_flow_score(maps, method=method), np.eye(4))


@pytest.mark.parametrize("L", [1, 2, 5, 40])
def test_uniform_layers_forget_the_position_at_a_geometric_rate(L):
    """A = r I + (1 - r) U with U U = U: the product is r^L I + (1 - r^L) U."""
    maps = np.full((L, 1, 5, 5), 1 / 5)
    want = 0.3**L * np.eye(5) + (1 - 0.3**L) / 5
    np.testing.assert_allclose(attention_flow_score(maps, residual=0.3), want, rtol=0, atol=1e-14)


def test_bounds_of_the_flow():
    maps = drawn(3, 3, 1, 6, 6)
    rollout = attention_flow_score(maps)
    flow = attention_flow_score(maps, method="flow")
    np.testing.assert_allclose(rollout.sum(-1), 1.0, rtol=0, atol=1e-15)
    assert np.all(flow >= rollout - 1e-15) and np.any(flow > 1.2 * rollout)
    into = mixing(maps)[0].sum(-2)
    assert np.all(flow <= np.minimum(1.0, into) + 1e-15)
    assert np.any(flow == np.float64(1.0)) or np.any(np.isclose(flow, into))


@pytest.mark.parametrize("method", ["rollout", "flow"])
def test_tokens_heads_and_batches_may_be_permuted(method):
    maps = drawn(4, 3, 2, 4, 5, 5)
    base = attention_flow_score(maps, method=method)
    order = np.random.default_rng(0).permutation(5)
    moved = attention_flow_score(maps[..., order, :][..., order], method=method)
    np.testing.assert_allclose(moved, base[..., order, :][..., order], rtol=0, atol=1e-15)
    heads = attention_flow_score(maps[:, :, ::-1], method=method)
    np.testing.assert_allclose(heads, base, rtol=0, atol=1e-15)
    single = attention_flow_score(maps[:, 1], method=method)
    np.testing.assert_allclose(single, base[1], rtol=0, atol=1e-15)
    layers = attention_flow_score(maps[::-1], method=method)
    assert np.max(np.abs(layers - base)) > 0.01


@pytest.mark.parametrize("method", ["rollout", "flow"])
def test_nothing_comes_from_the_future(method):
    maps = np.tril(drawn(5, 3, 2, 6, 6))
    maps /= maps.sum(-1, keepdims=True)
    found = attention_flow_score(maps, method=method)
    assert not np.any(np.triu(found, 1))
    np.testing.assert_array_equal(found[0], np.eye(6)[0])


def test_early_tokens_collect_relevance_under_a_causal_mask():
    maps = np.tril(np.ones((6, 1, 8, 8)))
    maps /= maps.sum(-1, keepdims=True)
    last = attention_flow_score(maps)[-1]
    assert np.all(np.diff(last[:-1]) < 0) and last[0] > 0.5


def test_rollout_runs_on_foreign_and_single_precision_arrays():
    maps = drawn(6, 3, 2, 4, 4)
    found = attention_flow_score(engine.Foreign(maps), normalize=True)
    np.testing.assert_array_equal(engine.value(found), attention_flow_score(maps, normalize=True))
    for method in ("rollout", "flow"):
        single = attention_flow_score(maps.astype(np.float32), method=method)
        assert single.dtype == np.float32
        double = attention_flow_score(maps, method=method)
        np.testing.assert_allclose(single, double, rtol=0, atol=1e-6)


def test_nan_reaches_what_it_takes_part_in():
    maps = np.tril(drawn(7, 2, 1, 4, 4))
    maps[0, 0, 3, 0] = np.nan
    found = attention_flow_score(maps)
    assert np.all(np.isnan(found[3]))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"maps": np.ones((2, 3, 3))}, core.errors.ShapeError, "at least one layer"),
        ({"maps": np.ones((2, 1, 3, 4))}, core.errors.ShapeError, "maps has T = 4"),
        ({"maps": np.ones((0, 1, 3, 3))}, core.errors.ShapeError, "at least one layer"),
        ({"maps": np.ones((2, 0, 3, 3))}, core.errors.ShapeError, "at least one layer"),
        ({"maps": np.ones((2, 1, 0, 0))}, core.errors.ShapeError, "at least one layer"),
        ({"method": "rolout"}, core.errors.ParameterError, "did you mean 'rollout'"),
        ({"residual": 1.1}, core.errors.ParameterError, "residual is 1.1, expected"),
        ({"residual": -0.1}, core.errors.ParameterError, "residual is -0.1, expected"),
        (
            {"maps": np.full((1, 1, 2, 2), -0.1), "method": "flow"},
            core.errors.ParameterError,
            "maps holds NaN, infinity or a negative",
        ),
        (
            {"maps": np.full((1, 1, 2, 2), np.nan), "method": "flow"},
            core.errors.ParameterError,
            "maps holds NaN",
        ),
        (
            {"maps": engine.Foreign(np.ones((1, 1, 2, 2))), "method": "flow"},
            core.errors.DTypeError,
            "maps is a Foreign, expected a NumPy array",
        ),
    ],
)
def test_errors_name_argument_and_expectation(change, error, says):
    with pytest.raises(error, match=says):
        attention_flow_score(**({"maps": np.ones((2, 1, 3, 3))} | change))
