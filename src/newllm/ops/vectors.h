// Numbers and vectors of the kernels here: those of GCC and Clang, which become whatever instructions the machine has.

#pragma once

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "which half of a word is which number");

#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 16, BLOCK = 2 * LANES;
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));

struct bfloat16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(bfloat16 x) {  // the upper half of a float
    const uint32_t bits = uint32_t(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline void store(float* to, float x) { *to = x; }
inline void store(bfloat16* to, float x) {  // to the nearest, ties to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    to->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// A block of 32 numbers, as it lies in memory and as two vectors of floats. Of bfloat16 the first of the two holds the numbers
// at even places and the second those at odd ones: two instructions, where their order would take eight.
struct Two {
    floats a, b;
};
inline Two widen(Two x) { return x; }
inline Two widen(words x) { return {(floats)(x << 16), (floats)(x & 0xffff0000u)}; }

// To the nearest, ties to even; a NaN stays one. In the upper half of each word.
inline words rounded(floats x) {
    const words bits = (words)x;
    return x == x ? bits + 0x7fffu + ((bits >> 16) & 1u) : words{} + 0x7fc00000u;
}

// As bfloat16, in the order in which they were read.
inline words narrow(Two x) { return (rounded(x.a) >> 16) | (rounded(x.b) & 0xffff0000u); }

template <typename V>
inline V load(const void* from) {
    V x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

// e^x for x <= 0: 2^n times a polynomial of the rest.
inline floats exponential(floats x) {
    floats t = x * 1.44269504f;
    t = t < -126.f ? floats{} - 126.f : t;
    const ints n = __builtin_convertvector(t - 0.5f, ints);  // to the nearest
    const floats f = (t - __builtin_convertvector(n, floats)) * 0.693147181f;
    const floats p = 1.f / 120 + f * (1.f / 720);
    return (1.f + f * (1.f + f * (0.5f + f * (1.f / 6 + f * (1.f / 24 + f * p))))) * (floats)((n + 127) << 23);
}

}  // namespace
