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
