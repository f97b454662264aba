"""The toy models: text, transformer, optimisers, training loop."""

import math
import sys
import types

import numpy as np
import pytest

from attention_ref import engine, nn
from attention_ref.core.errors import DTypeError, ParameterError
from attention_ref.nn import model as parts
from attention_ref.nn import text as texts


def tiny(**changes):
    shape = {"vocabulary": 5, "context": 6, "width": 4, "heads": 2, "layers": 2}
    return nn.Model(**shape | {"dtype": np.float64} | changes)


def sample(seed=1, B=2, T=6, vocabulary=5):
    ids = np.random.default_rng(seed).integers(vocabulary, size=(B, T + 1))
    return ids[:, :-1], ids[:, 1:]


# ------------------------------------------------------------------------------ text


def test_english_text_is_there_and_the_same_every_time():
    text = nn.english()
    assert len(text.ids) > 200_000
    assert 40 < len(text.alphabet) < 130
    assert len(text.sha256) == 64 and text is nn.english()
    assert " the " in text.decode(text.ids[:20_000])
    assert text.decode(text.encode("for a list")) == "for a list"
    assert text.decode(text.encode("a\u4e00b")) == "a b"


def test_entropies_of_a_text_that_can_be_counted():
    text = texts.from_string("ab" * 100)
    assert text.alphabet == "ab"
    assert text.entropy() == pytest.approx(math.log(2), abs=1e-12)
    assert text.entropy(2) == pytest.approx(0, abs=1e-4)  # b follows a, a follows b
    assert texts.from_string("a  b\n*****\tb a" * 9).decode([0, 1]) == " a"


def test_batches_are_windows_and_their_next_tokens():
    tokens, targets = next(nn.batches(np.random.default_rng(0), np.arange(50), size=3, context=7))
    assert tokens.shape == targets.shape == (3, 7)
    assert np.array_equal(targets, tokens + 1)
    assert np.array_equal(np.diff(tokens, axis=1), np.ones((3, 6)))


# ------------------------------------------------------------------------------ model


@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_of_the_model_is_right(tied):
    model = tiny(tied=tied)
    rng = np.random.default_rng(0)
    parameters = {k: x + 0.1 * rng.standard_normal(x.shape) for k, x in model.initial(rng).items()}
    batch = sample()
    _, gradients = nn.value_and_gradient(model.loss, parameters, *batch)
    assert gradients.keys() == parameters.keys()
    for name, x in parameters.items():
        tangent = {name: rng.standard_normal(x.shape)}
        want = engine.jvp(lambda **p: model.loss(p, *batch), parameters, tangent)
        assert np.sum(gradients[name] * tangent[name]) == pytest.approx(float(want), rel=1e-11)


def test_a_token_sees_nothing_behind_it():
    model = tiny()
    parameters = model.initial(np.random.default_rng(0))
    tokens, _ = sample()
    changed = tokens.copy()
    changed[:, 4] = (changed[:, 4] + 1) % 5
    before, after = model.logits(parameters, tokens), model.logits(parameters, changed)
    assert np.array_equal(before[:, :4], after[:, :4])
    assert not np.allclose(before[:, 4:], after[:, 4:])
    free = model._replace(causal=False)
    first = [free.logits(parameters, x)[:, 0] for x in (tokens, changed)]
    assert not np.allclose(*first)


def test_maps_are_the_weights_of_every_head():
    model = tiny()
    maps = model.maps(model.initial(np.random.default_rng(0)), sample()[0][0])
    assert maps.shape == (2, 2, 6, 6)
    assert np.allclose(maps.sum(-1), 1) and np.array_equal(maps, np.tril(maps))


def test_a_sample_continues_the_text_as_likely_as_the_model_says():
    model = tiny(layers=1)
    parameters = model.initial(np.random.default_rng(0))
    start = np.array([1, 4, 2])
    long = model.sample(parameters, start, 9, np.random.default_rng(0))
    assert long.shape == (12,) and long[:3].tolist() == [1, 4, 2]
    rng = np.random.default_rng(1)
    drawn = [model.sample(parameters, start, 1, rng, temperature=1.0)[-1] for _ in range(2000)]
    want = np.exp(parts.log_softmax(model.logits(parameters, start[None])[0, -1]))
    assert np.max(np.abs(np.bincount(drawn, minlength=5) / 2000 - want)) < 0.05


def test_float32_stays_float32():
    model = tiny(dtype=np.float32)
    parameters = model.initial(np.random.default_rng(0))
    _, gradients = nn.value_and_gradient(model.loss, parameters, *sample())
    new, _ = nn.adamw(parameters, nn.clip(gradients, 1.0), rate=1e-3)
    for arrays in (parameters, gradients, new):
        assert {x.dtype for x in arrays.values()} == {np.dtype(np.float32)}


def test_a_mechanism_may_have_options_and_parameters_of_its_own(monkeypatch):
    def forward(q, k, v, slope, *, twice=False):
        return np.tanh(q + k) * slope + v * (2 if twice else 1), None

    made_up = types.SimpleNamespace(main=forward)
    monkeypatch.setattr(parts.attention_ref, "get", {"made/up": made_up}.__getitem__)
    model = tiny(
        key="made/up", options={"twice": True}, extra={"slope": lambda rng, m: np.full(2, 0.3)}
    )
    parameters = model.initial(np.random.default_rng(0))
    assert parameters["1.extra.slope"].tolist() == [0.3, 0.3]
    _, gradients = nn.value_and_gradient(model.loss, parameters, *sample())
    assert np.all(gradients["1.extra.slope"] != 0)


def test_bad_shapes_of_a_model():
    with pytest.raises(ParameterError, match="width is 5, expected a multiple of heads = 2"):
        tiny(width=5).initial(np.random.default_rng(0))
    with pytest.raises(DTypeError, match="rng is a int"):
        tiny().initial(0)


def test_norms_and_cross_entropy_on_numbers():
    x = np.array([[3.0, 4.0]])
    assert np.allclose(parts.rms_norm(x, 1.0, eps=0.0), x / math.sqrt(12.5))
    assert np.allclose(parts.layer_norm(x, 2.0, 1.0, eps=0.0), [[-1.0, 3.0]])
    z = np.log(np.array([[1.0, 3.0]])) + 1000
    assert np.allclose(parts.log_softmax(z), np.log([[0.25, 0.75]]))
    assert parts.cross_entropy(z, np.array([0])) == pytest.approx(math.log(4))


# ------------------------------------------------------------------------------ optimisers


def test_adamw_first_step_is_the_sign_and_decay_is_for_matrices():
    parameters = {"w": np.full((1, 2), 10.0), "b": np.array([10.0])}
    gradients = {"w": np.array([[3.0, -4.0]]), "b": np.array([0.5])}
    new, state = nn.adamw(parameters, gradients, rate=0.1, decay=0.5, eps=0.0)
    assert np.allclose(new["w"], [[9.5 - 0.1, 9.5 + 0.1]])
    assert np.allclose(new["b"], [9.9])
    assert state.step == 1 and parameters["b"][0] == 10.0


def test_adamw_second_step_by_hand():
    x, state = {"x": np.array([1.0])}, None
    for gradient in (2.0, -1.0):
        x, state = nn.adamw(
            x, {"x": np.array([gradient])}, state, rate=0.1, betas=(0.5, 0.75), eps=0.0
        )
    mean = (0.5 * (0.5 * 2) + 0.5 * -1) / (1 - 0.25)
    square = (0.75 * (0.25 * 4) + 0.25 * 1) / (1 - 0.75**2)
    assert x["x"][0] == pytest.approx(0.9 - 0.1 * mean / math.sqrt(square), rel=1e-14)


def test_sgd_with_momentum_on_a_quadratic():
    x, state = {"x": np.array([1.0])}, None
    for _ in range(2):
        x, state = nn.sgd(x, {"x": x["x"]}, state, rate=0.1, momentum=0.5)
    assert x["x"][0] == pytest.approx(0.9 - 0.1 * (0.5 * 1.0 + 0.9))


def test_clip_and_the_learning_rate():
    gradients = {"a": np.array([3.0]), "b": np.array([4.0])}
    assert nn.clip(gradients, 10.0)["a"][0] == 3.0
    assert nn.clip(gradients, 1.0)["b"][0] == pytest.approx(0.8)
    assert nn.clip({"a": np.zeros(2)}, 1.0)["a"].tolist() == [0, 0]
    assert nn.cosine(0, 100, rate=1.0, warmup=10) == pytest.approx(0.1)
    assert nn.cosine(10, 100, rate=1.0, warmup=10) == pytest.approx(1.0)
    assert nn.cosine(100, 100, rate=1.0, warmup=10) == pytest.approx(0.1)


# ------------------------------------------------------------------------------ training


def test_training_learns_and_is_quiet(capsys):
    text = texts.from_string("to be or not to be that is the question " * 40)
    model = nn.Model(len(text.alphabet), context=16, width=16, heads=2, layers=1)
    runs = []
    for _ in range(2):
        rng = np.random.default_rng(0)
        start = model.initial(rng)
        kept = {k: x.copy() for k, x in start.items()}
        source = nn.batches(rng, text.ids, size=8, context=16)
        _, losses = nn.train(model.loss, start, source, steps=60, rate=1e-2, progress=False)
        runs.append(losses)
        assert all(np.array_equal(start[k], kept[k]) for k in start)
    assert np.array_equal(*runs)
    assert np.mean(losses[-5:]) < 0.6 * text.entropy() < losses[0]
    assert capsys.readouterr() == ("", "")


def test_the_bar_is_silent_without_a_terminal_and_under_no_color(monkeypatch, capsys):
    with nn.bar(2, "x") as shown:
        shown.update()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    with nn.bar(2, "x") as shown:
        shown.update()
    assert capsys.readouterr() == ("", "")


def test_the_bar_shows_on_stderr_when_asked(capsys):
    with nn.bar(2, "lesson", progress=True) as shown:
        shown.update(2)
    out, err = capsys.readouterr()
    assert out == "" and "lesson" in err and "2/2" in err
