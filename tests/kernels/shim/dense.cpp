// dense.cu for the CPU: its functions for ctypes in every storage, or with -DSHIM_MAIN a program that
// runs all kernels on odd sizes for ThreadSanitizer and AddressSanitizer, in the storage -DSTORE.
//
// The test writes dense.cu, what it includes put in and extern "C" taken out, into its own folder.

#include "cuda_shim.h"

namespace float32 {
#include "dense.cu"
}

#ifndef ONLY_FLOAT32
#define FLOAT16
namespace float16 {
#include "dense.cu"
}
#undef FLOAT16
#define BFLOAT16
namespace bfloat16 {
#include "dense.cu"
}
#undef BFLOAT16
#endif

#ifndef SHIM_MAIN

#define EXPORT(STORAGE, NAME)                                               \
    extern "C" void STORAGE##_##NAME(int blocks, void** arguments) {        \
        shim_launch(STORAGE::NAME, blocks, THREADS, arguments);             \
    }

#define EXPORT_ALL(STORAGE)                 \
    EXPORT(STORAGE, dense_forward)          \
    EXPORT(STORAGE, dense_backward_queries) \
    EXPORT(STORAGE, dense_backward_keys)

EXPORT_ALL(float32)
#ifndef ONLY_FLOAT32
EXPORT_ALL(float16)
EXPORT_ALL(bfloat16)

extern "C" void convert_float16(int count, const float* x, unsigned short* y, float* back) {
    for (int i = 0; i < count; i++) back[i] = wide(float16::Number{y[i] = half_of_float(x[i])});
}
extern "C" void convert_bfloat16(int count, const float* x, unsigned short* y, float* back) {
    for (int i = 0; i < count; i++) {
        y[i] = bfloat16::narrow(x[i]).bits;
        back[i] = wide(bfloat16::Number{y[i]});
    }
}
#endif

#else

#include <algorithm>
#include <cstdio>

#ifndef STORE
#define STORE float32
#endif

using namespace STORE;

static std::vector<float> numbers(int count, int seed) {
    std::vector<float> x(count);
    for (int i = 0; i < count; i++) x[i] = std::sin(1.7f * i + seed);
    return x;
}

static std::vector<Number> stored(int count, int seed) {
    std::vector<Number> x;
    for (float y : numbers(count, seed)) x.push_back(narrow(y));
    return x;
}

int main() {
    const int batch = 1, heads = 2, groups = 1, queries = TILE + 5, keys = TILE + 3;
    // exactly as long as needed, on the heap: one step outside is seen
    auto q = stored(batch * heads * queries * HEAD_D, 1);
    auto k = stored(batch * groups * keys * HEAD_D, 2);
    auto v = stored(batch * groups * keys * HEAD_E, 3);
    auto bias = numbers(queries * keys, 4);
    std::vector<unsigned char> mask(queries * keys);
    for (int i = 0; i < queries * keys; i++) mask[i] = i % 3 != 0;
    auto out = stored(batch * heads * queries * HEAD_E, 0), dout = stored(out.size(), 5);
    auto lse = numbers(batch * heads * queries, 0), delta = numbers(lse.size(), 6);
    auto dq = stored(q.size(), 0), dk = stored(k.size(), 0), dv = stored(v.size(), 0);
    auto dbias = numbers(batch * heads * queries * keys, 0);
    // a window that follows the diagonal, empty at the end, with the runs that contain it
    std::vector<int> low(queries), high(queries);
    for (int t = 0; t < queries; t++) {
        low[t] = std::min(t / 2, keys);
        high[t] = std::min(t / 2 + 9, keys - 2);
    }
    std::vector<int> first, last, other_first, other_last;
    for (int t = 0; t < queries; t += TILE) {
        first.push_back(low[t]);
        last.push_back(high[std::min(t + TILE, queries) - 1]);
    }
    for (int s = 0; s < keys; s += TILE) {
        int a = 0, b = queries;
        while (a < queries && high[a] <= s) a++;
        while (b > a && low[b - 1] >= s + TILE) b--;
        other_first.push_back(a);
        other_last.push_back(b);
    }
    const int causal = 1, shift = keys - queries, patterns = 1;
    auto common = [&](auto kernel, int blocks, auto... pointers) {
        int h = heads, g = groups, t = queries, s = keys, c = causal, d = shift, p = patterns;
        float scale = 0.5f, cap = 2.0f;
        long long none = 0, down = keys, right = 1;
        void* arguments[] = {&pointers..., &h, &g, &t, &s, &scale, &cap, &c, &d, &p, &none, &none,
                             &down, &right, &none, &none, &down, &right};
        shim_launch(kernel, blocks, THREADS, arguments);
    };
    const int rows = batch * heads * ((queries + TILE - 1) / TILE);
    const int columns = batch * groups * ((keys + TILE - 1) / TILE);
    common(dense_forward, rows, q.data(), k.data(), v.data(), mask.data(), bias.data(), low.data(),
           high.data(), first.data(), last.data(), out.data(), lse.data());
    for (auto& x : lse) x = x > -1e30f ? x : 1e30f;
    common(dense_backward_queries, rows, q.data(), k.data(), v.data(), mask.data(), bias.data(),
           low.data(), high.data(), first.data(), last.data(), dout.data(), lse.data(),
           delta.data(), dq.data(), dbias.data());
    common(dense_backward_keys, columns, q.data(), k.data(), v.data(), mask.data(), bias.data(),
           low.data(), high.data(), other_first.data(), other_last.data(), dout.data(), lse.data(),
           delta.data(), dk.data(), dv.data());
    float sum = 0.0f;
    for (Number x : dk) sum += wide(x);
    std::printf("finished %d\n", std::isfinite(sum));
}

#endif
