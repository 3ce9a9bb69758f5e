// Products of small matrices, compiled once for each instruction set (tiles.cpp). All buffers are of 32-bit words: a float each or, when
// `half`, two bfloat16 that are multiplied pairwise and summed in float32.
#pragma once

#include <cstdint>

constexpr int64_t LANES = 16, ROWS = 8;  // words of a vector; rows of a tile of `products`

struct Tiles {
    // c [m, n] += sum over t of a[t][m] b[t][n], pitches lda, ldb, ldc in words; m is a multiple of ROWS, n of LANES.
    void (*products)(bool half, const float *a, int64_t lda, const float *b, int64_t ldb, int64_t t, float *c, int64_t ldc, int64_t m, int64_t n);
    // k[q][r] = <row q, row r> where r >= q - q % width (and some more); p rows of `words` words, p a multiple of 4, words of LANES.
    void (*gram)(bool half, const float *rows, int64_t p, int64_t words, int64_t width, float *k, int64_t pitch);
    // The sum over j < count and i < n of g[i] keep[i] k[j][i]; reads up to a multiple of LANES, where `keep` is zero.
    float (*correlate)(const float *g, const float *keep, const float *const *k, int64_t count, int64_t n);
    double (*squares)(const float *a, int64_t n);
    // products [c] += (x - mean) g and sums [c] += g; x and g are floats or, when `half`, bfloat16.
    void (*centred)(bool half, const void *x, const void *g, const float *mean, int64_t c, float *products, float *sums);
    void (*interleave)(const uint16_t *low, const uint16_t *high, int64_t n, uint32_t *to);
};

namespace plain { extern const Tiles tiles; }
namespace avx2 { extern const Tiles tiles; }
namespace avx512 { extern const Tiles tiles; }

// The widest set that this processor has.
inline const Tiles &fastest_tiles() {
#ifdef X86_TILES
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16")) return avx512::tiles;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::tiles;
#endif
    return plain::tiles;
}
