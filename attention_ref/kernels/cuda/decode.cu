// Few queries over many keys: reading a KV cache.
//
//   z = c q k^T (softcap, bias, mask),  p = softmax(z),  out = p v,  lse = log sum exp z
//
// All query heads that share a key head, and all their queries, are rows; a block takes ROWS of
// them, so that every key and value is read once however many heads share it. One block of THREADS
// threads owns a key head, its ROWS rows and a portion of the keys; portions are independent, and
// decode_combine puts them together, in the order of the keys: the same bits in every run.
//
// Loop order of decode_portion: block, tile of KEYS keys, then
//   1. values:  v through shared memory in chunks of DEPTH, only to see which rows are not finite;
//   2. scores:  k likewise; a thread has one key and every GROUPS-th row;
//   3. softmax: PER_ROW threads a row find the new maximum and sum;
//   4. result:  a thread has a column of v and every PARTS-th key, and all rows, in registers.
// After the last tile the PARTS are added in shared memory.
//
// Traffic a key head: k once, v once from memory and once more from cache, ROWS rows at a time;
// (E + 2) numbers a row and portion written, and read by decode_combine.
//
// A key whose k or v holds NaN or infinity makes the rows that see it NaN and no other: k becomes
// NaN as it is loaded, and such a v counts as NaN in the score and as 0 in the result.
//
// Compiled for one pair of widths, one number of rows and one storage (common.cu).

#include "common.cu"

#ifndef HEAD_D
#define HEAD_D 64
#endif
#ifndef HEAD_E
#define HEAD_E 64
#endif
#ifndef ROWS
#define ROWS 16
#endif
#ifndef KEYS
#define KEYS 64
#endif
#ifndef THREADS
#define THREADS 128
#endif
#ifndef DEPTH
#define DEPTH 32
#endif

#define GROUPS (THREADS / KEYS)
#define OWN ((ROWS + GROUPS - 1) / GROUPS)
#define PER_ROW (THREADS / ROWS < 8 ? THREADS / ROWS : 8)
#define WIDTH (HEAD_E < THREADS ? HEAD_E : THREADS)
#define PARTS (THREADS / WIDTH)
#define COLUMNS ((HEAD_E + WIDTH - 1) / WIDTH)

// What one block shares; the odd row lengths keep columns out of each other's banks.
struct Shared {
    float q[ROWS][HEAD_D];
    float chunk[DEPTH][KEYS + 1];
    float p[ROWS][KEYS + 1];
    float odd[GROUPS][KEYS];  // 0, or NaN where v is not finite; the sum over the groups counts
    float part[ROWS][PER_ROW];
    float sum[ROWS][PER_ROW];
    float alpha[ROWS];
    float out[ROWS][HEAD_E];
};

// x, or NaN where x is infinite.
__device__ inline float marked(float x) { return (x - x) + x; }

// Columns start to start + DEPTH of count rows into shared memory, turned; 0 behind the last row.
__device__ inline void stage(Shared& m, const Number* rows, int count, int width, int start) {
    for (int at = threadIdx.x; at < KEYS * DEPTH; at += THREADS) {
        int row = at / DEPTH, d = at % DEPTH;
        m.chunk[d][row] = row < count && start + d < width
                              ? marked(wide(rows[(long long)row * width + start + d])) : 0.0f;
    }
    __syncthreads();
}

extern "C" __global__ void decode_portion(
    const Number* q, const Number* k, const Number* v, const unsigned char* mask, const float* bias,
    float* tops, float* totals, float* parts, int heads, int groups, int queries, int keys,
    int portions, int portion_keys, float scale, float cap, int causal, int shift,
    long long mask_n, long long mask_h, long long mask_t, long long mask_s, long long bias_n,
    long long bias_h, long long bias_t, long long bias_s) {
    __shared__ Shared m;
    int share = heads / groups, rows = share * queries, tiles = (rows + ROWS - 1) / ROWS;
    int portion = blockIdx.x % portions, item = blockIdx.x / portions;
    int r0 = item % tiles * ROWS, n = item / tiles / groups, g = item / tiles % groups;
    long long head = (long long)n * groups + g;
    int thread = threadIdx.x, key = thread % KEYS, group = thread / KEYS;
    int row = thread / PER_ROW, lane = thread % PER_ROW;      // in the softmax
    int column = thread % WIDTH, part = thread / WIDTH;       // in the result
    int end = smaller(keys, (portion + 1) * portion_keys);

    for (int at = thread; at < ROWS * HEAD_D; at += THREADS) {
        int r = at / HEAD_D;
        m.q[r][at % HEAD_D] =
            r0 + r < rows ? marked(wide(q[(head * rows + r0) * HEAD_D + at])) * scale : 0.0f;
    }
    float acc[ROWS][COLUMNS] = {};
    float top = -infinity(), total = 0.0f;
    for (int s0 = portion * portion_keys; s0 < end; s0 += KEYS) {
        int count = smaller(KEYS, end - s0);
        const Number* values = v + (head * keys + s0) * HEAD_E;
        float odd = 0.0f;
        for (int start = 0; start < HEAD_E; start += DEPTH) {
            stage(m, values, count, HEAD_E, start);
            for (int d = group; d < DEPTH; d += GROUPS) odd += m.chunk[d][key] - m.chunk[d][key];
            __syncthreads();
        }
        m.odd[group][key] = odd;

        float z[OWN] = {};
        for (int start = 0; start < HEAD_D; start += DEPTH) {
            stage(m, k + (head * keys + s0) * HEAD_D, count, HEAD_D, start);
            for (int d = 0; d < DEPTH && start + d < HEAD_D; d++) {
                float x = m.chunk[d][key];
                for (int i = 0; i < OWN; i++) {
                    int r = group + GROUPS * i;
                    if (r < ROWS) z[i] += m.q[r][start + d] * x;
                }
            }
            __syncthreads();
        }
        odd = 0.0f;
        for (int i = 0; i < GROUPS; i++) odd += m.odd[i][key];
        for (int i = 0; i < OWN; i++) {
            int r = group + GROUPS * i, h = g * share + (r0 + r) / queries;
            float slope, y = -infinity();
            if (r0 + r < rows && key < count) {
                Scores f = scores_of(mask ? mask + n * mask_n + h * mask_h : mask,
                                     bias ? bias + n * bias_n + h * bias_h : bias, 0, 0, cap,
                                     causal, shift, queries, keys, mask_t, mask_s, bias_t, bias_s);
                y = score(f, z[i] + odd, (r0 + r) % queries, s0 + key, &slope);
            }
            if (r < ROWS) m.p[r][key] = y;
        }
        __syncthreads();

        float high = top;
        if (row < ROWS) {
            for (int x = lane; x < KEYS; x += PER_ROW) {
                float y = m.p[row][x];
                high = y > high ? y : high;
            }
            m.part[row][lane] = high;
        }
        __syncthreads();
        if (row < ROWS) {
            for (int i = 0; i < PER_ROW; i++)
                high = m.part[row][i] > high ? m.part[row][i] : high;
            float safe = high > -infinity() ? high : 0.0f, sum = 0.0f;
            for (int x = lane; x < KEYS; x += PER_ROW) {
                float p = expf(m.p[row][x] - safe);
                m.p[row][x] = p;
                sum += p;
            }
            m.sum[row][lane] = sum;
            if (lane == 0) m.alpha[row] = expf(top - safe);
        }
        __syncthreads();
        if (row < ROWS) {
            total *= m.alpha[row];
            for (int i = 0; i < PER_ROW; i++) total += m.sum[row][i];
            top = high;
        }

        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < COLUMNS; c++) acc[r][c] *= m.alpha[r];
        for (int j = part; part < PARTS && j < count; j += PARTS) {
            float strange = 0.0f;
            for (int i = 0; i < GROUPS; i++) strange += m.odd[i][j];
            for (int c = 0; c < COLUMNS; c++) {
                int e = column + WIDTH * c;
                float x = strange == 0.0f && e < HEAD_E
                              ? wide(values[(long long)j * HEAD_E + e]) : 0.0f;
                for (int r = 0; r < ROWS; r++) acc[r][c] += m.p[r][j] * x;
            }
        }
        // no barrier: the first one of the next tile comes before p, odd and alpha are written again
    }

    for (int turn = 0; turn < PARTS; turn++) {
        for (int c = 0; c < COLUMNS; c++) {
            int e = column + WIDTH * c;
            for (int r = 0; r < ROWS; r++)
                if (part == turn && e < HEAD_E)
                    m.out[r][e] = turn ? m.out[r][e] + acc[r][c] : acc[r][c];
        }
        __syncthreads();
    }
    long long place = (head * portions + portion) * rows + r0;
    for (int at = thread; at < ROWS * HEAD_E; at += THREADS)
        if (r0 + at / HEAD_E < rows)
            parts[place * HEAD_E + at] = m.out[at / HEAD_E][at % HEAD_E];
    if (lane == 0 && row < ROWS && r0 + row < rows) {
        tops[place + row] = top;
        totals[place + row] = total;
    }
}

// One block a row: portions rescaled to the largest maximum of all, then added.
extern "C" __global__ void decode_combine(const float* tops, const float* totals,
                                          const float* parts, Number* out, float* lse,
                                          int portions, int rows) {
    long long head = blockIdx.x / rows, row = blockIdx.x % rows;
    long long place = head * portions * rows + row;
    float top = -infinity(), total = 0.0f;
    for (int i = 0; i < portions; i++) {
        float y = tops[place + (long long)i * rows];
        top = y > top ? y : top;
    }
    float safe = top > -infinity() ? top : 0.0f;
    for (int i = 0; i < portions; i++) {
        long long at = place + (long long)i * rows;
        total += expf(tops[at] - safe) * totals[at];
    }
    for (int e = threadIdx.x; e < HEAD_E; e += THREADS) {
        float sum = 0.0f;
        for (int i = 0; i < portions; i++) {
            long long at = place + (long long)i * rows;
            sum += expf(tops[at] - safe) * parts[at * HEAD_E + e];
        }
        out[(head * rows + row) * HEAD_E + e] = narrow(total != 0.0f ? sum / total : 0.0f);
    }
    if (threadIdx.x == 0) lse[head * rows + row] = safe + logf(total);
}
