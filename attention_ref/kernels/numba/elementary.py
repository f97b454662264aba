"""exp and tanh without branches, which LLVM turns into vector code.

Numba from PyPI has no vector exponential: ``np.exp`` in a loop is one scalar call an element.

Algorithm: n = round(x / ln 2), r = x - n ln 2 with ln 2 in two parts, |r| <= 0.35, then the Taylor
polynomial of e^r - 1 (degree 7 for float32, 13 for float64: the first term left out is below a
quarter of an eps), then times 2^n, made by writing n into the exponent bits. Rounding to an integer
is done by adding and subtracting 1.5 * 2^(mantissa bits). Infinity, zero and NaN are selected, not
hoped for: exp(-inf) = 0, exp(inf) = inf, exp(nan) = nan. Results below twice the smallest normal
number are zero. Traffic: none, everything stays in registers.
"""

import math

import numpy as np

from attention_ref.kernels.numba import OPTIONS, jit, require

require()

from numba import types  # noqa: E402
from numba.extending import overload  # noqa: E402

LN2_START = 0.693145751953125  # 15 bits of ln 2
LN2_REST = 1.42860682030941723212e-6  # the next 53


def _build(real, integer, mantissa, upper_bits):
    """exp and tanh for one dtype; every constant is frozen in that dtype."""
    shift = real(1.5 * 2.0**mantissa)
    inverse = real(1.0 / math.log(2.0))
    cut = 2.0**upper_bits
    upper = math.floor(math.log(2.0) * cut) / cut
    lower = real((LN2_START - upper) + LN2_REST)
    upper = real(upper)
    bias = 2 ** (np.finfo(real).bits - mantissa - 2) - 1
    zero, one, two, infinity = real(0), real(1), real(2), real(np.inf)
    smallest = real((2 - bias) * math.log(2.0))
    largest = real(math.log(np.finfo(real).max))
    # the bits of n + shift are those of shift plus n
    to_exponent = integer(bias - 1 - int(shift.view(integer)))
    places = integer(mantissa)
    c2, c3, c4, c5, c6, c7 = (real(1.0 / math.factorial(i)) for i in range(2, 8))
    c8, c9, c10, c11, c12, c13 = (real(1.0 / math.factorial(i)) for i in range(8, 14))

    def series32(r):
        p = ((((c7 * r + c6) * r + c5) * r + c4) * r + c3) * r + c2
        return p * (r * r) + r

    def series64(r):
        p = (((((c13 * r + c12) * r + c11) * r + c10) * r + c9) * r + c8) * r + c7
        p = ((((p * r + c6) * r + c5) * r + c4) * r + c3) * r + c2
        return p * (r * r) + r

    series = jit(series32 if real is np.float32 else series64)

    def half_power32(t):
        """2^(n - 1), made from the number n + shift."""
        bits = np.float32(t).view(np.int32)
        return np.int32((bits + to_exponent) << places).view(np.float32)

    def half_power64(t):
        bits = np.float64(t).view(np.int64)
        return np.int64((bits + to_exponent) << places).view(np.float64)

    half_power = jit(half_power32 if real is np.float32 else half_power64)

    @jit
    def parts(x):
        """Half of 2^n, and e^r - 1."""
        t = x * inverse + shift
        n = t - shift
        r = (x - n * upper) - n * lower
        return half_power(t), series(r)

    @jit
    def exp(x):
        half, p = parts(x)
        y = (half + half * p) * two
        y = zero if x < smallest else y
        return infinity if x > largest else y

    @jit
    def tanh(x):
        y = -two * abs(x)
        half, p = parts(y)
        e = (half * p) * two + (half * two - one)  # e^y - 1
        e = -one if y < smallest else e
        t = (zero - e) / (e + two)
        return -t if x < zero else t

    return exp, tanh


_exp32, _tanh32 = _build(np.float32, np.int32, 23, 15)
_exp64, _tanh64 = _build(np.float64, np.int64, 52, 30)


def exp(x):
    """e^x for a scalar inside a kernel, chosen by the dtype of x when the kernel compiles."""
    return (_exp32 if np.asarray(x).dtype == np.float32 else _exp64)(x)


def tanh(x):
    """tanh x, likewise, with a small relative error also near zero."""
    return (_tanh32 if np.asarray(x).dtype == np.float32 else _tanh64)(x)


@overload(exp, jit_options=OPTIONS)
def _exp(x):
    f = _exp32 if x == types.float32 else _exp64
    return lambda x: f(x)


@overload(tanh, jit_options=OPTIONS)
def _tanh(x):
    f = _tanh32 if x == types.float32 else _tanh64
    return lambda x: f(x)
