/* Pillow's resampling of 8-bit RGB, bit for bit, in a fraction of the time.
 *
 * Coefficients, the order of their sums, their rounding to 22 bits and the rounding between the
 * passes are those of Pillow's src/libImaging/Resample.c, so every pixel is the same. What differs
 * is the way through memory: rows are scaled when the vertical pass needs them and stay in the
 * nearest cache, and the arithmetic is AVX2's.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if !defined(__x86_64__)

int triptych_resize_served(void) { return 0; }

#else

#include <immintrin.h>

#define AVX2 __attribute__((target("avx2")))

enum { BITS = 22, HALF = 1 << (BITS - 1), ROWS = 4 };

typedef struct {
    int taps;      /* room for coefficients of one output position */
    int *first;    /* of each output position: the first input position it reads */
    int *count;    /* and how many */
    int32_t *k;    /* taps of them an output position */
} Axis;

static double bilinear(double x) {
    x = fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

static double bicubic(double x) {
    const double a = -0.5;
    x = fabs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

static void free_axis(Axis *axis) {
    free(axis->first);
    free(axis->count);
    free(axis->k);
}

/* precompute_coeffs and normalize_coeffs_8bpc of Pillow, for `extent` of `in` pixels. */
static int make_axis(Axis *axis, int in, double extent, int out, int cubic) {
    double (*filter)(double) = cubic ? bicubic : bilinear;
    double scale = extent / out, stretch = scale < 1.0 ? 1.0 : scale;
    double support = (cubic ? 2.0 : 1.0) * stretch, inverse = 1.0 / stretch;
    axis->taps = (int)ceil(support) * 2 + 1;
    axis->first = malloc(out * sizeof(int));
    axis->count = malloc(out * sizeof(int));
    axis->k = calloc((size_t)out * axis->taps + 1, sizeof(int32_t)); /* read in pairs */
    double *weights = malloc(axis->taps * sizeof(double));
    int failed = !axis->first || !axis->count || !axis->k || !weights;
    for (int at = 0; !failed && at < out; at++) {
        double centre = (at + 0.5) * scale, sum = 0.0;
        int first = (int)(centre - support + 0.5), last = (int)(centre + support + 0.5);
        if (first < 0) first = 0;
        if (last > in) last = in;
        for (int tap = 0; tap < last - first; tap++) {
            weights[tap] = filter((tap + first - centre + 0.5) * inverse);
            sum += weights[tap];
        }
        for (int tap = 0; tap < last - first; tap++) {
            double weight = sum != 0.0 ? weights[tap] / sum : weights[tap];
            double rounding = weight < 0 ? -0.5 : 0.5;
            axis->k[(size_t)at * axis->taps + tap] = (int)(weight * (1 << BITS) + rounding);
        }
        axis->first[at] = first;
        axis->count[at] = last - first;
    }
    free(weights);
    return failed;
}

/* Two coefficients, each for the four bytes of its pixel. */
AVX2 static inline __m256i pair(const int32_t *k) {
    const __m256i each = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    return _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(_mm_loadu_si64(k)), each);
}

AVX2 static inline __m256i weighted(__m128i octets, __m256i weights) {
    return _mm256_mullo_epi32(_mm256_cvtepu8_epi32(octets), weights);
}

/* ROWS rows of 4 bytes a pixel to packed RGB of `width` pixels; writes a byte more than that.
 * Odd and even pixels are summed apart, and put together at the end. */
AVX2 static void across(const Axis *axis, int width, const uint8_t *const *from,
                        uint8_t *const *to) {
    const __m256i rounding = _mm256_setr_epi32(HALF, HALF, HALF, HALF, 0, 0, 0, 0);
    for (int x = 0; x < width; x++) {
        const int32_t *k = axis->k + (size_t)x * axis->taps;
        const size_t start = (size_t)axis->first[x] * 4;
        const int count = axis->count[x];
        __m256i sums[ROWS];
        for (int row = 0; row < ROWS; row++) sums[row] = rounding;
        int tap = 0;
        for (; tap + 1 < count; tap += 2) {
            __m256i weights = pair(k + tap);
            for (int row = 0; row < ROWS; row++) {
                __m128i octets = _mm_loadu_si64(from[row] + start + 4 * tap);
                sums[row] = _mm256_add_epi32(sums[row], weighted(octets, weights));
            }
        }
        if (tap < count) {
            __m256i weights = pair(k + tap);
            for (int row = 0; row < ROWS; row++) {
                __m128i octets = _mm_loadu_si32(from[row] + start + 4 * tap); /* and a zero */
                sums[row] = _mm256_add_epi32(sums[row], weighted(octets, weights));
            }
        }
        for (int row = 0; row < ROWS; row++) {
            __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums[row]),
                                        _mm256_extracti128_si256(sums[row], 1));
            sum = _mm_srai_epi32(sum, BITS);
            sum = _mm_packs_epi32(sum, sum);
            _mm_storeu_si32(to[row] + 3 * (size_t)x, _mm_packus_epi16(sum, sum));
        }
    }
}

/* One output row of `size` bytes from `count` rows. */
AVX2 static void down(const uint8_t *const *rows, const int32_t *k, int count, int size,
                      uint8_t *to) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    int at = 0;
    for (; at + 32 <= size; at += 32) {
        __m256i sums[4];
        for (int part = 0; part < 4; part++) sums[part] = _mm256_set1_epi32(HALF);
        for (int tap = 0; tap < count; tap++) {
            __m256i weight = _mm256_set1_epi32(k[tap]);
            for (int part = 0; part < 4; part++) {
                __m256i octets = _mm256_cvtepu8_epi32(_mm_loadu_si64(rows[tap] + at + 8 * part));
                sums[part] = _mm256_add_epi32(sums[part], _mm256_mullo_epi32(octets, weight));
            }
        }
        for (int part = 0; part < 4; part++) sums[part] = _mm256_srai_epi32(sums[part], BITS);
        __m256i octets = _mm256_packus_epi16(_mm256_packs_epi32(sums[0], sums[1]),
                                             _mm256_packs_epi32(sums[2], sums[3]));
        _mm256_storeu_si256((__m256i *)(to + at), _mm256_permutevar8x32_epi32(octets, order));
    }
    for (; at < size; at++) {
        int32_t sum = HALF;
        for (int tap = 0; tap < count; tap++) sum += rows[tap][at] * k[tap];
        sum >>= BITS;
        to[at] = sum < 0 ? 0 : sum > 255 ? 255 : sum;
    }
}

static void pack(const uint8_t *from, int width, uint8_t *to) {
    for (size_t x = 0; x < (size_t)width; x++) memcpy(to + 3 * x, from + 4 * x, 3);
}

int triptych_resize_served(void) { return __builtin_cpu_supports("avx2"); }

/* Scale `height` x `width` pixels of 4 bytes, of which the last is passed over, to packed RGB:
 * first across, then down. The picture is the first `tall` x `wide` of them. `cubic` is 0 for
 * the triangle filter.
 * Returns 0, or 1 where there is no memory for it. */
int triptych_resize(const uint8_t *from, int height, int width, double tall, double wide,
                    uint8_t *to, int new_height, int new_width, int cubic) {
    const size_t stride = (size_t)width * 4, size = (size_t)new_width * 3, pitch = size + 1;
    const int same_height = tall == new_height, same_width = wide == new_width;
    Axis along = {0}, over = {0};
    int failed = make_axis(&along, width, wide, new_width, cubic) ||
                 make_axis(&over, height, tall, new_height, cubic);
    /* A ring of scaled rows: those that one output row reads, and the ROWS made last. */
    const int room = over.taps + ROWS;
    uint8_t *ring = failed ? NULL : malloc(room * pitch);
    const uint8_t **rows = failed ? NULL : malloc(over.taps * sizeof(*rows));
    failed = failed || !ring || !rows;
    for (int y = 0, made = 0; !failed && y < new_height; y++) {
        const int first = same_height ? y : over.first[y], count = same_height ? 1 : over.count[y];
        while (made < first + count) {
            const uint8_t *sources[ROWS];
            uint8_t *targets[ROWS];
            for (int row = 0; row < ROWS; row++) {
                int source = made + row < height ? made + row : height - 1;
                sources[row] = from + source * stride;
                targets[row] = ring + ((made + row) % room) * pitch;
            }
            if (same_width)
                for (int row = 0; row < ROWS; row++) pack(sources[row], width, targets[row]);
            else
                across(&along, new_width, sources, targets);
            made += ROWS;
        }
        for (int tap = 0; tap < count; tap++) rows[tap] = ring + ((first + tap) % room) * pitch;
        if (same_height)
            memcpy(to + y * size, rows[0], size);
        else
            down(rows, over.k + (size_t)y * over.taps, count, (int)size, to + y * size);
    }
    free(ring);
    free(rows);
    free_axis(&along);
    free_axis(&over);
    return failed;
}

#endif
