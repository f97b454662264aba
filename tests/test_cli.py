"""The command line: results on stdout, progress on stderr, exit codes 0, 1, 2."""

import json
import subprocess
import sys

import pytest

from attention_ref.cli import main
from attention_ref.core.registry import catalog

COLUMNS = {
    "key", "number", "kind", "grade", "module", "backward", "tests", "conformance", "golden",
    "tutorial", "figure", "claim", "numba", "cuda", "verified_by", "done",
}  # fmt: skip


def call(capsys, *args):
    code = main(list(args))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_list(capsys):
    code, out, _ = call(capsys, "list", "--json")
    assert code == 0
    assert "scores/dot_product" in [r["key"] for r in json.loads(out)]
    code, out, _ = call(capsys, "list", "--all", "--json")
    assert len(json.loads(out)) == len(catalog()) == 331
    code, out, _ = call(capsys, "list", "--family", "scores")
    assert all(line.startswith("scores/") for line in out.splitlines()[1:])


def test_status_knows_every_row(capsys):
    code, out, _ = call(capsys, "status", "--json")
    rows = json.loads(out)
    assert code == 0 and len(rows) == 331
    assert all(set(r) >= COLUMNS for r in rows)
    assert sum(r["number"] is not None for r in rows) == 288
    assert not any(r["done"] and not r["module"] for r in rows)


def test_show(capsys):
    code, out, _ = call(capsys, "show", "scores/dot_product")
    assert code == 0 and "claim:" in out and "Parameters" in out
    code, out, _ = call(capsys, "show", "scores/dot_product", "--json")
    assert json.loads(out)["signature"].startswith("dot_product_forward(")


def test_run(capsys):
    code, out, _ = call(capsys, "run", "scores/dot_product", "--case", "causal", "--json")
    assert code == 0 and len(json.loads(out)["out"]["out"]) == 2
    code, out, _ = call(capsys, "run", "scores/dot_product")
    assert code == 0 and "out (2, 5, 3) float64" in out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("run", "no/such"), "'no/such' is not known"),
        (("run", "scores/dot_produkt"), "did you mean 'scores/dot_product'"),
        (("show", "surveys/none"), "is not known"),
        (("run", "scores/dot_product", "--case", "casual"), "did you mean 'causal'"),
        (("run", "scores/dot_product", "--backend", "nump"), "backend is 'nump'"),
        (("verify", "scores/dot_produkt"), "did you mean"),
        (("new", "scores/not_in_the_catalog"), "scores/not_in_the_catalog"),
    ],
)
def test_misuse_exits_2_with_one_line(capsys, args, says):
    code, out, err = call(capsys, *args)
    assert code == 2 and out == "" and says in err
    assert len(err.strip().splitlines()) == 1 and err.startswith("error: ")


def test_an_unknown_command_exits_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["dance"])
    assert stop.value.code == 2


def test_golden_verify_and_export(capsys, tmp_path):
    code, out, _ = call(capsys, "golden", "verify", "scores/dot_product")
    assert code == 0 and out.startswith("ok")
    code, out, _ = call(
        capsys, "golden", "export", "scores/dot_product", "--out", str(tmp_path), "--json"
    )
    assert code == 0 and len(json.loads(out)) == 2
    assert (tmp_path / "scores" / "dot_product.npz").is_file()


def test_check_exit_codes(capsys, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from attention_ref import get\nfrom attention_ref.kit import zoo\n"
        "spec = get('scores/dot_product')\n"
        "right, right_backward = spec.forward, spec.backward\n"
        "wrong, wrong_backward = zoo.animal('mask inverted')\n"
    )
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capsys, "check", "mine:right", "--backward", "mine:right_backward")
    assert code == 0 and "conforms" in out
    code, out, _ = call(
        capsys, "check", "mine:wrong", "--backward", "mine:wrong_backward", "--json"
    )
    assert code == 1 and "inverted" in " ".join(json.loads(out)["named"])
    for bad in ("mine", "mine:nothing", "no_such_module:f"):
        code, _, err = call(capsys, "check", bad)
        assert code == 2 and "error: function" in err


def test_doctor(capsys):
    code, out, _ = call(capsys, "doctor", "--json")
    report = json.loads(out)
    assert code == 0 and report["needed"]["numpy"] and report["checkout"] is True


def test_a_closed_pipe_is_no_traceback():
    command = f"{sys.executable} -m attention_ref list --all | head -1"
    run = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert run.stderr == "" and run.stdout.startswith("key")


def test_import_is_light():
    """Importing the package loads neither numba nor scipy nor matplotlib, listing no method."""
    code = (
        "import sys, attention_ref; attention_ref.keys();"
        "heavy = {'numba', 'scipy', 'matplotlib', 'cupy'} & set(sys.modules);"
        "methods = [m for m in sys.modules if m.startswith('attention_ref.methods.')];"
        "print(heavy or methods or 'light')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "light", run.stdout + run.stderr
