"""Steps on tiles that stay in the nearest caches.

A tile is a flat array of rows of ``LANES`` numbers; every inner loop runs over the lanes, so all
arithmetic is vector code and no sum ever runs *across* the lanes. Which axis lies in the lanes is
chosen so that the reductions go down the rows: queries for the forward and dq, keys for dk and dv.

``multiply`` is the only matrix product. Loop order: six rows of the result by four terms of the
sum, 24 scalars held in registers, then all lanes: 24 fused multiply-adds for ten loads and six
stores of a vector. All arrays are flat and contiguous; a matrix is (flat, start, row stride,
column stride), so a transposed factor costs nothing.
"""

from attention_ref.kernels.numba import jit

LANES = 128
ROWS = 96  # of a tile of scores; a multiple of six


@jit
def _four(a, at, right):
    return a[at], a[at + right], a[at + 2 * right], a[at + 3 * right]


@jit
def _six_rows(a, at, down, right, terms, b, c):
    """c[i, x] += sum_j a[i, j] b[j, x] for six rows i, four terms j at a time.

    A slice is taken for every four terms, so that the compiler sees that no index is negative:
    otherwise it loads one number at a time.
    """
    for j in range(0, terms, 4):
        bj = b[j * LANES : (j + 4) * LANES]
        a00, a01, a02, a03 = _four(a, at + j * right, right)
        a10, a11, a12, a13 = _four(a, at + j * right + down, right)
        a20, a21, a22, a23 = _four(a, at + j * right + 2 * down, right)
        a30, a31, a32, a33 = _four(a, at + j * right + 3 * down, right)
        a40, a41, a42, a43 = _four(a, at + j * right + 4 * down, right)
        a50, a51, a52, a53 = _four(a, at + j * right + 5 * down, right)
        for x in range(LANES):
            b0, b1, b2, b3 = bj[x], bj[LANES + x], bj[2 * LANES + x], bj[3 * LANES + x]
            c0 = c[x] + a00 * b0
            c1 = c[LANES + x] + a10 * b0
            c2 = c[2 * LANES + x] + a20 * b0
            c3 = c[3 * LANES + x] + a30 * b0
            c4 = c[4 * LANES + x] + a40 * b0
            c5 = c[5 * LANES + x] + a50 * b0
            c0 += a01 * b1
            c1 += a11 * b1
            c2 += a21 * b1
            c3 += a31 * b1
            c4 += a41 * b1
            c5 += a51 * b1
            c0 += a02 * b2
            c1 += a12 * b2
            c2 += a22 * b2
            c3 += a32 * b2
            c4 += a42 * b2
            c5 += a52 * b2
            c[x] = c0 + a03 * b3
            c[LANES + x] = c1 + a13 * b3
            c[2 * LANES + x] = c2 + a23 * b3
            c[3 * LANES + x] = c3 + a33 * b3
            c[4 * LANES + x] = c4 + a43 * b3
            c[5 * LANES + x] = c5 + a53 * b3


@jit
def _one_row(a, at, right, terms, b, c):
    """The same for one row."""
    for j in range(0, terms, 4):
        bj = b[j * LANES : (j + 4) * LANES]
        a0, a1, a2, a3 = _four(a, at + j * right, right)
        for x in range(LANES):
            y = c[x] + a0 * bj[x]
            y += a1 * bj[LANES + x]
            y += a2 * bj[2 * LANES + x]
            c[x] = y + a3 * bj[3 * LANES + x]


@jit
def _one_term(factor, b, c):
    """c[x] += factor b[x]: what is left when four does not divide the number of terms."""
    for x in range(LANES):
        c[x] += factor * b[x]


@jit
def multiply(a, start, down, right, rows, terms, b, c):
    """Tile product c[i, x] += sum_j a[start + i down + j right] b[j, x]."""
    sixes, fours = rows - rows % 6, terms - terms % 4
    for i in range(0, sixes, 6):
        _six_rows(a, start + i * down, down, right, fours, b, c[i * LANES : (i + 6) * LANES])
    for i in range(rows):
        at, ci = start + i * down, c[i * LANES : (i + 1) * LANES]
        if i >= sixes:
            _one_row(a, at, right, fours, b, ci)
        for j in range(fours, terms):
            _one_term(a[at + j * right], b[j * LANES : (j + 1) * LANES], ci)


@jit
def fill(tile, count, value):
    for x in range(count):
        tile[x] = value


@jit
def load_lanes(source, start, width, lanes, factor, tile):
    """tile[d, x] = factor * source[start + x width + d]; lanes without a row are zero."""
    for d in range(width):
        for x in range(lanes):
            tile[d * LANES + x] = source[start + x * width + d] * factor
        for x in range(lanes, LANES):
            tile[d * LANES + x] = 0


@jit
def store_lanes(tile, width, lanes, factor, target, start):
    """target[start + x width + d] = factor * tile[d, x]: the way back."""
    for x in range(lanes):
        for d in range(width):
            target[start + x * width + d] = tile[d * LANES + x] * factor
