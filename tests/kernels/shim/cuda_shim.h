// Runs a CUDA kernel on the CPU: one std::thread a CUDA thread, blocks one after another.
//
// Covers threadIdx.x, blockIdx.x, __shared__ (a static: only one block runs at a time) and
// __syncthreads (a std::barrier). Not covered: warps, tensor cores, the weak memory model, timing.
// Needs C++20. Define SHIM_NO_SYNC for the broken twin in which __syncthreads does nothing.

#pragma once

#include <barrier>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static

struct ShimIndex {
    unsigned x = 0;
};

inline thread_local ShimIndex threadIdx, blockIdx;
inline std::barrier<>* shim_barrier = nullptr;

inline void __syncthreads() {
#ifndef SHIM_NO_SYNC
    shim_barrier->arrive_and_wait();
#endif
}

inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }

// float16 as the GPU converts it: exactly to float, to nearest and ties to even from float.
inline float float_of_half(unsigned short bits) {
    int exponent = bits >> 10 & 31, digits = bits & 1023;
    float x = exponent == 31  ? (digits ? NAN : INFINITY)
              : exponent == 0 ? std::ldexp((float)digits, -24)
                              : std::ldexp((float)(1024 + digits), exponent - 25);
    return bits >> 15 ? -x : x;
}

inline unsigned short half_of_float(float x) {
    unsigned short sign = std::signbit(x) ? 0x8000 : 0;
    if (x != x) return 0x7fff;
    x = std::fabs(x);
    if (x >= 65520.0f) return sign | 0x7c00;  // half way to the number behind the largest
    int exponent = x >= 0x1p-14f ? std::ilogb(x) : -14;  // below, the subnormal numbers
    int digits = (int)std::nearbyint(std::ldexp(x, 10 - exponent));  // ties to even
    return sign | (unsigned short)(((exponent + 14) << 10) + digits);  // 2048 carries over
}

// Call kernel(*arguments...) in ``blocks`` blocks of ``threads``; arguments are pointers, as in
// cuLaunchKernel.
template <class... P>
void shim_launch(void (*kernel)(P...), int blocks, int threads, void** arguments) {
    std::barrier<> inside(threads), between(threads);
    shim_barrier = &inside;
    auto call = [&]<std::size_t... I>(std::index_sequence<I...>) {
        kernel(*static_cast<P*>(arguments[I])...);
    };
    auto run = [&](int thread) {
        threadIdx.x = thread;
        for (int block = 0; block < blocks; block++) {
            blockIdx.x = block;
            call(std::index_sequence_for<P...>{});
            between.arrive_and_wait();  // the next block uses the same shared memory
        }
    };
    std::vector<std::thread> team;
    for (int thread = 0; thread < threads; thread++) team.emplace_back(run, thread);
    for (auto& thread : team) thread.join();
}
