// Dense softmax attention, summed in float32, that never writes the scores to memory.
//
//   z = c q k^T,  z <- cap tanh(z / cap),  z <- z + bias,  -inf where masked
//   p = softmax(z),  out = p v,  lse = log sum exp z
//
// One block of SIDE x SIDE threads owns TILE = 4 SIDE rows: queries in dense_forward and
// dense_backward_queries, keys of one key head in dense_backward_keys. Each thread holds a 4 x 4
// piece of the tile of scores and 4 rows of the result in registers.
//
// Loop order: block, tile of TILE columns (keys, or queries of every query head that shares the
// key head), then
//   1. scores:  chunks of DEPTH of the width through shared memory, 4 x 4 sums in registers;
//   2. softmax: the tile goes to shared memory, several threads a row find the new maximum and sum
//               (forward), or p = exp(z - lse), dz = p (dout v^T - delta) (backward);
//   3. result:  tile times chunks of DEPTH rows of v (or k, q, dout), sums in registers.
// Tiles that causality leaves empty are skipped.
//
// A pattern (window, packed sequences) is an interval of keys a query, low[t] <= s < high[t], and
// for every block the one run of columns that any of its rows needs, first <= column < last, made
// on the host (kernels/plan.py). Tiles start at first: the work of a window is T (TILE + window).
// A null pointer stands for everything. Neither end decreases with t: first row's low, last's high.
//
// Traffic a block: its own rows once a tile (they come from the second-level cache), the columns'
// rows once: (D + E) S numbers read, TILE (D + E) written, so (D + E) S T / TILE a head.
// The backward makes z again from q, k, lse: seven products instead of five, but every block owns
// what it writes: no atomics, the same bits in every run.
//
// Compiled for one pair of widths, -DHEAD_D, -DHEAD_E, and one storage (common.cu): numbers become
// float32 where a tile is loaded and are rounded where a result is written. Plain C++ but for the
// CUDA keywords, so that tests run this very text on the CPU. No tensor cores: float32 products.

#include "common.cu"

#ifndef HEAD_D
#define HEAD_D 64
#endif
#ifndef HEAD_E
#define HEAD_E 64
#endif
#ifndef SIDE
#define SIDE 16
#endif
#ifndef DEPTH
#define DEPTH 16
#endif

#define TILE (4 * SIDE)
#define THREADS (SIDE * SIDE)
#define ROW_THREADS (THREADS / TILE)
#define COLUMNS_D ((HEAD_D + SIDE - 1) / SIDE)
#define COLUMNS_E ((HEAD_E + SIDE - 1) / SIDE)
#define WIDEST (HEAD_D > HEAD_E ? HEAD_D : HEAD_E)

// What one block shares. The odd row lengths keep columns out of each other's banks.
struct Shared {
    float a[DEPTH][TILE + 1];
    float b[DEPTH][TILE + 1];
    float p[TILE][TILE + 1];
    float c[DEPTH][WIDEST];
    float part[TILE][ROW_THREADS];
    float sum[TILE][ROW_THREADS];
    float alpha[TILE];
};

// acc[i][j] += sum_d left[row i][d] right[row j][d]; rows ty * 4 + i of left, tx + SIDE j of right.
__device__ inline void multiply_rows(Shared& m, float acc[4][4], const Number* left, int lefts,
                                     const Number* right, int rights, int width, float factor) {
    int thread = threadIdx.x, tx = thread % SIDE, ty = thread / SIDE;
    for (int start = 0; start < width; start += DEPTH) {
        for (int at = thread; at < TILE * DEPTH; at += THREADS) {
            int row = at / DEPTH, d = at % DEPTH;
            bool inside = start + d < width;
            m.a[d][row] = inside && row < lefts
                              ? wide(left[(long long)row * width + start + d]) * factor : 0.0f;
            m.b[d][row] = inside && row < rights
                              ? wide(right[(long long)row * width + start + d]) : 0.0f;
        }
        __syncthreads();
        for (int d = 0; d < DEPTH; d++) {
            float x[4], y[4];
            for (int i = 0; i < 4; i++) x[i] = m.a[d][ty * 4 + i];
            for (int j = 0; j < 4; j++) y[j] = m.b[d][tx + SIDE * j];
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) acc[i][j] += x[i] * y[j];
        }
        __syncthreads();
    }
}

// acc[i][j] += sum_r p[row i][r] right[r][tx + SIDE j]: the tile times rows of v, k, q or dout.
// Its first barrier comes before p is read, so whoever writes p needs none.
template <int COLUMNS>
__device__ inline void multiply_tile(Shared& m, float acc[4][COLUMNS], const Number* right,
                                     int rights, int width) {
    int thread = threadIdx.x, tx = thread % SIDE, ty = thread / SIDE;
    for (int start = 0; start < rights; start += DEPTH) {
        for (int at = thread; at < DEPTH * width; at += THREADS) {
            int row = at / width;
            m.c[row][at % width] =
                start + row < rights ? wide(right[(long long)start * width + at]) : 0.0f;
        }
        __syncthreads();
        for (int r = 0; r < DEPTH && start + r < TILE; r++) {
            for (int i = 0; i < 4; i++) {
                float p = m.p[ty * 4 + i][start + r];
                for (int j = 0; j < COLUMNS; j++) {
                    int column = tx + SIDE * j;
                    if (column < width) acc[i][j] += p * m.c[r][column];
                }
            }
        }
        __syncthreads();
    }
}

extern "C" __global__ void dense_forward(
    const Number* q, const Number* k, const Number* v, const unsigned char* mask, const float* bias,
    const int* low, const int* high, const int* first, const int* last, Number* out, float* lse,
    int heads, int groups, int queries, int keys, float scale, float cap, int causal, int shift,
    int patterns, long long mask_n, long long mask_h, long long mask_t, long long mask_s,
    long long bias_n, long long bias_h, long long bias_t, long long bias_s) {
    __shared__ Shared m;
    int tiles = (queries + TILE - 1) / TILE, head = blockIdx.x / tiles;
    int n = head / heads, h = head % heads, t0 = (blockIdx.x % tiles) * TILE;
    int thread = threadIdx.x, tx = thread % SIDE, ty = thread / SIDE;
    long long key_head = (long long)n * groups + h / (heads / groups);
    long long row0 = (long long)head * queries + t0;
    if (mask) mask += n * mask_n + h * mask_h;
    if (bias) bias += n * bias_n + h * bias_h;
    int pattern = patterns > 1 ? n : 0;
    if (low) low += (long long)pattern * queries, high += (long long)pattern * queries;
    Scores f = scores_of(mask, bias, low, high, cap, causal, shift, queries, keys, mask_t, mask_s,
                         bias_t, bias_s);
    int rows = smaller(TILE, queries - t0), block = pattern * tiles + t0 / TILE;
    int begin = first ? first[block] : 0, end = first ? last[block] : keys;
    if (causal) end = smaller(end, larger(0, t0 + rows + shift));

    float acc[4][COLUMNS_E] = {};
    // this thread also looks after one row of the softmax, together with ROW_THREADS - 1 others
    int row = thread / ROW_THREADS, part = thread % ROW_THREADS;
    float top = -infinity(), total = 0.0f;
    for (int s0 = begin; s0 < end; s0 += TILE) {
        int columns = smaller(TILE, end - s0);
        float z[4][4] = {};
        multiply_rows(m, z, q + row0 * HEAD_D, rows, k + (key_head * keys + s0) * HEAD_D, columns,
                      HEAD_D, scale);
        #pragma unroll  // z has to stay in registers
        for (int i = 0; i < 4; i++)
            #pragma unroll
            for (int j = 0; j < 4; j++) {
                float slope;
                int x = tx + SIDE * j;
                float y = score(f, z[i][j], t0 + ty * 4 + i, s0 + x, &slope);
                m.p[ty * 4 + i][x] = x < columns ? y : -infinity();
            }
        __syncthreads();
        float high = top;
        for (int x = part; x < TILE; x += ROW_THREADS) {
            float y = m.p[row][x];
            high = y > high ? y : high;
        }
        m.part[row][part] = high;
        __syncthreads();
        for (int i = 0; i < ROW_THREADS; i++)
            high = m.part[row][i] > high ? m.part[row][i] : high;
        float safe = high > -infinity() ? high : 0.0f, sum = 0.0f;
        for (int x = part; x < TILE; x += ROW_THREADS) {
            float p = expf(m.p[row][x] - safe);
            m.p[row][x] = p;
            sum += p;
        }
        m.sum[row][part] = sum;
        if (part == 0) m.alpha[row] = expf(top - safe);
        __syncthreads();
        total *= m.alpha[row];
        for (int i = 0; i < ROW_THREADS; i++) total += m.sum[row][i];
        top = high;
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < COLUMNS_E; j++) acc[i][j] *= m.alpha[ty * 4 + i];
        multiply_tile<COLUMNS_E>(m, acc, v + (key_head * keys + s0) * HEAD_E, columns, HEAD_E);
    }
    if (part == 0) {
        m.alpha[row] = total;
        if (row < rows) lse[row0 + row] = top + logf(total);
    }
    __syncthreads();
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < COLUMNS_E; j++) {
            int r = ty * 4 + i, e = tx + SIDE * j;
            float sum = m.alpha[r];
            if (r < rows && e < HEAD_E)
                out[(row0 + r) * HEAD_E + e] = narrow(sum != 0.0f ? acc[i][j] / sum : 0.0f);
        }
}

extern "C" __global__ void dense_backward_queries(
    const Number* q, const Number* k, const Number* v, const unsigned char* mask, const float* bias,
    const int* low, const int* high, const int* first, const int* last, const Number* dout,
    const float* lse, const float* delta, Number* dq, float* dbias,
    int heads, int groups, int queries, int keys, float scale, float cap, int causal, int shift,
    int patterns, long long mask_n, long long mask_h, long long mask_t, long long mask_s,
    long long bias_n, long long bias_h, long long bias_t, long long bias_s) {
    __shared__ Shared m;
    int tiles = (queries + TILE - 1) / TILE, head = blockIdx.x / tiles;
    int n = head / heads, h = head % heads, t0 = (blockIdx.x % tiles) * TILE;
    int thread = threadIdx.x, tx = thread % SIDE, ty = thread / SIDE;
    long long key_head = (long long)n * groups + h / (heads / groups);
    long long row0 = (long long)head * queries + t0;
    if (mask) mask += n * mask_n + h * mask_h;
    if (bias) bias += n * bias_n + h * bias_h;
    int pattern = patterns > 1 ? n : 0;
    if (low) low += (long long)pattern * queries, high += (long long)pattern * queries;
    Scores f = scores_of(mask, bias, low, high, cap, causal, shift, queries, keys, mask_t, mask_s,
                         bias_t, bias_s);
    int rows = smaller(TILE, queries - t0), block = pattern * tiles + t0 / TILE;
    int begin = first ? first[block] : 0, end = first ? last[block] : keys;
    if (causal) end = smaller(end, larger(0, t0 + rows + shift));

    float acc[4][COLUMNS_D] = {};
    for (int s0 = begin; s0 < end; s0 += TILE) {
        int columns = smaller(TILE, end - s0);
        long long column0 = key_head * keys + s0;
        float z[4][4] = {}, dp[4][4] = {};
        multiply_rows(m, z, q + row0 * HEAD_D, rows, k + column0 * HEAD_D, columns, HEAD_D, scale);
        multiply_rows(m, dp, dout + row0 * HEAD_E, rows, v + column0 * HEAD_E, columns, HEAD_E,
                      1.0f);
        #pragma unroll  // z has to stay in registers
        for (int i = 0; i < 4; i++)
            #pragma unroll
            for (int j = 0; j < 4; j++) {
                int r = ty * 4 + i, x = tx + SIDE * j;
                float slope = 1.0f, dz = 0.0f;
                if (r < rows && x < columns) {
                    float y = score(f, z[i][j], t0 + r, s0 + x, &slope);
                    float p = expf(y - lse[row0 + r]);
                    dz = p != 0.0f ? p * (dp[i][j] - delta[row0 + r]) : 0.0f;
                    if (dbias) dbias[(row0 + r) * keys + s0 + x] = dz;
                }
                m.p[r][x] = dz * slope;
            }
        multiply_tile<COLUMNS_D>(m, acc, k + column0 * HEAD_D, columns, HEAD_D);
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < COLUMNS_D; j++) {
            int r = ty * 4 + i, d = tx + SIDE * j;
            if (r < rows && d < HEAD_D) dq[(row0 + r) * HEAD_D + d] = narrow(acc[i][j] * scale);
        }
}

extern "C" __global__ void dense_backward_keys(
    const Number* q, const Number* k, const Number* v, const unsigned char* mask, const float* bias,
    const int* low, const int* high, const int* first, const int* last, const Number* dout,
    const float* lse, const float* delta, Number* dk, Number* dv,
    int heads, int groups, int queries, int keys, float scale, float cap, int causal, int shift,
    int patterns, long long mask_n, long long mask_h, long long mask_t, long long mask_s,
    long long bias_n, long long bias_h, long long bias_t, long long bias_s) {
    __shared__ Shared m;
    int tiles = (keys + TILE - 1) / TILE, group = blockIdx.x / tiles;
    int n = group / groups, g = group % groups, s0 = (blockIdx.x % tiles) * TILE;
    int thread = threadIdx.x, tx = thread % SIDE, ty = thread / SIDE, share = heads / groups;
    long long column0 = (long long)group * keys + s0;
    int rows = smaller(TILE, keys - s0);  // here the rows of the tile are keys
    int pattern = patterns > 1 ? n : 0, block = pattern * tiles + s0 / TILE;
    if (low) low += (long long)pattern * queries, high += (long long)pattern * queries;
    int begin = first ? first[block] : 0, end = first ? last[block] : queries;
    if (causal) begin = larger(begin, s0 - shift);

    float acc_k[4][COLUMNS_D] = {}, acc_v[4][COLUMNS_E] = {};
    for (int h = g * share; h < (g + 1) * share; h++) {
        Scores f = scores_of(mask ? mask + n * mask_n + h * mask_h : mask,
                             bias ? bias + n * bias_n + h * bias_h : bias, low, high, cap, causal,
                             shift, queries, keys, mask_t, mask_s, bias_t, bias_s);
        for (int t0 = begin; t0 < end; t0 += TILE) {
            int columns = smaller(TILE, end - t0);
            long long row0 = ((long long)n * heads + h) * queries + t0;
            float z[4][4] = {}, dz[4][4] = {};
            multiply_rows(m, z, k + column0 * HEAD_D, rows, q + row0 * HEAD_D, columns, HEAD_D,
                          scale);
            multiply_rows(m, dz, v + column0 * HEAD_E, rows, dout + row0 * HEAD_E, columns, HEAD_E,
                          1.0f);
            #pragma unroll
            for (int i = 0; i < 4; i++)
                #pragma unroll
                for (int j = 0; j < 4; j++) {
                    int r = ty * 4 + i, x = tx + SIDE * j;
                    float slope = 1.0f, p = 0.0f;
                    if (r < rows && x < columns) {
                        p = expf(score(f, z[i][j], t0 + x, s0 + r, &slope) - lse[row0 + x]);
                        dz[i][j] = p != 0.0f ? p * (dz[i][j] - delta[row0 + x]) * slope : 0.0f;
                    } else {
                        dz[i][j] = 0.0f;
                    }
                    m.p[r][x] = p;
                }
            multiply_tile<COLUMNS_E>(m, acc_v, dout + row0 * HEAD_E, columns, HEAD_E);
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) m.p[ty * 4 + i][tx + SIDE * j] = dz[i][j];
            multiply_tile<COLUMNS_D>(m, acc_k, q + row0 * HEAD_D, columns, HEAD_D);
        }
    }
    for (int i = 0; i < 4; i++) {
        int r = ty * 4 + i;
        for (int j = 0; j < COLUMNS_D; j++) {
            int d = tx + SIDE * j;
            if (r < rows && d < HEAD_D)
                dk[(column0 + r) * HEAD_D + d] = narrow(acc_k[i][j] * scale);
        }
        for (int j = 0; j < COLUMNS_E; j++) {
            int e = tx + SIDE * j;
            if (r < rows && e < HEAD_E) dv[(column0 + r) * HEAD_E + e] = narrow(acc_v[i][j]);
        }
    }
}
