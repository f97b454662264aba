// decode.cu for the CPU: its functions for ctypes in every storage, or with -DSHIM_MAIN a program
// that runs both kernels on odd sizes for ThreadSanitizer and AddressSanitizer.
//
// The test writes decode.cu, what it includes put in and extern "C" taken out, into its own folder.

#include "cuda_shim.h"

namespace float32 {
#include "decode.cu"
}

#ifndef ONLY_FLOAT32
#define FLOAT16
namespace float16 {
#include "decode.cu"
}
#undef FLOAT16
#define BFLOAT16
namespace bfloat16 {
#include "decode.cu"
}
#undef BFLOAT16
#endif

#ifndef SHIM_MAIN

#define EXPORT(STORAGE, NAME)                                        \
    extern "C" void STORAGE##_##NAME(int blocks, void** arguments) { \
        shim_launch(STORAGE::NAME, blocks, THREADS, arguments);      \
    }

EXPORT(float32, decode_portion)
EXPORT(float32, decode_combine)
#ifndef ONLY_FLOAT32
EXPORT(float16, decode_portion)
EXPORT(float16, decode_combine)
EXPORT(bfloat16, decode_portion)
EXPORT(bfloat16, decode_combine)
#endif

#else

#include <cstdio>

using namespace float32;

static std::vector<float> numbers(int count, int seed) {
    std::vector<float> x(count);
    for (int i = 0; i < count; i++) x[i] = std::sin(1.7f * i + seed);
    return x;
}

int main() {
    int batch = 1, heads = 6, groups = 2, queries = 2, keys = 53, length = 2 * KEYS;
    int rows = heads / groups * queries, portions = (keys + length - 1) / length;
    int tiles = (rows + ROWS - 1) / ROWS, items = batch * groups * tiles * portions;
    // exactly as long as needed, on the heap: one step outside is seen
    auto q = numbers(batch * heads * queries * HEAD_D, 1);
    auto k = numbers(batch * groups * keys * HEAD_D, 2);
    auto v = numbers(batch * groups * keys * HEAD_E, 3);
    auto bias = numbers(queries * keys, 4);
    std::vector<unsigned char> mask(queries * keys);
    for (int i = 0; i < queries * keys; i++) mask[i] = i % 3 != 0;
    auto tops = numbers(batch * groups * portions * rows, 0), totals = tops;
    auto parts = numbers(tops.size() * HEAD_E, 0);
    auto out = numbers(batch * heads * queries * HEAD_E, 0);
    auto lse = numbers(batch * heads * queries, 0);
    auto arguments = [](auto&... x) { return std::vector<void*>{&x...}; };
    float *pq = q.data(), *pk = k.data(), *pv = v.data(), *pb = bias.data(), *pt = tops.data();
    float *ps = totals.data(), *pp = parts.data(), *po = out.data(), *pl = lse.data();
    unsigned char* pm = mask.data();
    int causal = 1, shift = keys - queries;
    float scale = 0.5f, cap = 2.0f;
    long long none = 0, down = keys, right = 1;
    shim_launch(decode_portion, items, THREADS,
                arguments(pq, pk, pv, pm, pb, pt, ps, pp, heads, groups, queries, keys, portions,
                          length, scale, cap, causal, shift, none, none, down, right, none, none,
                          down, right).data());
    shim_launch(decode_combine, batch * groups * rows, THREADS,
                arguments(pt, ps, pp, po, pl, portions, rows).data());
    float sum = 0.0f;
    for (float x : out) sum += x;
    std::printf("finished %d\n", std::isfinite(sum));
}

#endif
