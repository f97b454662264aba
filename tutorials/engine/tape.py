r"""
Derivatives by machine
======================

**The question.** A backward derived at the board can be wrong in one sign and still train a
model, badly. How can a computer find the derivative of a program without anybody deriving
anything, so that we can compare?

**The idea.** There are three ways, and they share nothing. *Record* every operation of the
program and apply the chain rule to the record, from its end to its beginning. *Step into the
complex plane* and read the derivative off the imaginary part. Or simply *change the input a
little* and see. The first is fast, the second exact, the third needs no trust in anything, and
it is the worst. All three are built here from nothing, then compared with the engine of this
library.
"""

# %%
# The chain rule as bookkeeping
# -----------------------------
# A program computes numbers one after another, each from earlier ones by a simple operation:
# :math:`x_j = f_j(x_i, x_k, \dots)`. Write :math:`\bar x_j` for
# :math:`\partial L / \partial x_j`, where :math:`L` is the last number. The last one is easy,
# and for all others the chain rule adds up what those say that *used* the number:
#
# .. math::
#
#    \bar x_{\text{last}} &= 1                                                            &(1)\\
#    \bar x_i &= \sum_{j \text{ uses } i} \bar x_j\, \frac{\partial f_j}{\partial x_i}    &(2)
#
# A number is used only by later ones. So if we read the list of operations from its end, every
# :math:`\bar x_j` is complete before it is needed. This is all: no graph has to be searched and
# nothing is recursive. The list is called a *tape*.
#
# An example: :math:`L = u\, w` with :math:`u = x y` and :math:`w = e^x`, at :math:`x = \ln 2`,
# :math:`y = 3`. Forwards, :math:`u = 3 \ln 2`, :math:`w = 2`, :math:`L = 6 \ln 2`. Backwards,
# :math:`\bar L = 1`, then :math:`\bar w = u = 3 \ln 2` and :math:`\bar u = w = 2`. Now
# :math:`x` was used twice, by :math:`w` with slope :math:`e^x = 2` and by :math:`u` with slope
# :math:`y = 3`: :math:`\bar x = 2 \cdot 3 \ln 2 + 3 \cdot 2 = 6 \ln 2 + 6`. And
# :math:`\bar y = \bar u\, x = 2 \ln 2`.

import math

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

import attention_ref
from attention_ref import engine
from attention_ref.kit.tutorial import BLUE, GREEN, GREY, ORANGE, RED, Tutorial

tutorial = Tutorial(__file__)
EPS = float(np.finfo(np.float64).eps)


# %%
# A tape for numbers
# ------------------
# The whole engine for numbers: operations write down where their result came from and with
# which slope, and one loop reads this backwards.


class Number:
    """A number that remembers how it was made."""

    def __init__(self, value, tape, edges=()):
        self.value, self.tape, self.place = value, tape, len(tape)
        tape.append(edges)  # pairs (place of an earlier number, slope)

    def __add__(self, other):
        return Number(self.value + other.value, self.tape, [(self.place, 1.0), (other.place, 1.0)])

    def __mul__(self, other):
        return Number(
            self.value * other.value,
            self.tape,
            [(self.place, other.value), (other.place, self.value)],
        )


def exp(x):
    """e^x, its own slope."""
    value = math.exp(x.value)
    return Number(value, x.tape, [(x.place, value)])


def inverse(x):
    """1/x with slope -1/x^2."""
    return Number(1 / x.value, x.tape, [(x.place, -1 / x.value**2)])


def read_backwards(last):
    """The derivatives of the last number with respect to all: equations (1) and (2)."""
    bar = [0.0] * len(last.tape)
    bar[last.place] = 1.0  # (1)
    for place in reversed(range(len(last.tape))):
        for earlier, slope in last.tape[place]:
            bar[earlier] += bar[place] * slope  # (2)
    return bar


tape = []
x, y = Number(math.log(2), tape), Number(3.0, tape)
u = x * y
w = exp(x)
L = u * w
bar = read_backwards(L)
steps = {"x": x, "y": y, "u = x y": u, "w = exp x": w, "L = u w": L}
print("step          value  derivative of L")
for name, number in steps.items():
    print(f"{name:10} {number.value:8.4f} {bar[number.place]:16.4f}")
tutorial.check("dL/dx is 6 ln 2 + 6", abs(bar[x.place] - 6 * math.log(2) - 6), 16 * EPS)
tutorial.check("dL/dy is 2 ln 2", abs(bar[y.place] - 2 * math.log(2)), 4 * EPS)

# %%
# Attention by numbers
# --------------------
# These forty lines already differentiate attention. One query, two keys, everything of width
# one: :math:`o = (e^{q k_1} v_1 + e^{q k_2} v_2) / (e^{q k_1} + e^{q k_2})`. The library's
# backward, which somebody derived by hand, must say the same.

tape = []
numbers = {n: Number(value, tape) for n, value in zip(
    ("q", "k1", "k2", "v1", "v2"), (0.7, -0.3, 1.1, 2.0, -1.5), strict=True)}  # fmt: skip
q, k1, k2, v1, v2 = numbers.values()
e1, e2 = exp(q * k1), exp(q * k2)
out = (e1 * v1 + e2 * v2) * inverse(e1 + e2)
bar = read_backwards(out)

spec = attention_ref.get("scores/dot_product")
given = {
    "q": np.array([[0.7]]),
    "k": np.array([[-0.3], [1.1]]),
    "v": np.array([[2.0], [-1.5]]),
}
_, cache = spec.forward(**given, scale=1.0)
by_hand = spec.backward(np.ones((1, 1)), cache)
by_hand = np.concatenate([by_hand[name].ravel() for name in "qkv"])
by_tape = np.array([bar[number.place] for number in numbers.values()])
tutorial.check(
    "attention: tape of numbers against hand", np.max(np.abs(by_hand - by_tape)), 8 * EPS
)

# %%
# Long loops are no problem, because nothing is recursive. Multiply a number 20,000 times by
# :math:`1 + 1/n`: the derivative is :math:`(1 + 1/n)^n`, nearly :math:`e`.

tape = []
start = Number(1.0, tape)
n = 20_000
grown, factor = start, Number(1 + 1 / n, tape)
for _ in range(n):
    grown = grown * factor
error = abs(read_backwards(grown)[start.place] - (1 + 1 / n) ** n)
tutorial.check(f"derivative through {n} products", error, n * EPS)

# %%
# From numbers to arrays
# ----------------------
# For arrays a slope becomes a function: the *pull*, which turns the gradient of a result into
# the gradient of an argument. For :math:`C = AB` the pulls are :math:`\bar A = \bar C B^\top`
# and :math:`\bar B = A^\top \bar C`. One thing is new: NumPy repeats an array of length 1
# silently (*broadcasting*), so its gradient is the sum over the copies.
#
# And how do the calls of an ordinary NumPy program reach our class? NumPy asks. Before a
# function such as ``np.exp`` works on its arguments it looks whether one of them has a method
# ``__array_ufunc__``, and hands the call over; for functions that are no elementwise operations
# the method is ``__array_function__``. So the *same text* runs on arrays and on traced arrays.


def fit(gradient, shape):
    """Sum a gradient over the axes along which an array of this shape was repeated."""
    gradient = gradient.sum(axis=tuple(range(gradient.ndim - len(shape))))
    wide = tuple(i for i, n in enumerate(shape) if n == 1)
    return gradient.sum(axis=wide, keepdims=True)


PULLS = {
    np.add: lambda out, a, b: [lambda g: g, lambda g: g],
    np.multiply: lambda out, a, b: [lambda g: g * b, lambda g: g * a],
    np.divide: lambda out, a, b: [lambda g: g / b, lambda g: -g * out / b],
    np.exp: lambda out, a: [lambda g: g * out],
    np.matmul: lambda out, a, b: [lambda g: g @ b.T, lambda g: a.T @ g],
    np.transpose: lambda out, a: [lambda g: g.T],
    np.sum: lambda out, a, **kw: [lambda g: np.broadcast_to(g, a.shape)],
}


class Array(NDArrayOperatorsMixin):  # the mixin turns a + b into np.add(a, b)
    """An array that remembers how it was made."""

    def __init__(self, value, tape, edges=()):
        self.value, self.tape, self.place = value, tape, len(tape)
        tape.append((value.shape, edges))

    def __array_ufunc__(self, function, method, *args, **kwargs):
        return self.__array_function__(function, (), args, kwargs)

    def __array_function__(self, function, types, args, kwargs):
        plain = [a.value if isinstance(a, Array) else a for a in args]
        out = function(*plain, **kwargs)
        pulls = PULLS[function](out, *plain, **kwargs)
        traced = [(a, pull) for a, pull in zip(args, pulls, strict=True) if isinstance(a, Array)]
        return Array(out, self.tape, [(a.place, pull) for a, pull in traced])


def pull_back(last, gradient):
    """Gradients of all arrays on the tape: the same loop again."""
    bar = {last.place: gradient}
    for place in reversed(range(last.place + 1)):
        for earlier, pull in last.tape[place][1] if place in bar else ():
            part = fit(pull(bar[place]), last.tape[earlier][0])
            bar[earlier] = bar[earlier] + part if earlier in bar else part
    return bar


def attention(q, k, v):
    """Plain NumPy; it does not know who calls."""
    e = np.exp(q @ np.transpose(k))
    return (e / np.sum(e, axis=1, keepdims=True)) @ v


rng = np.random.default_rng(0)
given = {
    "q": rng.standard_normal((4, 3)),
    "k": rng.standard_normal((5, 3)),
    "v": rng.standard_normal((5, 2)),
}
dout = rng.standard_normal((4, 2))
tape = []
traced = {name: Array(value, tape) for name, value in given.items()}
bar = pull_back(attention(**traced), dout)

_, cache = spec.forward(**given, scale=1.0)
by_hand = spec.backward(dout, cache)
for name in given:
    error = np.max(np.abs(bar[traced[name].place] - by_hand[name]))
    tutorial.check(f"d{name}: tape of arrays against hand", error, 64 * EPS)

# %%
# The engine of the library is this class with more rules, and with care for what would break
# the record. What cannot be recorded is refused, with the reason:

_, pull = engine.vjp(attention, given)
error = max(float(np.max(np.abs(g - by_hand[n]))) for n, g in pull(dout).items())
tutorial.check("engine.vjp against hand", error, 64 * EPS)


def writes(x):
    """Overwrites its argument: the tape would still hold the old value."""
    x += 1.0
    return x


def leaves(x):
    """Calls a function that knows Python numbers only."""
    return math.exp(x)


for program in (writes, leaves):
    try:
        engine.vjp(program, {"x": np.ones(())})
    except engine.TracedError as refusal:
        print(f"{program.__name__}: {str(refusal).split(';')[0].split(':')[0]}")

# %%
# A step into the complex plane
# -----------------------------
# Let :math:`f` be analytic, and step by :math:`ih` instead of :math:`h`. Taylor:
#
# .. math::
#
#    f(x + ih) = f(x) + ih f'(x) - \tfrac{h^2}{2} f''(x) - \tfrac{ih^3}{6} f'''(x) + \dots
#    \quad\Rightarrow\quad
#    \frac{\operatorname{Im} f(x + ih)}{h} = f'(x) - \tfrac{h^2}{6} f'''(x) + \dots  \qquad (3)
#
# Value and derivative sit in two different numbers, the real and the imaginary part. Nothing is
# subtracted, so nothing cancels, and :math:`h` may be so small that the error term is far below
# the rounding: the library takes :math:`h = 10^{-30}`. The price: one evaluation for each
# input, and every function in the program must accept complex numbers and be analytic.
# ``np.abs`` is not: it returns the modulus, a real number, and the derivative is lost *without
# any warning*.

h = 1e-30
print("derivative of exp at 1 by the complex step:", np.imag(np.exp(1 + 1j * h)) / h)
tutorial.check("it is e", abs(np.imag(np.exp(1 + 1j * h)) / h - math.e), 2 * EPS)
print("derivative of np.abs at 1 by the complex step:", np.imag(np.abs(1 + 1j * h)) / h, "(is 1)")

# %%
# Differences
# -----------
# The definition of a derivative, made symmetric so that the even terms of Taylor's series drop
# out:
#
# .. math::
#
#    \frac{f(x+h) - f(x-h)}{2h} &= f' + \tfrac{h^2}{6} f''' + \dots                      &(4)\\
#    \frac{8\,[f(x+h) - f(x-h)] - [f(x+2h) - f(x-2h)]}{12 h}
#       &= f' - \tfrac{h^4}{30} f^{(5)} + \dots                                           &(5)
#
# In (5) the two errors of order :math:`h^2` cancel. A small :math:`h` makes these errors small,
# but the subtraction of two nearly equal numbers leaves their rounding errors, about
# :math:`\varepsilon |f|` with :math:`\varepsilon = 2 \cdot 10^{-16}`, divided by :math:`h`. The
# best :math:`h` balances both: :math:`h^2 \approx \varepsilon / h` gives an error
# :math:`\varepsilon^{2/3} \approx 4 \cdot 10^{-11}` for (4),
# :math:`h^4 \approx \varepsilon / h` gives :math:`\varepsilon^{4/5} \approx 3 \cdot 10^{-13}`
# for (5). No choice of :math:`h` gives more.

# %%
# The experiment
# --------------
# The derivative of the whole attention along a random direction, against its backward by hand,
# for steps of all sizes.

tutorial.claim(
    "The error of central differences falls like h^2 and h^4 until rounding, which grows like 1/h, "
    "takes over; that of the complex step falls like h^2 to the rounding error and stays there.",
    criterion="on each of three seeds: exponents fitted where rounding is a hundred times smaller "
    "lie within 0.2 of 2, 4 and 2; the best error of fourth order (mean over five neighbouring h) "
    "is above 1e-14 and at least three times below that of second order; the complex step at "
    "h = 1e-30 is within 64 eps",
)

sizes = np.logspace(0, -16, 65)


def derivative_errors(seed):
    """Errors of formulas (4), (5) and (3) for every h, and of (3) at h = 1e-30.

    Relative to the sum of |gradient * direction|, so that a derivative that happens to be
    nearly zero does no harm.
    """
    rng = np.random.default_rng(seed)
    shapes = {"q": (4, 3), "k": (5, 3), "v": (5, 2)}
    point = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    along = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    length = math.sqrt(sum(np.sum(x * x) for x in along.values()))
    along = {name: x / length for name, x in along.items()}
    dout = rng.standard_normal((4, 2))
    _, cache = spec.forward(**point)
    gradient = spec.backward(dout, cache)
    parts = np.concatenate([np.ravel(gradient[name] * along[name]) for name in shapes])
    truth, size = np.sum(parts), np.sum(np.abs(parts))

    def f(step):
        moved = {name: point[name] + step * along[name] for name in shapes}
        with engine.complex_step():
            return np.sum(dout * spec.forward(**moved)[0])

    def near(h):
        return f(h) - f(-h)

    second = [near(h) / (2 * h) for h in sizes]
    fourth = [(8 * near(h) - near(2 * h)) / (12 * h) for h in sizes]
    into_plane = [np.imag(f(1j * h)) / h for h in sizes]
    last = np.imag(f(1e-30j)) / 1e-30
    errors = np.abs(np.array([second, fourth, into_plane]) - truth) / size
    return np.maximum(errors, EPS / 4), max(abs(last - truth) / size, EPS / 4)


def exponent(errors, rounding):
    """Slope of log(error) against log(h), h < 1/2, where rounding is a hundred times smaller."""
    inside = (sizes < 0.5) & (errors > 100 * rounding)
    return float(np.polyfit(np.log(sizes[inside]), np.log(errors[inside]), 1)[0])


def best(errors):
    """The smallest log10(error), averaged over five neighbouring steps so that luck counts less."""
    return float(np.min(np.convolve(np.log10(errors), np.ones(5) / 5, mode="valid")))


curves, records = [], []
for seed in range(3):
    errors, last = derivative_errors(seed)
    curves.append(errors)
    records.append({
        "exponent, 2nd order": exponent(errors[0], EPS / sizes),
        "exponent, 4th order": exponent(errors[1], EPS / sizes),
        "exponent, complex step": exponent(errors[2], EPS),
        "log10 of the best error, 2nd order": best(errors[0]),
        "log10 of the best error, 4th order": best(errors[1]),
        "log10 of the error at 1e-30, complex step": math.log10(last),
    })  # fmt: skip
held = True
for power2, power4, power_plane, best2, best4, last in (r.values() for r in records):
    held &= abs(power2 - 2) < 0.2 and abs(power4 - 4) < 0.2 and abs(power_plane - 2) < 0.2
    held &= -14 < best4 < best2 - math.log10(3) and 10**last <= 64 * EPS
tutorial.measured(ours=records, verdict="reproduced" if held else "not reproduced", tolerance=0.15)

# %%
# The figure
# ----------
# Left: the tape of the first example, values above and derivatives of :math:`L` below each
# step; arrows carry the slopes. Right: the errors, three seeds each. Going left the differences
# first gain and then lose, and nobody tells where the turning point is. The complex step just
# arrives.

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(1, 1.25))

    places = {"x": (0, 2), "y": (0, 0), "w": (1, 2), "u": (1, 0), "L": (2, 1)}
    texts = {
        "x": ("x", r"$\ln 2$", r"$6\ln 2 + 6$"),
        "y": ("y", "$3$", r"$2 \ln 2$"),
        "w": (r"$w = e^x$", "$2$", r"$3 \ln 2$"),
        "u": ("$u = xy$", r"$3 \ln 2$", "$2$"),
        "L": ("$L = uw$", r"$6 \ln 2$", "$1$"),
    }
    arrows = [("x", "w", r"$e^x = 2$", 0.5), ("x", "u", "$y = 3$", 0.32),
              ("y", "u", r"$x = \ln 2$", 0.5), ("w", "L", r"$u = 3\ln 2$", 0.45),
              ("u", "L", "$w = 2$", 0.45)]  # fmt: skip
    for start, end, slope, along in arrows:
        left.annotate("", xy=places[end], xytext=places[start], zorder=1,
                      arrowprops={"arrowstyle": "-|>", "color": GREY, "shrinkA": 27, "shrinkB": 27,
                                  "linewidth": 1.3})  # fmt: skip
        (x0, y0), (x1, y1) = places[start], places[end]
        left.text(x0 + along * (x1 - x0), y0 + along * (y1 - y0), slope, color=GREY, fontsize=9,
                  ha="center", va="center",
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5})  # fmt: skip
    for name, (across, up) in places.items():
        title, value, derivative = texts[name]
        left.plot(
            across, up, "o", markersize=44, markerfacecolor="white", markeredgecolor="#444444"
        )
        left.text(across, up, title, ha="center", va="center")
        left.text(across, up + 0.36, value, ha="center", va="bottom", color=BLUE)
        aside = 0.13 if name == "x" else 0.0  # an arrow passes there
        left.text(across - aside, up - 0.36, derivative, ha="center", va="top", color=RED)
    left.text(2, 2.35, "value", color=BLUE, ha="center")
    left.text(2, 2.1, "derivative of L", color=RED, ha="center")
    left.text(2, 1.85, "slope", color=GREY, ha="center")
    left.set(title="A tape, read in both directions", xlim=(-0.45, 2.5), ylim=(-0.75, 2.75))
    left.axis("off")

    for i, name, colour, line in (
        (2, "complex step (3)", GREEN, "-"),
        (1, "differences, 4th order (5)", BLUE, "-"),
        (0, "differences, 2nd order (4)", ORANGE, "--"),
    ):
        for curve in curves:
            right.loglog(sizes, curve[i], color=colour, alpha=0.3, linewidth=0.8)
        middle = np.exp(np.mean(np.log([curve[i] for curve in curves]), axis=0))
        right.loglog(sizes, middle, line, color=colour, label=name)
    right.loglog(sizes, EPS / sizes, ":", color=GREY, linewidth=1.2)
    right.text(3e-5, 1.5e-13, r"$\varepsilon / h$", color=GREY, ha="left")
    right.axhline(EPS, color=GREY, linestyle="--", linewidth=1)
    right.text(1, 0.55 * EPS, r"$\varepsilon$", color=GREY, va="top", ha="right")
    right.set(title="Error of a derivative of attention", xlabel="step h", ylabel="relative error",
              ylim=(2e-17, 10), xlim=(1e-16, 1.5))  # fmt: skip
    right.legend(loc="upper center")

# %%
# Exercises
# ---------
# **1. A rule of your own.** Give ``Number`` a function ``tanh`` with its slope
# :math:`1 - \tanh^2 x`, and write the pulls of ``np.tanh`` for ``Array``, in the form of ``PULLS``.
# The first is tried on :math:`\tanh(x y)`, the second on attention with a softcap.


def my_tanh(x):
    """The hyperbolic tangent of a Number."""
    # solution: return None
    value = math.tanh(x.value)
    return Number(value, x.tape, [(x.place, 1 - value * value)])
    # end of solution


def my_pulls(out, a):
    """The list of pulls of np.tanh, one for its one argument."""
    # solution: return None
    return [lambda g: g - g * out * out]
    # end of solution


def capped(q, k, v):
    """Attention with scores that stay between -1.5 and 1.5."""
    e = np.exp(1.5 * np.tanh(q @ np.transpose(k) / 1.5))
    return (e / np.sum(e, axis=1, keepdims=True)) @ v


fresh, answer, tape = np.random.default_rng(7), {}, []
x, y = (Number(value, tape) for value in fresh.standard_normal(2))
cosh = math.cosh(x.value * y.value)
expected = {"of x": y.value / cosh**2, "of y": x.value / cosh**2}
number = my_tanh(x * y)
if number is not None:
    bar = read_backwards(number)
    answer = {"of x": bar[x.place], "of y": bar[y.place]}

shapes = {"q": (3, 4), "k": (5, 4), "v": (5, 2)}
arrays = {name: fresh.standard_normal(shape) for name, shape in shapes.items()}
up = fresh.standard_normal((3, 2))
_, cache = spec.forward(**arrays, scale=1.0, softcap=1.5)
expected |= spec.backward(up, cache)
if my_pulls(np.zeros(1), np.zeros(1)) is not None:
    PULLS[np.tanh], tape = my_pulls, []
    traced = {name: Array(value, tape) for name, value in arrays.items()}
    bar = pull_back(capped(**traced), up)
    answer |= {name: bar[traced[name].place] for name in arrays}
tutorial.exercise(1, answer, expected)

# %%
# **2. Where is the error?** The backward below was derived by somebody in a hurry: one factor
# is missing. Which of the three gradients is wrong, and what is missing? The table tells the
# first.


def in_a_hurry(dout, q, k, v, scale):
    """Attention's backward, nearly."""
    _, cache = spec.forward(q, k, v, scale=scale)
    dp = dout @ v.T
    dz = cache.p * (dp - np.sum(cache.p * dp, axis=1, keepdims=True))
    return {"q": scale * dz @ k, "k": dz.T @ q, "v": cache.p.T @ dout}


wrong = in_a_hurry(dout, **given, scale=0.5)
right_one = engine.complex_gradient(lambda **kw: spec.forward(**kw, scale=0.5)[0], given, dout)
for name in given:
    size = np.max(np.abs(wrong[name] - right_one[name])) / np.max(np.abs(right_one[name]))
    print(f"exercise 2: d{name} deviates by {0.0 if size < 1e-12 else size:.2f}")

# %%
# **Solution 2.** :math:`z_{ts} = c\, q_t \cdot k_s`, so :math:`dk_s = c \sum_t dz_{ts}\, q_t`: the
# scale is missing in dk. With :math:`c = \tfrac12` the wrong one is twice the right one, a
# deviation of 1.00. A model would train with it, at another rate for its keys, and nobody would
# notice.

error = np.max(np.abs(0.5 * wrong["k"] - right_one["k"]))
tutorial.check("exercise 2: dk with the scale", error, 64 * EPS)

# %%
# **3. One-sided differences.** The formula of the textbooks, :math:`(f(x+h) - f(x))/h`, has an
# error of first order. Which :math:`h` is best, and how many digits does it leave? (Balance
# :math:`h` against :math:`\varepsilon/h`, then try it with :math:`e^x` at :math:`x = 1`.)

# %%
# **Solution 3.** Taylor: the error of the formula is :math:`\tfrac h2 f''`, that of rounding about
# :math:`\varepsilon f / h`. For :math:`e^x` all derivatives are equal, so relative to :math:`f'`
# the sum is :math:`\tfrac h2 + \varepsilon / h`, smallest at :math:`h = \sqrt{2 \varepsilon}
# \approx 2 \cdot 10^{-8}`, where it is :math:`\sqrt{2 \varepsilon}` too: half of the digits, about
# eight. Luck with the rounding may give one or two more.

one_sided = np.array([abs((math.exp(1 + h) - math.e) / h / math.e - 1) for h in sizes])
print(f"exercise 3: best h {sizes[np.argmin(one_sided)]:.0e}, error {np.min(one_sided):.0e}")
tutorial.check("exercise 3: the best one-sided difference", np.min(one_sided), math.sqrt(2 * EPS))

# %%
tutorial.finish(figure)
