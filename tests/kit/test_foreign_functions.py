"""``kit.check`` on functions as people write them: odd signatures, returns, manners, precision."""

import functools
import json
import math
import shlex
import sys
import types
import warnings

import numpy as np
import pytest

import attention_ref
from attention_ref import cli, kit
from attention_ref.core.errors import ParameterError
from attention_ref.kit import golden, inputs, properties, zoo
from attention_ref.kit.adapters import framework_of, signature_of


def softmax(z):
    with np.errstate(invalid="ignore"):
        e = np.exp(z - np.max(z, -1, keepdims=True))
        return e / np.sum(e, -1, keepdims=True)


def attend(q, k, v, scale=None, causal=False, shift=None):
    """Right, unless ``shift`` moves the causal diagonal."""
    z = q @ np.swapaxes(k, -1, -2) * q.dtype.type(scale or q.shape[-1] ** -0.5)
    if causal:
        corner = k.shape[-2] - q.shape[-2] if shift is None else shift
        z = np.where(np.tri(*z.shape[-2:], corner, dtype=bool), z, z.dtype.type(-np.inf))
    return np.nan_to_num(softmax(z)) @ v


def verdicts(report):
    return {p.what: p.verdict for p in report.properties}


def says(report, name):
    return next(p.says for p in report.properties if p.what == name)


# ------------------------------------------------------------------------------ signatures


@pytest.mark.parametrize(
    "fn",
    [
        lambda a, b, c: attend(a, b, c),
        lambda *arrays: attend(*arrays),
        lambda q, k, v, /: attend(q, k, v),
        lambda Q, K, V, sm_scale=None: attend(Q, K, V, sm_scale),
        lambda xq, xk, xv, **options: attend(xq, xk, xv, options.get("scale")),
        functools.partial(attend, causal=False),
        lambda q, k, v, scale=None: {"out": attend(q, k, v, scale), "steps": 3},
        lambda q, k, v, scale=None: [attend(q, k, v, scale), None],
        lambda q, k, v, scale=None: attend(q, k, v, scale).tolist(),
    ],
    ids=["abc", "star", "positional", "QKV", "kwargs", "partial", "dict", "list", "lists"],
)
def test_a_right_function_in_many_guises(fn):
    report = kit.check(fn, dtypes=("float64",), cases=["square", "long-queries", "odd-17"])
    assert report.ok and sum(x.verdict == "ok" for x in report) == 3, report


def test_without_a_scale_argument_the_default_is_compared():
    report = kit.check(lambda q, k, v: attend(q, k, v))
    assert report.ok and "1/sqrt(D)" in says(report, "scale argument")
    report = kit.check(lambda q, k, v: attend(q, k, v, scale=1.0), dtypes=("float64",))
    assert "matches with scale 1" in report.named


def test_one_head_or_one_sequence_at_a_time():
    def one_head(q, k, v):
        return softmax(q @ k.T * q.dtype.type(q.shape[1] ** -0.5)) @ v

    assert kit.check(one_head, layout="TD").ok
    report = kit.check(one_head)
    assert not report.ok and report.named == ["right with layout='TD': pass it"]
    assert kit.check(attend, layout="HTD", dtypes=("float64",)).ok

    def back(dout, cache):
        q, k, v, p, c = cache
        dz = p * (dout @ v.T - np.sum(dout * (p @ v), -1, keepdims=True)) * c
        return dz @ k, dz.T @ q, p.T @ dout

    def forth(q, k, v):
        c = q.dtype.type(q.shape[1] ** -0.5)
        p = softmax(q @ k.T * c)
        return p @ v, (q, k, v, p, c)

    report = kit.check(forth, backward=back, layout="TD")
    assert report.ok and any(x.what == "dv" for x in report)


# ------------------------------------------------------------------------------ returns, manners


@pytest.mark.parametrize(
    ("fn", "verdict", "said"),
    [
        (lambda q, k, v: None, "WRONG", "it returned NoneType, expected an array"),
        (lambda q, k, v: "text", "WRONG", "expected real numbers"),
        (lambda q, k, v: 1j * attend(q, k, v), "WRONG", "it returned complex128"),
        (lambda q, k, v: np.float64(1.0), "WRONG", "output has shape ()"),
        (lambda q, k, v: np.array([None]), "WRONG", "it returned object"),
        (lambda q, k, v: (x for x in q), "WRONG", "it returned generator"),
        (lambda q, k, v: 0 * attend(q, k, v), "WRONG", "output is zero throughout"),
        (lambda q, k, v: (softmax(q), attend(q, k, v)), "WRONG", "item 1 of what it returns"),
        (lambda q, k, v: [][1], "WRONG", "it raised IndexError"),
        (lambda q, k, v: attend(q, k, v)[0], "WRONG", "the batch axis of length 1 is gone"),
        (lambda q, k, v: attend(q, k, v)[..., :2], "WRONG", "output has shape"),
        (lambda q, k, v: np.swapaxes(attend(q, k, v), 1, 2), "WRONG", "heads come after the tok"),
        (lambda q, k, v: attend(q, k, v) + 1e-9, "WRONG", "adds an epsilon"),
        (lambda q, k, v: attend(q, k, v) * (1 + 1e-6 * q), "WRONG", "adds an epsilon"),
        (lambda q, k, v: np.nan * attend(q, k, v), "WRONG", "has NaN"),
        (lambda q, k, v: 3 * attend(q, k, v), "WRONG", "output is 3 times the right one"),
        (lambda q, k, v: attend(q, k, v)[..., ::-1, :], "WRONG", "queries in reverse order"),
        (lambda q, k, v: attend(q, k, v)[:, ::-1], "WRONG", "heads in reverse order"),
    ],
    ids=["none", "text", "complex", "number", "object", "generator", "zero", "second", "crash",
         "batch", "shape", "axes", "epsilon", "noise", "nan", "factor", "queries",
         "heads"],
)
def test_wrong_in_its_own_way(fn, verdict, said):
    report = kit.check(fn, dtypes=("float64",), cases=["square"])
    assert report[0].verdict == verdict and said in report.named[0], report
    assert not kit.check(fn, dtypes=("float64",)).ok  # nothing that comes back stops the check


def test_a_refusal_is_not_a_mistake():
    def picky(q, k, v, scale=None, causal=False):
        if q.dtype != np.float32:
            raise TypeError("float32 only")
        if q.shape[-1] % 4:
            raise NotImplementedError("D must be a multiple of 4")
        return attend(q, k, v, scale, causal)

    report = kit.check(picky)
    assert report.ok and {x.case for x in report.unsupported if x.dtype == "float32"} == {
        "odd", "odd-17", "one-by-one"
    }  # fmt: skip
    assert verdicts(report)["determinism"] == "ok"  # tried in the dtype that it takes
    assert "not supported" in str(report)


def test_writing_into_an_input_is_seen():
    def careless(q, k, v):
        q *= 0.5
        return attend(q, k, v, scale=2.0 * q.shape[-1] ** -0.5)

    report = kit.check(careless, dtypes=("float64",))
    assert not report.ok and says(report, "inputs unchanged") == "it writes into q"
    assert verdicts(report)["read-only input"] == "not supported"


def test_randomness_is_said_first():
    rng = np.random.default_rng(0)
    report = kit.check(lambda q, k, v: attend(q, k, v) + rng.random(), dtypes=("float64",))
    assert report.named[0].startswith("not deterministic: two calls differ")


def test_a_batch_that_is_mixed_and_strides_that_are_ignored():
    def mixed(q, k, v):
        out = attend(q, k, v)
        return out if len(out) == 1 else out[::-1]

    def raw(q, k, v):  # as a kernel that takes a pointer
        q = np.lib.stride_tricks.as_strided(q, q.shape, attend(q, k, q).strides)
        return attend(q, k, v)

    report = kit.check(mixed, dtypes=("float64",))
    assert verdicts(report)["batch independence"] == "WRONG"
    assert verdicts(kit.check(raw, dtypes=("float64",)))["non-contiguous input"] == "WRONG"


def test_what_comes_back_in_another_dtype():
    narrow = kit.check(lambda q, k, v: attend(q, k, v).astype(np.float32))
    assert not narrow.ok and "float32 comes back for float64" in says(narrow, "dtype kept")
    wide = kit.check(lambda q, k, v: attend(q, k, v).astype(np.float64))
    assert wide.ok and "float64 comes back" in says(wide, "dtype kept")


def test_a_missing_gradient_is_named_and_a_swapped_one():
    spec = attention_ref.get("normalizers/sparsemax")
    for change, named in (
        (lambda g: {n: x for n, x in g.items() if n != "k"}, "dk is missing"),
        (lambda g: g | {"q": 0 * g["q"]}, "dq is zero throughout"),
        (lambda g: g | {"k": -g["k"]}, "dk is -1 times the right one"),
        (lambda g: g | {"v": np.nan * g["v"]}, "dv has NaN"),
        (lambda g: g | {"v": g["v"][:1, :1]}, "dv has shape"),
    ):
        backward = lambda dout, cache, change=change: change(spec.backward(dout, cache))
        report = kit.check(spec.forward, spec.key, backward=backward, dtypes=("float64",),
                           cases=["plain", "batch"])  # fmt: skip
        assert any(named in s for s in report.named), report.named
    broken = kit.check(spec.forward, spec.key, backward=lambda dout, cache: 1 / 0,
                       dtypes=("float64",))  # fmt: skip
    assert broken.ok and verdicts(broken)["gradients"] == "not supported"


def test_masks_of_other_conventions():
    def blocked(q, k, v, attn_mask=None):
        live = True if attn_mask is None else ~attn_mask
        z = np.where(live, q @ np.swapaxes(k, -1, -2) * q.dtype.type(q.shape[-1] ** -0.5), -np.inf)
        return np.nan_to_num(softmax(z.astype(q.dtype))) @ v

    report = kit.check(blocked)
    assert "True = is blocked" in says(report, "mask polarity")
    assert kit.check(blocked, conventions={"mask": "blocked"}).ok


def test_two_mistakes_at_once():
    def twice(q, k, v, causal=False, scale=None):
        return attend(q, k, v, 1.0, causal, shift=0)

    report = kit.check(twice, cases=["causal"], dtypes=("float64",))
    assert any("align='upper_left'" in s and "scale 1" in s for s in report.named), report.named


def test_a_policy_step_by_step():
    select = attention_ref.get("cache/streaming_sinks").select
    key = "cache/streaming_sinks"
    assert kit.check(select, key).ok
    report = kit.check(lambda length, sinks, window: select(
        length, sinks=sinks, window=max(window - 1, 1)), key, cases=["plain"])  # fmt: skip
    assert report.named == [
        "first differs at step 8: keeps [] and not [4]; 8 tokens are kept, the budget gives 9"
    ]

    def newest_first(length, sinks, window):
        kept = select(length, sinks=sinks, window=window)
        return np.where(kept == length[..., None] - 1, kept - 1, kept)

    report = kit.check(newest_first, key, cases=["plain"])
    assert report.named[0].startswith("first differs at step 0: keeps"), report.named
    lists = kit.check(lambda length, sinks, window: [
        {i for i in row if i >= 0} for row in select(length, sinks=sinks, window=window).tolist()
    ], key, cases=["plain"])  # fmt: skip
    assert lists.ok, lists
    other = kit.check(lambda length, sinks, window: select(
        length, sinks=sinks, window=window)[..., ::-1], key)  # fmt: skip
    assert other.ok and "the same tokens in another order" in {x.says for x in other}


def test_a_second_output_is_compared_too():
    def delta(q, k, v, beta, g=None, initial_state=None, scale=None, turned=False):
        out, state = zoo.delta(q, k, v, beta, g, initial_state, scale=scale)
        return out, state * (1.001 if turned else 1.0)

    key = "recurrent/delta_rule"
    report = kit.check(delta, key, dtypes=("float64",))
    assert report.ok and {x.what for x in report if x.case != "-"} == {"out", "state"}
    report = kit.check(functools.partial(delta, turned=True), key, dtypes=("float64",))
    assert {x.what for x in report.wrong} == {"state"}
    assert report.named == ["state is 1.001 times the right one"]


def test_a_log_sum_exp_of_grouped_heads():
    key = "heads/multi_query"
    assert any(x.what == "lse" for x in kit.check(zoo.logsumexp, key, dtypes=("float64",)))
    wrong = functools.partial(zoo.logsumexp, bug="log-sum-exp in base 2")
    report = kit.check(wrong, key, dtypes=("float64",))
    assert report.named == [zoo.LSE["log-sum-exp in base 2"]], report.named


# ------------------------------------------------------------------------------ who sees whom


def test_who_sees_whom_is_measured():
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 1, 4, 3))
    found = properties.sees(lambda x: attend(x["q"], x["k"], x["v"], causal=True),
                            {"q": q, "k": k, "v": v}, 2.0**-52)  # fmt: skip
    np.testing.assert_array_equal(found[0, 0], np.tri(4, dtype=bool))
    report = kit.check(functools.partial(attend, shift=1), dtypes=("float64",))
    assert says(report, "causality").startswith("query 0 sees key 1, which is hidden")
    assert says(report, "causal alignment") == "neither corner, T=5, S=7; expected lower_right"


def test_grouped_heads_are_measured():
    def tiled(q, k, v, scale=None):
        times = q.shape[1] // k.shape[1]
        return attend(q, np.tile(k, (1, times, 1, 1)), np.tile(v, (1, times, 1, 1)), scale)

    report = kit.check(tiled, "heads/multi_query", dtypes=("float64",))
    assert says(report, "grouped heads").startswith("tiled: head h reads key head h % G")
    right = kit.check(lambda q, k, v, scale=None: attend(
        q, *(np.repeat(x, q.shape[1] // k.shape[1], 1) for x in (k, v)), scale),
        "heads/multi_query", dtypes=("float64",))  # fmt: skip
    assert right.ok and says(right, "grouped heads").startswith("interleaved")


# ------------------------------------------------------------------------------ repeating


def test_the_smallest_case_and_both_forms_of_the_command(monkeypatch, capsys):
    wrong = functools.partial(attend, shift=0)
    report = kit.check(wrong, dtypes=("float64",))
    small = report.smallest
    assert small["sizes"] == "B=1,H=1,T=1,S=2,D=1,E=1" and small["got"] != small["expected"]
    again = eval(small["repeat"], {"kit": kit, "fn": wrong})  # our own text
    assert not again.ok and len(again) == 1
    assert again.smallest["got"] == small["got"]

    module = types.ModuleType("somebodys_kernel")

    def kernel(q, k, v, scale=None, causal=False):
        return attend(q, k, v, scale, causal, shift=0)

    kernel.__module__, kernel.__qualname__ = module.__name__, "kernel"
    module.kernel = kernel
    monkeypatch.setitem(sys.modules, module.__name__, module)
    command = kit.check(kernel, dtypes=("float64",)).smallest["repeat"]
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "attention_ref"] and "T=1,S=2" in command
    assert cli.main(words[3:]) == 1
    assert f"got {small['got']:.6g}" in capsys.readouterr().out


def test_sizes_and_conventions_are_checked():
    for bad in ({"sizes": {"T": 0}, "cases": ["square"]}, {"sizes": {"Z": 1}, "cases": ["square"]},
                {"conventions": {"allign": "upper_left"}}, {"conventions": {"align": "up"}},
                {"dtypes": ("float8",)}):  # fmt: skip
        with pytest.raises(ParameterError):
            kit.check(attend, **bad)
    report = kit.check(attend, sizes={"T": 2, "S": 3, "D": 2}, cases=["square"])
    assert report.ok
    mine = {"mine": {n: np.random.default_rng(0).standard_normal((1, 1, 70, 8)) for n in "qkv"}}
    assert kit.check(attend, extra=mine, cases=["mine"]).ok


def test_a_warning_of_theirs_is_no_verdict():
    def loud(q, k, v, causal=False):
        z = q @ np.swapaxes(k, -1, -2) * q.dtype.type(q.shape[-1] ** -0.5)
        live = np.tri(*z.shape[-2:], z.shape[-1] - z.shape[-2], dtype=bool) if causal else True
        z = np.where(live, z, z.dtype.type(-np.inf))
        e = np.exp(z - np.max(z, -1, keepdims=True))  # -inf - -inf in an empty row
        return np.nan_to_num(e / np.sum(e, -1, keepdims=True)) @ v

    assert kit.check(loud).ok


def test_the_command_line_takes_conventions(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(golden.checkout() / "tests" / "kit")
    target = "test_foreign_functions:attend"
    assert cli.main(["check", target, "--case", "square", "--dtype", "float32", "--mask",
                     "blocked", "--empty-row", "zero", "--sizes", "T=2,S=2"]) == 0  # fmt: skip
    assert "float64" not in capsys.readouterr().out
    names = json.dumps({n: n for n in ("q", "k", "v", "scale")})
    assert cli.main(["check", target, "--case", "square", "--names", names,
                     "--fixed", '{"shift": 0}', "--json"]) == 0  # fmt: skip
    assert json.loads(capsys.readouterr().out)["ok"] is True
    (tmp_path / "explodes.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    for bad in (["explodes:f"], [target, "--names", "q"], [target, "--fixed", "[1]"]):
        assert cli.main(["check", *bad]) == 2
    assert cli.main(["check", target, "--sizes", "T"]) == 2
    assert cli.main(["check", target, "--mask", "blokked"]) == 2
    assert "did you mean 'blocked'" in capsys.readouterr().err


def in_blocks(q, k, v, scale=None, causal=False, block=32):
    """Wrong from the second block of keys on: every block keeps its own maximum."""
    z = q @ np.swapaxes(k, -1, -2) * q.dtype.type(scale or q.shape[-1] ** -0.5)
    if causal:
        z = np.where(np.tri(*z.shape[-2:], z.shape[-1] - z.shape[-2], dtype=bool), z, -np.inf)
    total = out = 0.0
    for s in range(0, z.shape[-1], block):
        part = z[..., s : s + block]
        top = np.max(part, -1, keepdims=True)
        e = np.exp(part - np.where(np.isfinite(top), top, 0.0))
        total, out = total + np.sum(e, -1, keepdims=True), out + e @ v[..., s : s + block, :]
    return (out / np.where(total == 0, 1, total)).astype(q.dtype)


def test_a_mistake_of_the_second_block_needs_larger_sizes():
    mine = functools.partial(in_blocks, block=32)
    assert kit.check(mine).ok
    wide = {"B": 2, "H": 2, "T": 40, "S": 70, "D": 16, "E": 8}
    cases = ["square", "causal", "huge"]
    report = kit.check(mine, sizes=wide, cases=cases, dtypes=("float32",))
    assert any("over blocks of 32" in s for s in report.named), report.named
    small = report.smallest["sizes"]  # narrower, another mistake of online softmax fits as well
    assert "S=64" in small and "T=1," in small and "D=16" not in small, small
    assert "'S': 64" in report.smallest["repeat"]
    again = eval(report.smallest["repeat"], {"kit": kit, "fn": mine})
    assert again.smallest["got"] == report.smallest["got"]
    assert kit.check(functools.partial(in_blocks, block=128), sizes=wide, cases=cases).ok


def test_longer_cases_begin_like_shorter_ones():
    for case in inputs.examples(attention_ref.get("heads/multi_query")).values():
        long = inputs.resize(case, {"T": 20, "S": 21, "D": 22})
        again = inputs.resize(long, {n: m for n, m in inputs.sizes(case).items() if n in "TSD"})
        direct = inputs.resize(case, {"T": 9, "S": 16, "D": 2})
        for name, a in case.items():
            if isinstance(a, np.ndarray):
                assert np.array_equal(again[name], a)
                if name == "k":
                    assert np.array_equal(direct[name], long[name][..., :16, :2])
    noise = inputs._noise((50, 40, 7))
    assert abs(np.mean(noise)) < 0.03 and abs(np.std(noise) - 1) < 0.03
    flat = noise.reshape(50, -1)
    assert np.max(np.abs(np.corrcoef(flat) - np.eye(50))) < 0.25


# ------------------------------------------------------------------------------ frameworks


@pytest.mark.oracle
def test_the_framework_is_guessed():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")

    class Module(torch.nn.Module):
        def forward(self, query, key, value):
            return torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, -1) @ value

    def by_global(q, k, v):
        return torch.softmax(q, -1)

    def by_method(q, k, v):
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v

    assert framework_of(Module()) == framework_of(by_global) == "torch"
    assert framework_of(attend) == "numpy"
    assert kit.check(Module(), cases=["square", "odd"]).ok
    report = kit.check(by_method, cases=["square", "odd"], device="cpu")
    assert report.ok and report.about["framework"] == "torch"
    assert any(x.what == "dq" for x in report)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls TorchScript deprecated
        traced = torch.jit.trace(by_global, (torch.ones(1, 1, 2, 2),) * 3, check_trace=False)
    assert list(signature_of(traced)) == ["q", "k", "v"] and framework_of(traced) == "torch"


@pytest.mark.oracle
def test_a_flash_kernel_conforms_in_every_dtype():
    """Online softmax in base 2 with the scale folded into q; returns (out, lse)."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")

    def flash(q, k, v, mask=None, causal=False, scale=None):
        T, S = q.shape[-2], k.shape[-2]
        q = q * ((scale or q.shape[-1] ** -0.5) * math.log2(math.e))
        live = torch.ones(T, S, dtype=torch.bool)
        live = live.tril(S - T) if causal else live
        live = live if mask is None else live & mask
        m = torch.full((*q.shape[:-1], 1), -torch.inf, dtype=q.dtype)
        total, out = torch.zeros_like(m), torch.zeros_like(q @ v[..., :1, :].mT) @ v[..., :1, :]
        for s in range(0, S, 2):
            z = (q @ k[..., s : s + 2, :].mT).masked_fill(~live[..., s : s + 2], -torch.inf)
            top = torch.maximum(m, z.amax(-1, keepdim=True))
            safe = torch.where(top == -torch.inf, 0.0, top)
            old, p = torch.exp2(m - safe), torch.exp2(z - safe)
            total, m = total * old + p.sum(-1, keepdim=True), top
            out = out * old + p @ v[..., s : s + 2, :]
        out = torch.where(total == 0, 0.0, out / torch.where(total == 0, 1.0, total))
        return out, (m + torch.log2(total))[..., 0] * math.log(2)

    some = ["square", "causal", "mask", "empty-row", "huge", "odd-17", "large"]
    report = kit.check(flash, dtypes=("float64", "float32", "float16", "bfloat16"), cases=some)
    assert report.ok, report
    assert {"out", "lse", "dq", "dk", "dv"} == {x.what for x in report}


@pytest.mark.oracle
def test_no_autograd_and_a_detached_key():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    sdpa = torch.nn.functional.scaled_dot_product_attention
    report = kit.check(lambda q, k, v: sdpa(q.detach(), k.detach(), v.detach()),
                       dtypes=("float32",))  # fmt: skip
    assert report.ok and verdicts(report)["gradients"] == "not supported"
    report = kit.check(lambda q, k, v: sdpa(q, k.detach(), v), dtypes=("float32",),
                       cases=["square"])  # fmt: skip
    assert report.named == ["dk is missing: no gradient came back"]


@pytest.mark.oracle
def test_jax_through_a_jitted_function_and_one_that_branches():
    jax = pytest.importorskip("jax", reason="JAX is not installed: make oracles")

    @jax.jit
    def jitted(q, k, v):
        return jax.nn.softmax(q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5, -1) @ v

    def branching(q, k, v):
        return jitted(q, k, v) if float(q[0, 0, 0, 0]) < 1e9 else q

    assert kit.check(jitted, cases=["square"], dtypes=("float32",)).ok
    report = kit.check(branching, cases=["square"], dtypes=("float32",), gradients=False)
    assert report.ok and report.about["framework"] == "jax"
