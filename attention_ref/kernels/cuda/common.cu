// What the kernels share: how numbers are stored, and what turns q . k into a score.
//
// q, k, v, out, dout and the gradients of q, k, v are stored as Number: float, or 16 bits with
// -DFLOAT16 or -DBFLOAT16. wide() and narrow() convert, to nearest and ties to even. Everything
// that is summed, and lse, delta, bias and its gradient, is float32 in every case.

#if defined(FLOAT16)
struct Number {
    unsigned short bits;
};
#ifdef __CUDACC__
__device__ inline float wide(Number x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
__device__ inline Number narrow(float x) {
    Number y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
#else  // the one place where the CPU of the tests runs other text than the GPU
inline float wide(Number x) { return float_of_half(x.bits); }
inline Number narrow(float x) { return Number{half_of_float(x)}; }
#endif
#elif defined(BFLOAT16)
struct Number {
    unsigned short bits;
};
__device__ inline float wide(Number x) { return __int_as_float((int)((unsigned)x.bits << 16)); }
__device__ inline Number narrow(float x) {
    unsigned bits = (unsigned)__float_as_int(x);
    Number y;
    if (x != x)
        y.bits = (unsigned short)(bits >> 16 | 64);  // stays a NaN
    else
        y.bits = (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    return y;
}
#else
typedef float Number;
__device__ inline float wide(Number x) { return x; }
__device__ inline Number narrow(float x) { return x; }
#endif

__device__ inline float infinity() { return __int_as_float(0x7f800000); }
__device__ inline int smaller(int a, int b) { return a < b ? a : b; }
__device__ inline int larger(int a, int b) { return a > b ? a : b; }

// Everything that turns q . k into a score.
struct Scores {
    const unsigned char* mask;
    const float* bias;
    const int *low, *high;  // of every query; null: all keys
    float cap;
    int causal, shift, queries, keys;
    long long mask_t, mask_s, bias_t, bias_s;
};

// Softcap, bias, mask, interval, causality; slope = derivative of the softcap. -inf where unseen.
__device__ inline float score(const Scores& f, float z, int t, int s, float* slope) {
    *slope = 1.0f;
    bool live = t < f.queries && s < f.keys && (!f.causal || s <= t + f.shift);
    if (live && f.low) live = f.low[t] <= s && s < f.high[t];
    if (!live || (f.mask && !f.mask[t * f.mask_t + s * f.mask_s])) return -infinity();
    if (f.cap > 0.0f) {
        float y = tanhf(z / f.cap);
        z = f.cap * y;
        *slope = 1.0f - y * y;
    }
    if (f.bias) {
        float b = f.bias[t * f.bias_t + s * f.bias_s];
        z += b > 0.0f ? (b - b) + b : b;  // +inf becomes NaN and poisons its row
    }
    return z;
}

__device__ inline Scores scores_of(const unsigned char* mask, const float* bias, const int* low,
                                   const int* high, float cap, int causal, int shift, int queries,
                                   int keys, long long mask_t, long long mask_s, long long bias_t,
                                   long long bias_s) {
    Scores f;
    f.mask = mask, f.bias = bias, f.low = low, f.high = high;
    f.cap = cap, f.causal = causal, f.shift = shift;
    f.queries = queries, f.keys = keys;
    f.mask_t = mask_t, f.mask_s = mask_s, f.bias_t = bias_t, f.bias_s = bias_s;
    return f;
}
