// See tiles.h. Compiled once for each instruction set, in the namespace TILES; nothing of the standard library's templates in here, since
// the linker keeps one copy of those for all sets.
#include <cstring>

#include "tiles.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace TILES {
namespace {

#define INLINE inline __attribute__((always_inline))

// The bytes of a register (a wider vector type would go through memory), and what of a tile is in registers at once, so that none is spilt:
// rows and registers of `products`, rows of `gram`.
#ifdef __AVX512F__
constexpr int BYTES = 64, TALL = ROWS, WIDE = 3, ACROSS = 4;
#elif defined(__AVX2__)
constexpr int BYTES = 32, TALL = 4, WIDE = 2, ACROSS = 2;
#else
constexpr int BYTES = 16, TALL = 2, WIDE = 4, ACROSS = 2;
#endif
constexpr int64_t STEP = BYTES / 4;

typedef float Lanes __attribute__((vector_size(BYTES)));  // STEP words
typedef uint32_t Bits __attribute__((vector_size(BYTES)));

INLINE Lanes load(const float *p) {
    Lanes v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, const Lanes &v) { std::memcpy(p, &v, sizeof v); }

INLINE Lanes spread(const float *p) {  // the word at p in every lane, its bits untouched
    uint32_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return Lanes(Bits{} + bits);
}

struct Single {
    static INLINE void add(Lanes &sum, const Lanes &a, const Lanes &b) { sum += a * b; }
};

struct Pair {
    static INLINE void add(Lanes &sum, const Lanes &a, const Lanes &b) {
#ifdef __AVX512BF16__
        sum = Lanes(_mm512_dpbf16_ps(__m512(sum), __m512bh(a), __m512bh(b)));
#else
        sum += Lanes(Bits(a) << 16) * Lanes(Bits(b) << 16);
        sum += Lanes(Bits(a) & 0xffff0000u) * Lanes(Bits(b) & 0xffff0000u);
#endif
    }
};

INLINE float total(const Lanes &v) {
    float s[STEP], sum = 0;
    store(s, v);
    for (int64_t n = STEP / 2; n >= 4; n /= 2)
        for (int64_t i = 0; i < n; ++i) s[i] += s[i + n];
    for (int i = 0; i < 4; ++i) sum += s[i];
    return sum;
}

// One tile of TALL x V * STEP sums, kept in registers over t.
template <class Dot, int V>
INLINE void outer(const float *a, int64_t lda, const float *b, int64_t ldb, int64_t t, float *c, int64_t ldc) {
    Lanes sum[TALL][V];
    for (int i = 0; i < TALL; ++i)
        for (int v = 0; v < V; ++v) sum[i][v] = load(c + i * ldc + v * STEP);
    for (int64_t k = 0; k < t; ++k, a += lda, b += ldb) {
        Lanes right[V];
        for (int v = 0; v < V; ++v) right[v] = load(b + v * STEP);
#pragma GCC unroll 8
        for (int i = 0; i < TALL; ++i) {
            const Lanes left = spread(a + i);
            for (int v = 0; v < V; ++v) Dot::add(sum[i][v], left, right[v]);
        }
    }
    for (int i = 0; i < TALL; ++i)
        for (int v = 0; v < V; ++v) store(c + i * ldc + v * STEP, sum[i][v]);
}

template <class Dot>
void products_of(const float *a, int64_t lda, const float *b, int64_t ldb, int64_t t, float *c, int64_t ldc, int64_t m, int64_t n) {
    for (int64_t j = 0; j < n; j += WIDE * STEP)
        for (int64_t i = 0; i < m; i += TALL) {
            float *to = c + i * ldc + j;
            if (n - j >= WIDE * STEP) outer<Dot, WIDE>(a + i, lda, b + j, ldb, t, to, ldc);
            else if (n - j >= 2 * STEP) outer<Dot, 2>(a + i, lda, b + j, ldb, t, to, ldc);
            else outer<Dot, 1>(a + i, lda, b + j, ldb, t, to, ldc);
        }
}

void products(bool half, const float *a, int64_t lda, const float *b, int64_t ldb, int64_t t, float *c, int64_t ldc, int64_t m, int64_t n) {
    half ? products_of<Pair>(a, lda, b, ldb, t, c, ldc, m, n) : products_of<Single>(a, lda, b, ldb, t, c, ldc, m, n);
}

#ifdef __AVX512F__
// Of two vectors of segments of 2 * h words: the sums of each segment's halves, those of `a` first.
INLINE Lanes halves(const Lanes &a, const Lanes &b, int h) {
    switch (h) {
    case 8:
        return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    case 4:
        return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    case 2:
        return __builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
               __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
    default:
        return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
               __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    }
}

// k[i] [4] = the sums of sum[4 i + j] over their words.
INLINE void reduce(Lanes (&sum)[16], float *k, int64_t p) {
#pragma GCC unroll 4
    for (int h = 8, n = 16; n > 1; h /= 2, n /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < n / 2; ++i) sum[i] = halves(sum[2 * i], sum[2 * i + 1], h);
    for (int i = 0; i < 4; ++i) std::memcpy(k + i * p, reinterpret_cast<const char *>(sum) + 16 * i, 16);
}
#else
INLINE void reduce(Lanes (&sum)[16], float *k, int64_t p) {
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) k[i * p + j] = total(sum[4 * i + j]);
}
#endif

template <class Dot> INLINE void inner(const float *left, const float *right, int64_t words, float *k, int64_t p) {
    Lanes sum[16];
    for (int first = 0; first < 4; first += ACROSS) {
        Lanes part[4 * ACROSS] = {};
        for (int64_t c = 0; c < words; c += STEP) {
            Lanes b[4];
            for (int j = 0; j < 4; ++j) b[j] = load(right + j * words + c);
#pragma GCC unroll 4
            for (int i = 0; i < ACROSS; ++i) {
                const Lanes a = load(left + (first + i) * words + c);
                for (int j = 0; j < 4; ++j) Dot::add(part[4 * i + j], a, b[j]);
            }
        }
        for (int i = 0; i < 4 * ACROSS; ++i) sum[4 * first + i] = part[i];
    }
    reduce(sum, k, p);
}

template <class Dot> void gram_of(const float *rows, int64_t p, int64_t words, int64_t width, float *k, int64_t pitch) {
    const int64_t some = 4 * (6144 / words / 4 > 1 ? 6144 / words / 4 : 1);  // rows on the right that stay in the first cache
    for (int64_t r0 = 0; r0 < p; r0 += some)
        for (int64_t q = 0; q < p; q += 4) {
            const int64_t first = (q - q % width) / 4 * 4, end = r0 + some < p ? r0 + some : p;
            for (int64_t r = first > r0 ? first : r0; r < end; r += 4) inner<Dot>(rows + q * words, rows + r * words, words, k + q * pitch + r, pitch);
        }
}

void gram(bool half, const float *rows, int64_t p, int64_t words, int64_t width, float *k, int64_t pitch) {
    half ? gram_of<Pair>(rows, p, words, width, k, pitch) : gram_of<Single>(rows, p, words, width, k, pitch);
}

INLINE double dot(const float *a, const float *b, int64_t n) {
    Lanes sum[2] = {};
    int64_t i = 0;
    for (; i + 2 * STEP <= n; i += 2 * STEP) {
        sum[0] += load(a + i) * load(b + i);
        sum[1] += load(a + i + STEP) * load(b + i + STEP);
    }
    double all = total(sum[0] + sum[1]);
    for (; i < n; ++i) all += a[i] * b[i];
    return all;
}

double squares(const float *a, int64_t n) {
    double all = 0;
    for (int64_t i = 0; i < n; i += 4096) all += dot(a + i, a + i, n - i < 4096 ? n - i : 4096);
    return all;
}

void interleave(const uint16_t *low, const uint16_t *high, int64_t n, uint32_t *to) {
    for (int64_t i = 0; i < n; ++i) to[i] = low[i] | uint32_t(high[i]) << 16;
}

template <int J> INLINE float correlate_of(const float *g, const float *keep, const float *const *k, int64_t n) {
    Lanes sum[J] = {};
    for (int64_t i = 0; i < n; i += STEP) {
        const Lanes kept = load(g + i) * load(keep + i);
        for (int j = 0; j < J; ++j) sum[j] += kept * load(k[j] + i);
    }
    for (int j = 1; j < J; ++j) sum[0] += sum[j];
    return total(sum[0]);
}

float correlate(const float *g, const float *keep, const float *const *k, int64_t count, int64_t n) {
    float sum = 0;
    for (; count >= 3; count -= 3, k += 3) sum += correlate_of<3>(g, keep, k, n);
    return sum + (count == 2 ? correlate_of<2>(g, keep, k, n) : count == 1 ? correlate_of<1>(g, keep, k, n) : 0.0f);
}

INLINE float widened(float x) { return x; }

INLINE float widened(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

template <typename T> INLINE void centred_of(const T *x, const T *g, const float *mean, int64_t c, float *__restrict products, float *__restrict sums) {
    for (int64_t i = 0; i < c; ++i) {
        const float b = widened(g[i]);
        products[i] += (widened(x[i]) - mean[i]) * b;
        sums[i] += b;
    }
}

void centred(bool half, const void *x, const void *g, const float *mean, int64_t c, float *products, float *sums) {
    half ? centred_of(static_cast<const uint16_t *>(x), static_cast<const uint16_t *>(g), mean, c, products, sums)
         : centred_of(static_cast<const float *>(x), static_cast<const float *>(g), mean, c, products, sums);
}

}  // namespace

extern const Tiles tiles = {products, gram, correlate, squares, centred, interleave};
}  // namespace TILES
