// Decoding on a CPU: products of a few rows with a weight, and attention of one query a row to all that is cached.
//
// The work is reading. Every weight, key and value is read once, in the type and at the place it lies in, in the order of
// memory, and summed in float32. No sum depends on the number of threads or on the other rows of a batch.
//
// Keys and values may lie as codes with a scale for every 32 of them (ops/quantize.py): they are read as such, and become numbers
// in the registers.
//
// Instructions are what the compiler makes of vectors.h; the one exception is the dot product of bfloat16 numbers. Called by
// native.py; the twins are torch's own linear and `reference.attention`.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "vectors.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define UNROLL _Pragma("GCC unroll 16")

namespace {

template <int BITS>
struct Code {  // one of 8 bits, or two of 4
    uint8_t bits;
};
template <typename T>
constexpr int bits_of_code = 0;
template <int BITS>
constexpr int bits_of_code<Code<BITS>> = BITS;
template <typename T>
constexpr bool is_code = bits_of_code<T> != 0;

// What is multiplied with numbers of type T, and what becomes of them.
template <typename T>
using Whole = std::conditional_t<is_code<T>, float, T>;

template <typename T>
using Raw = std::conditional_t<std::is_same_v<T, bfloat16>, words, Two>;

inline void put(float* to, floats x) { std::memcpy(to, &x, sizeof x); }

// A vector of `size` numbers of type T, cut into blocks. If 32 does not divide it, the last block begins earlier and overlaps the
// one before, so that nothing behind the vector is read; where vectors may be shorter than a block (SHORT: keys or values are), each
// block is copied. Of codes a block is what has one scale, and the last one is shorter and copied.
template <typename T>
struct Blocks {
    int64_t size, count;
    explicit Blocks(int64_t size) : size(size), count((size + BLOCK - 1) / BLOCK) {}
    int64_t numbers() const { return count * BLOCK; }
    int64_t start(int64_t b) const { return is_code<T> || size < BLOCK || (b + 1) * BLOCK <= size ? b * BLOCK : size - BLOCK; }
    // Numbers and bytes of a block of codes.
    int codes(int64_t b) const { return int((b + 1) * BLOCK <= size ? BLOCK : size - b * BLOCK); }
    int bytes(int64_t b) const { return (codes(b) * bits_of_code<T> + 7) / 8; }
    // Where number i of block b comes to stand in the two vectors that it is read as.
    int place(int64_t b, int i) const {
        if constexpr (std::is_same_v<T, bfloat16>) return i % 2 * LANES + i / 2;
        if (bits_of_code<T> != 4 || i < bytes(b)) return i;
        return LANES + i - bytes(b);  // the upper halves of the bytes
    }
};

// A vector as it lies in memory, and block b of it.
template <typename T>
struct Vector {
    const T* at;
    template <bool SHORT>
    Raw<T> block(const Blocks<T>& blocks, int64_t b) const {
        if constexpr (SHORT) {
            T padded[BLOCK] = {};
            const int64_t numbers = blocks.size < BLOCK ? blocks.size : BLOCK;
            std::memcpy(padded, at + blocks.start(b), numbers * sizeof(T));
            return load<Raw<T>>(padded);
        }
        return load<Raw<T>>(at + blocks.start(b));
    }
};
template <int BITS>
struct Vector<Code<BITS>> {
    const Code<BITS>* at;
    const uint16_t* scales;
    typedef uint8_t half __attribute__((vector_size(LANES)));  // of a block
    template <bool>
    Two block(const Blocks<Code<BITS>>& blocks, int64_t b) const {
        const Code<BITS>* from = at + b * (BLOCK * BITS / 8);
        Code<BITS> padded[BLOCK * BITS / 8];
        if (blocks.codes(b) < BLOCK) {
            std::memset(padded, 0, sizeof padded);
            std::memcpy(padded, from, blocks.bytes(b));
            from = padded;
        }
        // Without signs: a code that comes out of memory as it is, GCC takes out of the vector by itself, and so each of them.
        constexpr uint8_t ZERO = 1 << (BITS - 1);
        const half x = load<half>(from);
        half low, high;
        if constexpr (BITS == 8) low = x ^ ZERO, high = load<half>(from + LANES) ^ ZERO;
        else low = x & uint8_t(15), high = x >> 4;
        const float scale = float16(scales[b]);
        return {wide(low) * scale - ZERO * scale, wide(high) * scale - ZERO * scale};
    }
    static floats wide(half x) { return __builtin_convertvector(__builtin_convertvector(x, ints), floats); }
    // A float16 that is not negative, as scales are: its exponent counts from elsewhere. What was no number stays none.
    static float float16(uint16_t bits) {
        const uint32_t shifted = uint32_t(bits) << 13;
        float x;
        std::memcpy(&x, &shifted, sizeof x);
        return bits < 0x7c00 ? x * 0x1p112f : NAN;
    }
};

// One operand of a dot product is prepared once: `Query` is what its numbers become.
#ifdef __AVX512BF16__
template <typename T>
using Query = Whole<T>;
#else
template <typename T>
using Query = float;
#endif

inline floats add_product(floats sum, const float* q, Two key) {
    return sum + load<floats>(q) * key.a + load<floats>(q + LANES) * key.b;
}
inline floats add_product(floats sum, const float* q, words key) { return add_product(sum, q, widen(key)); }
#ifdef __AVX512BF16__
inline floats add_product(floats sum, const bfloat16* q, words key) {
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)load<words>(q), (__m512bh)key);
}
#endif

// x in the order in which blocks of T are read; what the last block has in common with the one before counts once.
template <typename T>
void prepare(const Whole<T>* x, const Blocks<T>& blocks, Query<T>* to) {
    for (int64_t b = 0; b < blocks.count; b++) {
        std::fill(to + b * BLOCK, to + (b + 1) * BLOCK, Query<T>{});
        for (int i = 0; i < BLOCK; i++) {
            const int64_t at = blocks.start(b) + i;
            if (at < b * BLOCK || at >= blocks.size) continue;
            if constexpr (std::is_same_v<Query<T>, bfloat16>) to[b * BLOCK + i] = x[at];
            else to[b * BLOCK + blocks.place(b, i)] = widen(x[at]);
        }
    }
}

// The sums of eight vectors, as the first eight lanes of one.
inline floats halve(floats a, floats b) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
inline floats sums(const floats x[8]) {
    const floats s = halve(halve(halve(x[0], x[1]), halve(x[2], x[3])), halve(halve(x[4], x[5]), halve(x[6], x[7])));
    return halve(s, s);
}

// How many others are multiplied with R vectors in one call: at least eight sums, which are then made together.
constexpr int others(int R) { return R == 8 ? 2 : 8 / R; }

// to[r * stride + i] = q_r · keys[i], for R prepared vectors, one behind the other, and others(R) more.
template <typename T, int R, bool SHORT>
inline void products(const Query<T>* q, const Vector<T>* keys, const Blocks<T>& blocks, float* to, int64_t stride) {
    // Memory is quickest when it is read in its order, so one after the other; but two at a time share eight vectors.
    constexpr int TOGETHER = others(R), SIDE = R == 8 ? 2 : 1;
    const int64_t width = blocks.numbers();
    floats all[TOGETHER * R];
    UNROLL for (int i = 0; i < TOGETHER; i += SIDE) {
        floats sum[SIDE][R] = {};
        for (int64_t b = 0; b < blocks.count; b++) {
            Raw<T> key[SIDE];
            UNROLL for (int s = 0; s < SIDE; s++) key[s] = keys[i + s].template block<SHORT>(blocks, b);
            UNROLL for (int r = 0; r < R; r++)
                UNROLL for (int s = 0; s < SIDE; s++) sum[s][r] = add_product(sum[s][r], q + r * width + b * BLOCK, key[s]);
        }
        UNROLL for (int s = 0; s < SIDE; s++)
            UNROLL for (int r = 0; r < R; r++) all[(i + s) * R + r] = sum[s][r];
    }
    UNROLL for (int part = 0; part < TOGETHER * R; part += 8) {
        const floats total = sums(all + part);
        UNROLL for (int n = 0; n < 8; n++) to[(part + n) % R * stride + (part + n) / R] = total[n];
    }
}

// f(R, done) for R = 8, 4, 2 or 1 of `count` that are not done, until all are.
template <typename F>
inline void in_groups(int64_t count, const F& f) {
    for (int64_t done = 0; done < count;) {
        const int64_t left = count - done;
        if (left >= 8) f(std::integral_constant<int, 8>(), done), done += 8;
        else if (left >= 4) f(std::integral_constant<int, 4>(), done), done += 4;
        else if (left >= 2) f(std::integral_constant<int, 2>(), done), done += 2;
        else f(std::integral_constant<int, 1>(), done), done += 1;
    }
}

// ---- out (M, N) = x (M, K) · w (N, K)ᵀ + bias (N,)

template <typename T, bool SHORT>
void linear(const T* x, int64_t M, int64_t K, const T* w, const T* bias, int64_t N, T* out, int threads) {
    constexpr int ROWS = 8;  // of the weight: for the second group of x they are still in the core's own cache
    const Blocks<T> blocks(K);
    std::vector<Query<T>> q(M * blocks.numbers());
    for (int64_t m = 0; m < M; m++) prepare(x + m * K, blocks, q.data() + m * blocks.numbers());
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t n = 0; n < N; n += ROWS) {
        Vector<T> rows[ROWS];
        for (int i = 0; i < ROWS; i++) rows[i].at = w + (n + i < N ? n + i : N - 1) * K;
        in_groups(M, [&](auto R, int64_t m) {
            float y[R * ROWS];
            for (int i = 0; i < ROWS; i += others(R))
                products<T, R, SHORT>(q.data() + m * blocks.numbers(), rows + i, blocks, y + i, ROWS);
            for (int r = 0; r < R; r++)
                for (int i = 0; i < ROWS && n + i < N; i++)
                    store(out + (m + r) * N + n + i, y[r * ROWS + i] + (bias ? widen(bias[n + i]) : 0.f));
        });
    }
}

// ---- attention of one query in each row

// Keys or values (B, Hk, S, ·) with strides: in numbers, of codes in bytes; and their scales (B, Hk, S, ·), or null.
struct Stored {
    const void* numbers;
    const uint16_t* scales;
    int64_t row, head, token, scales_row, scales_head, scales_token;
};

struct Attention {
    const void* q;  // (B, H, d) without gaps
    Stored k, v;
    const float* slopes;     // (H,), or null
    const float* distances;  // (B, S) without gaps, of the query and each token, negative where it is not seen; null: S - 1 - j
    void* out;               // (B, H, dv) without gaps
    int64_t B, H, Hk, S, d, dv;
    int64_t first;  // tokens before this one are not seen
    float scale;
};

// The vectors of one head of one row, by their token.
template <typename T>
struct Tokens {
    Vector<T> first;
    int64_t token, scales_token;
    Tokens(const Stored& x, int64_t row, int64_t head) : token(x.token), scales_token(x.scales_token) {
        first.at = (const T*)x.numbers + row * x.row + head * x.head;
        if constexpr (is_code<T>) first.scales = x.scales + row * x.scales_row + head * x.scales_head;
    }
    Vector<T> operator[](int64_t t) const {
        Vector<T> one = first;
        one.at += t * token;
        if constexpr (is_code<T>) one.scales += t * scales_token;
        return one;
    }
};

constexpr int TOKENS = 64;   // whose scores are known before their values are read
constexpr int PIECE = 256;  // tokens of a task; not a matter of threads or rows, so that sums are not either

// Adds to WIDE blocks of R vectors `mixed` the values of n tokens from the given one on, weighted.
template <typename T, int R, int WIDE, bool SHORT>
inline void mix(const float (*w)[TOKENS], const Tokens<T>& v, int64_t from, int n, const Blocks<T>& blocks, int64_t b, float* mixed) {
    const int64_t width = blocks.numbers();
    Two sum[R][WIDE];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int i = 0; i < WIDE; i++) sum[r][i] = load<Two>(mixed + r * width + (b + i) * BLOCK);
    for (int t = 0; t < n; t++)
        UNROLL for (int i = 0; i < WIDE; i++) {
            const Two value = widen(v[from + t].template block<SHORT>(blocks, b + i));
            UNROLL for (int r = 0; r < R; r++) {
                sum[r][i].a += w[r][t] * value.a;
                sum[r][i].b += w[r][t] * value.b;
            }
        }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int i = 0; i < WIDE; i++) {
            put(mixed + r * width + (b + i) * BLOCK, sum[r][i].a);
            put(mixed + r * width + (b + i) * BLOCK + LANES, sum[r][i].b);
        }
}

// R query heads of one key head over tokens [from, to). Of each: the highest score, Σ e^(score − highest), and that sum
// weighted with the values.
template <typename T, int R, bool SHORT>
void attend(const Attention& a, const Query<T>* q, const Tokens<T>& k, const Tokens<T>& v, const float* slopes, const float* distances,
            int64_t from, int64_t to, float* highest, float* total, float* mixed) {
    constexpr int TOGETHER = others(R);
    constexpr int ROWS = R < 4 ? R : 4, WIDE = 2;  // vectors that fit the registers
    const Blocks<T> keys(a.d), values(a.dv);
    const int64_t width = values.numbers();
    alignas(64) float w[R][TOKENS], far[TOKENS];
    for (int r = 0; r < R; r++) highest[r] = -INFINITY, total[r] = 0.f;
    std::memset(mixed, 0, R * width * sizeof(float));
    for (int64_t j = from; j < to; j += TOKENS) {
        const int n = int(to - j < TOKENS ? to - j : TOKENS);
        for (int t = 0; t < n; t += TOGETHER) {
            Vector<T> some[TOGETHER];
            for (int i = 0; i < TOGETHER; i++) some[i] = k[j + (t + i < n ? t + i : n - 1)];
            products<T, R, SHORT>(q, some, keys, &w[0][t], TOKENS);
        }
        for (int t = 0; t < TOKENS; t++) far[t] = t >= n ? -1.f : distances ? distances[j + t] : float(a.S - 1 - j - t);
        for (int r = 0; r < R; r++) {
            const float slope = slopes ? slopes[r] : 0.f;
            for (int t = 0; t < TOKENS; t += LANES) {
                const floats distance = load<floats>(far + t);
                put(w[r] + t, distance < 0.f ? floats{} - INFINITY : load<floats>(w[r] + t) * a.scale - slope * distance);
            }
            float high = highest[r];
            for (int t = 0; t < TOKENS; t++) high = w[r][t] > high ? w[r][t] : high;
            const float fade = high == -INFINITY ? 1.f : std::exp(highest[r] - high);
            floats sum = {};
            for (int t = 0; t < TOKENS; t += LANES) {
                const floats s = load<floats>(w[r] + t);
                const floats e = s == -INFINITY ? floats{} : exponential(s - high);
                put(w[r] + t, e);
                sum += e;
            }
            total[r] *= fade;
            for (int i = 0; i < LANES; i++) total[r] += sum[i];
            highest[r] = high;
            if (fade != 1.f)
                for (int64_t c = 0; c < width; c++) mixed[r * width + c] *= fade;
        }
        for (int r = 0; r < R; r += ROWS) {
            int64_t b = 0;
            for (; b + WIDE <= values.count; b += WIDE)
                mix<T, ROWS, WIDE, SHORT>(w + r, v, j, n, values, b, mixed + r * width);
            if (b < values.count) mix<T, ROWS, 1, SHORT>(w + r, v, j, n, values, b, mixed + r * width);
        }
    }
}

template <typename T, bool SHORT>
void attention(const Attention& a, int threads) {
    const Blocks<T> keys(a.d), values(a.dv);
    const int64_t G = a.H / a.Hk, heads = a.B * a.H, width = values.numbers();
    const int64_t pieces = (a.S - a.first + PIECE - 1) / PIECE;
    std::vector<Query<T>> q(heads * keys.numbers());
    for (int64_t h = 0; h < heads; h++) prepare((const Whole<T>*)a.q + h * a.d, keys, q.data() + h * keys.numbers());
    std::vector<float> highest(pieces * heads), total(pieces * heads), mixed(pieces * heads * width);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t task = 0; task < a.B * a.Hk * pieces; task++) {
        const int64_t p = task % pieces, head = task / pieces % a.Hk, row = task / pieces / a.Hk;
        const int64_t from = a.first + p * PIECE, to = from + PIECE < a.S ? from + PIECE : a.S;
        const Tokens<T> k(a.k, row, head), v(a.v, row, head);
        in_groups(G, [&](auto R, int64_t g) {
            const int64_t h = row * a.H + head * G + g, at = p * heads + h;
            attend<T, R, SHORT>(a, q.data() + h * keys.numbers(), k, v, a.slopes ? a.slopes + head * G + g : nullptr,
                                a.distances ? a.distances + row * a.S : nullptr, from, to, &highest[at], &total[at], &mixed[at * width]);
        });
    }
    std::vector<float> y(width);
    for (int64_t h = 0; h < heads; h++) {
        float high = -INFINITY, sum = 0.f;
        for (int64_t p = 0; p < pieces; p++) high = highest[p * heads + h] > high ? highest[p * heads + h] : high;
        std::fill(y.begin(), y.end(), 0.f);
        for (int64_t p = 0; p < pieces; p++) {
            const int64_t at = p * heads + h;
            const float share = std::exp(highest[at] - high);
            sum += share * total[at];
            for (int64_t c = 0; c < width; c++) y[c] += share * mixed[at * width + c];
        }
        for (int64_t b = 0; b < values.count; b++)
            for (int i = 0; i < BLOCK && values.start(b) + i < a.dv; i++)
                store((Whole<T>*)a.out + h * a.dv + values.start(b) + i, y[b * BLOCK + values.place(b, i)] / sum);
    }
}

template <typename T>
void linear(const void* x, int64_t M, int64_t K, const void* w, const void* bias, int64_t N, void* out, int threads) {
    const auto f = K < BLOCK ? linear<T, true> : linear<T, false>;
    f((const T*)x, M, K, (const T*)w, (const T*)bias, N, (T*)out, threads);
}

template <typename T>
void attention(const Attention& a, int threads) {
    const auto f = !is_code<T> && (a.d < BLOCK || a.dv < BLOCK) ? attention<T, !is_code<T>> : attention<T, false>;
    f(a, threads);
}

}  // namespace

extern "C" {

void newllm_linear(int is_bfloat16, const void* x, int64_t M, int64_t K, const void* w, const void* bias, int64_t N, void* out,
                   int threads) {
    (is_bfloat16 ? linear<bfloat16> : linear<float>)(x, M, K, w, bias, N, out, threads);
}

// `bits` of a number of keys and values: 32 and 16 are floats and bfloat16, and those of query and result; 8 and 4 are codes, and
// query and result are floats.
void newllm_attention(int bits, const Attention* arguments, int threads) {
    const auto f = bits == 32   ? attention<float>
                   : bits == 16 ? attention<bfloat16>
                   : bits == 8  ? attention<Code<8>>
                                : attention<Code<4>>;
    f(*arguments, threads);
}
}
