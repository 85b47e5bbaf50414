// Causal attention of many queries in bfloat16 on a CPU, forwards and backwards.
//
// All is in tiles of sixteen rows of sixteen words, what the tile registers of AMX hold: a word is a float, or a pair of bfloat16
// numbers that are multiplied and summed together. Scores and weights of the softmax are floats, and stand with a key in each row and
// a query in each column, so that what belongs to a query (its maximum, its sum, its gradient) is a vector and no sum crosses lanes.
//
// Two orders of numbers run through the file. Where a product sums over tokens, tokens w and w + 16 of 32 make a pair. Where
// its result has columns for 32 numbers of a head, sixteen at even places stand in one tile and those at odd places in the next, as
// `Two` has them. Both ways of putting two rows together are then two instructions, `lower` and `upper`.
//
// Only pairs of blocks of 32 queries and 32 keys that see each other are computed. Threads share the heads of keys in all rows; forwards,
// where these are fewer than threads, also the queries of one. No result depends on the number of threads.
// Called by tile_attention.py; the twin is `reference.attention`. The algorithm is FlashAttention-2's (arXiv 2307.08691, § 3), except
// that what is summed over all keys of a query is kept for one block of queries, and so computed once.

#include <algorithm>
#include <cmath>
#include <memory>

#include "vectors.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

struct Strides {
    int64_t row, head, token;
    template <typename T>
    T* at(T* from, int64_t b, int64_t h, int64_t t = 0) const {
        return from + b * row + h * head + t * token;
    }
};

// All in bfloat16 but `normalisers`, the logarithms of the sums of the softmax (B, H, T), and `slopes` (H) or null. Heads of keys and
// values: `key_heads`. The queries are the last T of S tokens; each sees `window` tokens, itself included.
struct Attention {
    const bfloat16 *q, *k, *v;
    bfloat16* mixed;
    float* normalisers;
    const float* slopes;
    Strides q_strides, k_strides, v_strides, mixed_strides;
    int64_t B, H, key_heads, T, S, d, dv, window;
    float scale;
};

struct Gradients {
    const bfloat16* mixed;
    bfloat16 *q, *k, *v;
    Strides mixed_strides, q_strides, k_strides, v_strides;
};

constexpr int64_t SIDE = 32;  // tokens, or numbers of a head, of a block: two tiles
// Blocks of queries that go through the backward together. All their weights are in memory at once; and with fewer the gradients of keys
// and values, which are there too, are read and written more often.
constexpr int64_t QUERIES = 4;

struct alignas(64) Tile {
    words rows[LANES];
};
using Tiles = std::unique_ptr<Tile[]>;
inline Tiles tiles(int64_t count) { return Tiles(new Tile[size_t(count)]); }
inline int64_t blocks(int64_t size) { return (size + SIDE - 1) / SIDE; }

inline words lower(words a, words b) { return (a & 0xffffu) | (b << 16); }
inline words upper(words a, words b) { return (a >> 16) | (b & 0xffff0000u); }

#if defined(__AMX_BF16__)
// Each thread says how its tile registers are cut, and gives them back empty: oneDNN sets them for each product of its own.
struct alignas(64) TileConfig {
    uint8_t bytes[64] = {};
};
struct Registers {
    Registers() {
        TileConfig ours;
        ours.bytes[0] = 1;
        for (int i = 0; i < 8; i++) ours.bytes[16 + 2 * i] = 64, ours.bytes[48 + i] = LANES;
        _tile_loadconfig(&ours);
    }
    ~Registers() { _tile_release(); }
};
#else
struct Registers {
    Registers() {}
};
#endif

// Two by two tiles `sums` (+)= the product of a0, a1 (one below the other) and b0, b1 (side by side), each a row of `count` tiles
// that are `a_step` and `b_step` apart.
template <bool ADD>
inline void multiply(Tile* sums, const Tile* a0, const Tile* a1, int64_t a_step, const Tile* b0, const Tile* b1, int64_t b_step, int64_t count) {
#if defined(__AMX_BF16__)
    asm volatile("" ::: "memory");  // GCC does not know that _tile_loadd reads what has been written before
    if (ADD) {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + 1, 64);
        _tile_loadd(2, sums + 2, 64);
        _tile_loadd(3, sums + 3, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t i = 0; i < count; i++) {
        _tile_loadd(4, a0 + i * a_step, 64);
        _tile_loadd(5, a1 + i * a_step, 64);
        _tile_loadd(6, b0 + i * b_step, 64);
        _tile_loadd(7, b1 + i * b_step, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 1, 64);
    _tile_stored(2, sums + 2, 64);
    _tile_stored(3, sums + 3, 64);
#else
    for (int part = 0; part < 4; part++) {
        const Tile *a = part < 2 ? a0 : a1, *b = part % 2 ? b1 : b0;
        floats sum[LANES];
        for (int row = 0; row < LANES; row++) sum[row] = ADD ? (floats)sums[part].rows[row] : floats{};
        for (int64_t i = 0; i < count; i++)
            for (int pair = 0; pair < LANES; pair++) {
                const words right = b[i * b_step].rows[pair];
#pragma GCC unroll 16
                for (int row = 0; row < LANES; row++) {
                    const uint32_t left = a[i * a_step].rows[row][pair];
#if defined(__AVX512BF16__)
                    sum[row] = (floats)_mm512_dpbf16_ps((__m512)sum[row], (__m512bh)(words{} + left), (__m512bh)right);
#else
                    const Two x = widen(words{} + left), y = widen(right);
                    sum[row] += x.a * y.a + x.b * y.b;
#endif
                }
            }
        for (int row = 0; row < LANES; row++) sums[part].rows[row] = (words)sum[row];
    }
#endif
}

// Rows and columns change places: numbers whose row or column has the bit DISTANCE, and the other not.
template <int DISTANCE>
inline void exchange(Tile& x) {
#define LOW(l) (l & DISTANCE ? LANES + l - DISTANCE : l)
#define HIGH(l) (l & DISTANCE ? LANES + l : l + DISTANCE)
#define ALL(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
#pragma GCC unroll 16
    for (int row = 0; row < LANES; row++)
        if (!(row & DISTANCE)) {
            const words a = x.rows[row], b = x.rows[row + DISTANCE];
            x.rows[row] = __builtin_shufflevector(a, b, ALL(LOW));
            x.rows[row + DISTANCE] = __builtin_shufflevector(a, b, ALL(HIGH));
        }
#undef LOW
#undef HIGH
#undef ALL
}
inline Tile transposed(Tile x) {
    exchange<8>(x), exchange<4>(x), exchange<2>(x), exchange<1>(x);
    return x;
}

// Sixteen tokens from the first on, 32 numbers of each: a tile with a token in each row; 0 where there are none.
inline Tile rows(const bfloat16* from, int64_t stride, int64_t tokens, int64_t numbers) {
    Tile x;
    if (tokens >= LANES && numbers >= SIDE) {
        for (int row = 0; row < LANES; row++) x.rows[row] = load<words>(from + row * stride);
    } else {
        x = Tile{};
        for (int64_t row = 0; row < std::min<int64_t>(tokens, LANES); row++)
            std::memcpy(&x.rows[row], from + row * stride, size_t(std::min(numbers, SIDE)) * sizeof *from);
    }
    return x;
}

// N vectors of `size` numbers, as the four kinds of operands. Block (n, c) has 32 tokens and 32 numbers of each.
struct Operands {
    int64_t N, size;
    int64_t tokens() const { return blocks(N); }
    int64_t columns() const { return blocks(size); }

    // Block by block of tokens: for each 32 numbers two tiles.
    // A left operand that sums over the numbers: tokens 0 to 15 of the block, and 16 to 31.
    void left(Tile* to, const bfloat16* from, int64_t stride) const {
        each(from, stride, [=](int64_t block, const Tile& first, const Tile& second) { to[2 * block] = first, to[2 * block + 1] = second; });
    }
    // A right one: pairs of numbers in rows, and these tokens in columns.
    void right(Tile* to, const bfloat16* from, int64_t stride) const {
        each(from, stride, [=](int64_t block, const Tile& first, const Tile& second) {
            to[2 * block] = transposed(first), to[2 * block + 1] = transposed(second);
        });
    }
    // A right one that sums over the tokens: pairs of tokens in rows; columns for the numbers at even places, and at odd ones.
    void right_over_tokens(Tile* to, const bfloat16* from, int64_t stride) const {
        each(from, stride, [=](int64_t block, const Tile& first, const Tile& second) { interleave(to + 2 * block, first, second); });
    }
    // A left one that does: rows for the numbers at even places, and at odd ones.
    void left_over_tokens(Tile* to, const bfloat16* from, int64_t stride) const {
        each(from, stride, [=](int64_t block, const Tile& first, const Tile& second) {
            interleave(to + 2 * block, transposed(first), transposed(second));
        });
    }

   private:
    static void interleave(Tile* to, const Tile& first, const Tile& second) {
        for (int row = 0; row < LANES; row++) {
            to[0].rows[row] = lower(first.rows[row], second.rows[row]);
            to[1].rows[row] = upper(first.rows[row], second.rows[row]);
        }
    }
    template <typename F>
    void each(const bfloat16* from, int64_t stride, F f) const {
        for (int64_t n = 0; n < tokens(); n++)
            for (int64_t c = 0; c < columns(); c++) {
                const bfloat16* at = from + n * SIDE * stride + c * SIDE;
                const int64_t remaining = N - n * SIDE, numbers = size - c * SIDE;
                f(n * columns() + c, rows(at, stride, remaining, numbers),
                  remaining > LANES ? rows(at + LANES * stride, stride, remaining - LANES, numbers) : Tile{});
            }
    }
};

// Floats for 16 numbers at even places and 16 at odd ones, times `factor`, to the first `count` of these numbers in memory.
inline void put(bfloat16* to, words even, words odd, float factor, int64_t count) {
    const words pairs = narrow({(floats)even * factor, (floats)odd * factor});
    std::memcpy(to, &pairs, size_t(std::min(count, SIDE)) * sizeof *to);
}

// Two by two tiles with rows for numbers and columns for tokens, to the first `count` numbers of `tokens` tokens; each has its factor.
inline void unfold(bfloat16* to, int64_t stride, const Tile* sums, int64_t tokens, Two factors, int64_t count) {
    for (int half = 0; half < 2; half++) {
        const Tile even = transposed(sums[half]), odd = transposed(sums[2 + half]);
        const floats factor = half ? factors.b : factors.a;
        for (int row = 0; row < LANES && half * LANES + row < tokens; row++)
            put(to + (half * LANES + row) * stride, even.rows[row], odd.rows[row], factor[row], count);
    }
}

// What one head of queries sees.
struct View {
    const Attention& a;
    float slope;
    View(const Attention& a, int64_t head) : a(a), slope(a.slopes ? a.slopes[head] : 0.f) {}

    int64_t token(int64_t query_block) const { return a.S - a.T + query_block * SIDE; }
    // The blocks of keys that a block of queries sees: from the first to before the last.
    int64_t first(int64_t query_block) const { return std::max<int64_t>(0, token(query_block) - a.window + 1) / SIDE; }
    int64_t last(int64_t query_block) const { return std::min(blocks(a.S), (token(query_block) + SIDE - 1) / SIDE + 1); }

    // Calls f(key's row of the two by two tiles, half of the queries, what is added to the scores, which of them are seen).
    template <typename F>
    void each(int64_t query_block, int64_t key_block, F f) const {
        const int64_t i = token(query_block), j = key_block * SIDE;
        const bool whole = j + SIDE - 1 <= i && i + SIDE - 1 - j < a.window;
        ints lane{};
        for (int l = 0; l < LANES; l++) lane[l] = l;
        for (int half = 0; half < 2; half++)
            for (int row = 0; row < int(SIDE); row++) {
                const ints distance = lane + int32_t(i - j + half * LANES - row);
                const ints seen = whole ? ints{} - 1 : (distance >= 0) & (distance < int32_t(std::min<int64_t>(a.window, INT32_MAX)));
                f(row, half, __builtin_convertvector(distance, floats) * -slope, seen);
            }
    }
};

// Row `row` of 32 in the left or right half of two by two tiles.
inline words& at(Tile* block, int row, int half) { return block[row / LANES * 2 + half].rows[row % LANES]; }

inline words only(ints seen, floats x) { return (words)seen & (words)x; }

// The queries of one block, the results of which are computed here.
void mix(const View& view, const Operands& keys, const Operands& values, int64_t block, const Tile* query, const Tile* left_keys,
         const Tile* left_values, Tile* scores, Tile* weights, bfloat16* mixed, float* normalisers) {
    const Attention& a = view.a;
    const int64_t first = view.first(block), last = view.last(block), dims = keys.columns();
    floats highest[2] = {floats{} - INFINITY, floats{} - INFINITY}, sums[2] = {};
    for (int64_t n = first; n < last; n++) {
        Tile* s = scores + 4 * (n - first);
        const Tile* k = left_keys + n * dims * 2;
        multiply<false>(s, k, k + 1, 2, query, query + 1, 2, dims);
        view.each(block, n, [&](int row, int half, floats bias, ints seen) {
            const floats score = (floats)at(s, row, half) * a.scale + bias;
            at(s, row, half) = (words)score;
            highest[half] = (seen != 0) & (score > highest[half]) ? score : highest[half];
        });
    }
    for (int64_t n = first; n < last; n++) {
        Tile* s = scores + 4 * (n - first);
        Tile* w = weights + 2 * (n - first);
        view.each(block, n, [&](int row, int half, floats, ints seen) {
            const floats weight = (floats)only(seen, exponential((floats)at(s, row, half) - highest[half]));
            sums[half] += weight;
            at(s, row, half) = (words)weight;
        });
        for (int half = 0; half < 2; half++)
            for (int row = 0; row < LANES; row++)
                w[half].rows[row] = narrow({(floats)at(s, row, half), (floats)at(s, row + LANES, half)});
    }
    const int64_t remaining = std::min(SIDE, a.T - block * SIDE);
    for (int64_t c = 0; c < values.columns(); c++) {
        Tile sum[4];
        const Tile* v = left_values + (first * values.columns() + c) * 2;
        multiply<false>(sum, v, v + 1, 2 * values.columns(), weights, weights + 1, 2, last - first);
        unfold(mixed + c * SIDE, a.mixed_strides.token, sum, remaining, {1.f / sums[0], 1.f / sums[1]}, a.dv - c * SIDE);
    }
    for (int64_t t = 0; t < remaining; t++) normalisers[t] = highest[t / LANES][t % LANES] + std::log(sums[t / LANES][t % LANES]);
}

void forwards(const Attention& a, int threads) {
    const int64_t group = a.H / a.key_heads, query_blocks = blocks(a.T), key_blocks = blocks(a.S);
    // Where there are few heads of keys, several threads take queries of one, each with tiles of its own.
    const int64_t parts = std::min(group * query_blocks, (threads + a.B * a.key_heads - 1) / (a.B * a.key_heads));
    const Operands keys{a.S, a.d}, values{a.S, a.dv};
#pragma omp parallel num_threads(threads)
    {
        const Registers registers;
        const Tiles left_keys = tiles(key_blocks * keys.columns() * 2), left_values = tiles(key_blocks * values.columns() * 2);
        const Tiles query = tiles(keys.columns() * 2), scores = tiles(key_blocks * 4), weights = tiles(key_blocks * 2);
#pragma omp for schedule(static)
        for (int64_t item = 0; item < a.B * a.key_heads * parts; item++) {
            const int64_t row = item / parts / a.key_heads, key_head = item / parts % a.key_heads;
            keys.left(left_keys.get(), a.k_strides.at(a.k, row, key_head), a.k_strides.token);
            values.left_over_tokens(left_values.get(), a.v_strides.at(a.v, row, key_head), a.v_strides.token);
            for (int64_t i = item % parts; i < group * query_blocks; i += parts) {
                const int64_t head = key_head * group + i / query_blocks, block = i % query_blocks, start = block * SIDE;
                const Operands these{std::min(SIDE, a.T - start), a.d};
                these.right(query.get(), a.q_strides.at(a.q, row, head, start), a.q_strides.token);
                mix(View(a, head), keys, values, block, query.get(), left_keys.get(), left_values.get(), scores.get(), weights.get(),
                    a.mixed_strides.at(a.mixed, row, head, start),
                    a.normalisers + (row * a.H + head) * a.T + start);
            }
        }
    }
}

// A run of blocks of queries of one head, from `start` on, as operands, and what is summed for them over the keys.
struct Run {
    int64_t start, count;
    Tiles query, query_over_tokens, grad, grad_over_tokens;  // of `mixed` the gradient
    Tiles weights, grad_weights;                             // key block by key block, QUERIES blocks of two by two tiles
    Tiles weights_left, scores_left, scores_right;           // bfloat16, the scores being their gradients
    Run(int64_t key_blocks, int64_t dims, int64_t value_dims)
        : query(tiles(QUERIES * dims * 2)), query_over_tokens(tiles(QUERIES * dims * 2)), grad(tiles(QUERIES * value_dims * 2)),
          grad_over_tokens(tiles(QUERIES * value_dims * 2)), weights(tiles(key_blocks * QUERIES * 4)),
          grad_weights(tiles(key_blocks * QUERIES * 4)), weights_left(tiles(QUERIES * 2)), scores_left(tiles(QUERIES * 2)),
          scores_right(tiles(QUERIES * key_blocks * 2)) {}
};

// Of one head of keys and values all operands, and the sums of their gradients.
struct Head {
    Tiles keys, keys_over_tokens, values, grad_keys, grad_values;
    Head(int64_t key_blocks, int64_t dims, int64_t value_dims)
        : keys(tiles(key_blocks * dims * 2)), keys_over_tokens(tiles(key_blocks * dims * 2)), values(tiles(key_blocks * value_dims * 2)),
          grad_keys(tiles(key_blocks * dims * 4)), grad_values(tiles(key_blocks * value_dims * 4)) {}
};

// The gradients of the run's queries go to `grad_q`, and to those of the keys and values their share is added.
void backward_run(const View& view, Run& run, Head& head, const float* normalisers, bfloat16* grad_q, int64_t q_stride) {
    const Attention& a = view.a;
    const int64_t dims = blocks(a.d), value_dims = blocks(a.dv), key_blocks = blocks(a.S);
    const int64_t first = view.first(run.start), last = view.last(run.start + run.count - 1);
    const auto block_at = [&](const Tiles& x, int64_t n, int64_t q) { return x.get() + ((n - first) * QUERIES + q) * 4; };
    floats deltas[QUERIES][2] = {};  // the sum of weight · gradient over the keys
    for (int64_t q = 0; q < run.count; q++) {
        const int64_t block = run.start + q;
        floats norm[2];
        for (int i = 0; i < int(SIDE); i++) {  // where there is no query there is no gradient, and any finite weight will do
            const int64_t t = block * SIDE + i;
            norm[i / LANES][i % LANES] = t < a.T ? normalisers[t] : INFINITY;
        }
        for (int64_t n = view.first(block); n < view.last(block); n++) {
            Tile *w = block_at(run.weights, n, q), *g = block_at(run.grad_weights, n, q);
            const Tile *k = head.keys.get() + n * dims * 2, *v = head.values.get() + n * value_dims * 2;
            const Tile *query = run.query.get() + q * dims * 2, *grad = run.grad.get() + q * value_dims * 2;
            multiply<false>(w, k, k + 1, 2, query, query + 1, 2, dims);
            multiply<false>(g, v, v + 1, 2, grad, grad + 1, 2, value_dims);
            view.each(block, n, [&](int row, int half, floats bias, ints seen) {
                // The score as it was forwards, to the last digit. With large ones it may still be above the norm, which is rounded.
                const floats score = (floats)at(w, row, half) * a.scale + bias, x = score - norm[half];
                const floats weight = (floats)only(seen, exponential(x > 0.f ? floats{} : x));
                deltas[q][half] += weight * (floats)at(g, row, half);
                at(w, row, half) = (words)weight;
            });
        }
    }
    for (int64_t n = first; n < last; n++) {
        int64_t from = run.count, to = 0;  // the blocks of queries that see these keys
        for (int64_t q = 0; q < run.count; q++) {
            if (n < view.first(run.start + q) || n >= view.last(run.start + q)) continue;
            from = std::min(from, q), to = q + 1;
            Tile *w = block_at(run.weights, n, q), *g = block_at(run.grad_weights, n, q);
            for (int row = 0; row < int(SIDE); row++) {
                for (int half = 0; half < 2; half++)
                    at(g, row, half) = (words)((floats)at(w, row, half) * ((floats)at(g, row, half) - deltas[q][half]));
                const int64_t tile = 2 * q + row / LANES;
                run.weights_left[tile].rows[row % LANES] = narrow({(floats)at(w, row, 0), (floats)at(w, row, 1)});
                run.scores_left[tile].rows[row % LANES] = narrow({(floats)at(g, row, 0), (floats)at(g, row, 1)});
            }
            for (int half = 0; half < 2; half++)
                for (int row = 0; row < LANES; row++)
                    run.scores_right[(q * key_blocks + n) * 2 + half].rows[row] =
                        narrow({(floats)at(g, row, half), (floats)at(g, row + LANES, half)});
        }
        if (from >= to) continue;
        const auto add = [&](Tile* sums, const Tiles& left, const Tiles& right, int64_t columns) {
            const Tile *l = left.get() + 2 * from, *r = right.get() + from * columns * 2;
            for (int64_t c = 0; c < columns; c++)
                multiply<true>(sums + (n * columns + c) * 4, l, l + 1, 2, r + 2 * c, r + 2 * c + 1, 2 * columns, to - from);
        };
        add(head.grad_values.get(), run.weights_left, run.grad_over_tokens, value_dims);
        add(head.grad_keys.get(), run.scores_left, run.query_over_tokens, dims);
    }
    for (int64_t q = 0; q < run.count; q++) {
        const int64_t block = run.start + q, from = view.first(block), remaining = std::min(SIDE, a.T - block * SIDE);
        for (int64_t c = 0; c < dims; c++) {
            Tile sum[4];
            const Tile *k = head.keys_over_tokens.get() + (from * dims + c) * 2, *s = run.scores_right.get() + (q * key_blocks + from) * 2;
            multiply<false>(sum, k, k + 1, 2 * dims, s, s + 1, 2, view.last(block) - from);
            unfold(grad_q + q * SIDE * q_stride + c * SIDE, q_stride, sum, remaining, {floats{} + a.scale, floats{} + a.scale}, a.d - c * SIDE);
        }
    }
}

void backwards(const Attention& a, const Gradients& grads, int threads) {
    const int64_t group = a.H / a.key_heads, query_blocks = blocks(a.T), key_blocks = blocks(a.S);
    const Operands keys{a.S, a.d}, values{a.S, a.dv};
    const int64_t dims = keys.columns(), value_dims = values.columns();
#pragma omp parallel num_threads(threads)
    {
        const Registers registers;
        Run run(key_blocks, dims, value_dims);
        Head head(key_blocks, dims, value_dims);
#pragma omp for schedule(static)
        for (int64_t item = 0; item < a.B * a.key_heads; item++) {
            const int64_t row = item / a.key_heads, key_head = item % a.key_heads;
            const bfloat16 *k = a.k_strides.at(a.k, row, key_head), *v = a.v_strides.at(a.v, row, key_head);
            keys.left(head.keys.get(), k, a.k_strides.token);
            keys.left_over_tokens(head.keys_over_tokens.get(), k, a.k_strides.token);
            values.left(head.values.get(), v, a.v_strides.token);
            std::fill_n(head.grad_keys.get(), key_blocks * dims * 4, Tile{});
            std::fill_n(head.grad_values.get(), key_blocks * value_dims * 4, Tile{});
            for (int64_t h = key_head * group; h < (key_head + 1) * group; h++)
                for (run.start = 0; run.start < query_blocks; run.start += QUERIES) {
                    run.count = std::min(QUERIES, query_blocks - run.start);
                    const int64_t start = run.start * SIDE, tokens = std::min(run.count * SIDE, a.T - start);
                    const bfloat16* q = a.q_strides.at(a.q, row, h, start);
                    const bfloat16* grad = grads.mixed_strides.at(grads.mixed, row, h, start);
                    const Operands these{tokens, a.d}, those{tokens, a.dv};
                    these.right(run.query.get(), q, a.q_strides.token);
                    these.right_over_tokens(run.query_over_tokens.get(), q, a.q_strides.token);
                    those.right(run.grad.get(), grad, grads.mixed_strides.token);
                    those.right_over_tokens(run.grad_over_tokens.get(), grad, grads.mixed_strides.token);
                    backward_run(View(a, h), run, head, a.normalisers + (row * a.H + h) * a.T, grads.q_strides.at(grads.q, row, h, start),
                                 grads.q_strides.token);
                }
            const auto give = [&](bfloat16* to, int64_t stride, Tile* sums, int64_t columns, float factor, int64_t size) {
                for (int64_t token = 0; token < a.S; token++)
                    for (int64_t c = 0; c < columns; c++) {
                        Tile* block = sums + (token / SIDE * columns + c) * 4;
                        const int line = int(token % SIDE);
                        put(to + token * stride + c * SIDE, at(block, line, 0), at(block, line, 1), factor, size - c * SIDE);
                    }
            };
            give(grads.k_strides.at(grads.k, row, key_head), grads.k_strides.token, head.grad_keys.get(), dims, a.scale, a.d);
            give(grads.v_strides.at(grads.v, row, key_head), grads.v_strides.token, head.grad_values.get(), value_dims, 1.f, a.dv);
        }
    }
}

}  // namespace

extern "C" {

// Whether the system lets this process use what the kernels are compiled to.
int newllm_attention_begins() {
#if defined(__AMX_BF16__)
    constexpr long ASK = 0x1023, TILE_DATA = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    return syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
#else
    return 1;
#endif
}

void newllm_attention_forwards(const Attention* a, int threads) { forwards(*a, threads); }

void newllm_attention_backwards(const Attention* a, const Gradients* grads, int threads) { backwards(*a, *grads, threads); }
}
