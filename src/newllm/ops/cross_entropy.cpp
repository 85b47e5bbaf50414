// Cross-entropy of logits in bfloat16 on a CPU, and its gradient in their place.
//
// torch's operators widen, compute and round in passes over memory of their own, with one exponential for the loss and one for the
// gradient. Here a row is widened once, stays in the core's cache, and is rounded once; all between is float32. No result depends
// on the number of threads. Called by native.py; the twin is `reference.linear_cross_entropy`.

#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

namespace {

// The last numbers of a row, filled up to a block with −∞, whose share of the softmax is nothing.
inline words load_last(const bfloat16* from, int64_t count) {
    bfloat16 block[BLOCK];
    std::fill(block, block + BLOCK, bfloat16{0xff80});
    std::memcpy(block, from, size_t(count) * sizeof *from);
    return load<words>(block);
}

// The loss of a row of V logits; with GRADIENT they become d loss / d logits = softmax − onehot(target). `wide` has room for them as
// floats, up to the end of the last block.
template <bool GRADIENT>
float cross_entropy(bfloat16* logits, int64_t V, int64_t target, float* wide) {
    const int64_t whole = V / BLOCK * BLOCK, end = (V + BLOCK - 1) / BLOCK * BLOCK;
    floats highest = floats{} - INFINITY, sums{};
    for (int64_t i = 0; i < end; i += BLOCK) {
        const Two x = widen(i < whole ? load<words>(logits + i) : load_last(logits + i, V - i));
        std::memcpy(wide + i, &x, sizeof x);
        const floats higher = x.a > x.b ? x.a : x.b;
        highest = higher > highest ? higher : highest;
    }
    float high = -INFINITY, sum = 0.f;
    for (int lane = 0; lane < LANES; lane++) high = std::max(high, highest[lane]);
    for (int64_t i = 0; i < end; i += LANES) {
        const floats e = exponential(load<floats>(wide + i) - high);
        if (GRADIENT) std::memcpy(wide + i, &e, sizeof e);
        sums += e;
    }
    for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
    const float loss = std::log(sum) + (high - widen(logits[target]));
    if (GRADIENT) {
        const int64_t in_block = target % BLOCK;
        wide[target - in_block + in_block % 2 * LANES + in_block / 2] -= sum;
        const float share = 1.f / sum;
        for (int64_t i = 0; i < end; i += BLOCK) {
            const Two e = load<Two>(wide + i);
            const words gradient = narrow({e.a * share, e.b * share});
            std::memcpy(logits + i, &gradient, i < whole ? sizeof gradient : size_t(V - i) * sizeof *logits);
        }
    }
    return loss;
}

}  // namespace

extern "C" {

// logits (R, V) without gaps; a target below 0 is ignored: its loss and gradient are 0.
void newllm_cross_entropy(bfloat16* logits, int64_t R, int64_t V, const int64_t* targets, float* losses, int gradient, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> wide(size_t(V + BLOCK));
#pragma omp for schedule(static)
        for (int64_t r = 0; r < R; r++) {
            bfloat16* row = logits + r * V;
            if (targets[r] >= 0) {
                losses[r] = (gradient ? cross_entropy<true> : cross_entropy<false>)(row, V, targets[r], wide.data());
            } else {
                losses[r] = 0.f;
                if (gradient) std::fill(row, row + V, bfloat16{0});
            }
        }
    }
}
}
