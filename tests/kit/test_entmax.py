"""The package entmax conforms to normalizers/entmax and normalizers/sparsemax, gradients too."""

import pytest

from attention_ref import kit

pytestmark = pytest.mark.oracle


def scores(q, k, scale):
    return q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)


def softcapped(q, k, scale, softcap, bias):
    import torch

    z = scores(q, k, scale)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return z if bias is None else z + bias


def test_sparsemax():
    entmax = pytest.importorskip("entmax", reason="entmax is not installed: make oracles")

    def attention(q, k, v, scale=None, softcap=None, bias=None):
        return entmax.sparsemax(softcapped(q, k, scale, softcap, bias), -1) @ v

    report = kit.check(attention, "normalizers/sparsemax", framework="torch")
    assert report.ok, report
    assert {"out", "dq", "dk", "dv", "dbias"} <= {x.what for x in report if x.verdict == "ok"}
    wrong = kit.check(lambda q, k, v, scale=None: entmax.entmax15(scores(q, k, scale), -1) @ v,
                      "normalizers/sparsemax", framework="torch", cases=["plain"])  # fmt: skip
    assert not wrong.ok


def test_entmax_bisect_and_the_gradient_of_alpha():
    entmax = pytest.importorskip("entmax", reason="entmax is not installed: make oracles")

    def attention(q, k, v, alpha=1.5, scale=None, softcap=None, bias=None):
        z = softcapped(q, k, scale, softcap, bias)
        alpha = alpha[..., None, None].expand(*z.shape[:-1], 1) if hasattr(alpha, "dim") else alpha
        return entmax.entmax_bisect(z, alpha, dim=-1, n_iter=60) @ v

    report = kit.check(attention, "normalizers/entmax", framework="torch", dtypes=("float64",))
    assert report.ok, report
    single = kit.check(attention, "normalizers/entmax", framework="torch", dtypes=("float32",))
    wrong = {x.what for x in single.wrong if x.case != "-"}
    assert wrong <= {"dalpha"}, single  # it divides by (alpha - 1)^2; entmax 1.3 at alpha = 1.1
    assert {"out", "dq", "dk", "dv", "dalpha"} <= {x.what for x in report if x.verdict == "ok"}
    fixed = kit.check(lambda q, k, v, alpha=1.5, scale=None: entmax.entmax15(
        scores(q, k, scale), -1) @ v, "normalizers/entmax", framework="torch")  # fmt: skip
    assert "matches with alpha at its default: it has no effect" in fixed.named, fixed.named
