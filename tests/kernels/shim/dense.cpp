// dense.cu for the CPU: three functions for ctypes, or with -DSHIM_MAIN a program that runs all
// kernels on odd sizes for ThreadSanitizer and AddressSanitizer.

#include "cuda_shim.h"
// the very text that the GPU runs
#include "dense.cu"

#define EXPORT(NAME)                                              \
    extern "C" void launch_##NAME(int blocks, void** arguments) { \
        shim_launch(NAME, blocks, THREADS, arguments);            \
    }

EXPORT(dense_forward)
EXPORT(dense_backward_queries)
EXPORT(dense_backward_keys)

#ifdef SHIM_MAIN

#include <algorithm>
#include <cstdio>

static std::vector<float> numbers(int count, int seed) {
    std::vector<float> x(count);
    for (int i = 0; i < count; i++) x[i] = std::sin(1.7f * i + seed);
    return x;
}

int main() {
    const int batch = 1, heads = 2, groups = 1, queries = 21, keys = 19;
    // exactly as long as needed, on the heap: one step outside is seen
    auto q = numbers(batch * heads * queries * HEAD_D, 1);
    auto k = numbers(batch * groups * keys * HEAD_D, 2);
    auto v = numbers(batch * groups * keys * HEAD_E, 3);
    auto bias = numbers(queries * keys, 4);
    std::vector<unsigned char> mask(queries * keys);
    for (int i = 0; i < queries * keys; i++) mask[i] = i % 3 != 0;
    auto out = numbers(batch * heads * queries * HEAD_E, 0), dout = numbers(out.size(), 5);
    auto lse = numbers(batch * heads * queries, 0), delta = numbers(lse.size(), 6);
    auto dq = numbers(q.size(), 0), dk = numbers(k.size(), 0), dv = numbers(v.size(), 0);
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
    for (float x : dk) sum += x;
    std::printf("finished %d\n", std::isfinite(sum));
}

#endif
