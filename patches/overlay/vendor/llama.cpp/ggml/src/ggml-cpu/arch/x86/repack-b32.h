#pragma once

// Products of 8 interleaved rows of blocks of 32 with rows of Q8_0, for AVX2 and what came after it. The layouts are those
// of repack.h: 8 bytes of each row in turn.
//
// vpdpbusd and vpmaddubsw multiply unsigned bytes by signed ones. Taking absolute values and moving signs to the other
// side costs two or three instructions a product. Here the weights are unsigned instead: `bias` is added to each, and
// each block's sum starts at -bias times the sum of its activations. Integers, so the results are the same to the bit.
// Weights stay as they lie in memory: a lane of 32 bits adds up half of a row's products, and lanes are added in pairs
// at the end of a block.

#include "repack.h"
#include "simd-mappings.h"

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#define REPACK_B32

#include <immintrin.h>

#if defined(__AVX512VNNI__) && defined(__AVX512VL__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define REPACK_B32_VNNI
#define REPACK_B32_512
#elif defined(__AVXVNNI__)
#define REPACK_B32_VNNI
#endif

namespace repack_b32 {

struct block_q5_0x8 {
    ggml_half d[8];
    uint8_t   qh[32];  // 8 weights of each row in turn: a bit each
    uint8_t   qs[128]; // nibbles as in block_q4_0x8
};
static_assert(sizeof(block_q5_0x8) == 8*sizeof(block_q5_0), "wrong size");

// What makes a type's weights unsigned.
template <typename block_tx8> constexpr int bias = 0;
template <> constexpr int bias<block_q4_0x8>   = 8;
template <> constexpr int bias<block_q5_0x8>   = 16;
template <> constexpr int bias<block_q8_0x8>   = 128;
template <> constexpr int bias<block_iq4_nlx8> = 127;
template <> constexpr int bias<block_mxfp4x8>  = 12;

// Without vpdpbusd the products of a block are added in 16 bits, four times two a lane, which must hold them.
template <typename block_tx8> constexpr bool usable =
#if defined(REPACK_B32_VNNI)
    true;
#else
    8*127*2*bias<block_tx8> < 1 << 15;
#endif

static inline __m256i load_256(const void * p) {
    return _mm256_loadu_si256((const __m256i *) p);
}

// 8 bytes, in each lane of 64 bits
static inline __m256i repeat_256(const void * p) {
    int64_t bytes;
    memcpy(&bytes, p, sizeof(bytes));
    return _mm256_set1_epi64x(bytes);
}

// first + the sums of fours of the products of w[i] and a[i]
template <int n = 4>
static inline __m256i dot_256(__m256i first, const __m256i w[n], const __m256i a[n]) {
#if defined(REPACK_B32_512)
    for (int i = 0; i < n; ++i) {
        first = _mm256_dpbusd_epi32(first, w[i], a[i]);
    }
    return first;
#elif defined(REPACK_B32_VNNI)
    for (int i = 0; i < n; ++i) {
        first = _mm256_dpbusd_avx_epi32(first, w[i], a[i]);
    }
    return first;
#else
    static_assert(n == 4, "one block");
    const __m256i sums_01 = _mm256_add_epi16(_mm256_maddubs_epi16(w[0], a[0]), _mm256_maddubs_epi16(w[1], a[1]));
    const __m256i sums_23 = _mm256_add_epi16(_mm256_maddubs_epi16(w[2], a[2]), _mm256_maddubs_epi16(w[3], a[3]));
    return _mm256_add_epi32(first, _mm256_madd_epi16(_mm256_add_epi16(sums_01, sums_23), _mm256_set1_epi16(1)));
#endif
}

// the sums of four rows' activations times `factor`, an unsigned byte: two lanes a row
static inline __m256i sums_of(const block_q8_0x4 & a, int factor) {
    const __m256i b = _mm256_set1_epi8((char) factor);
    const __m256i w[4] = { b, b, b, b };
    const __m256i v[4] = { load_256(a.qs), load_256(a.qs + 32), load_256(a.qs + 64), load_256(a.qs + 96) };
    return dot_256(_mm256_setzero_si256(), w, v);
}

// what the sums of products start at
template <typename block_tx8> static inline __m256i start_of(const block_q8_0x4 & a) {
    return _mm256_sub_epi32(_mm256_setzero_si256(), sums_of(a, bias<block_tx8>));
}

static inline __m256 scales_256(const ggml_half * d) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) d));
}

static inline __m256 scales_256(const uint8_t * e) {
    float d[8];
    for (int i = 0; i < 8; ++i) {
        d[i] = GGML_CPU_E8M0_TO_FP32_HALF(e[i]);
    }
    return _mm256_loadu_ps(d);
}

template <typename block_tx8> static inline __m256 scales_256(const block_tx8     & b) { return scales_256(b.d); }
template <>                          inline __m256 scales_256(const block_mxfp4x8 & b) { return scales_256(b.e); }

// The unsigned weights of half of the rows or of all, 8 of each in turn: w[0] the first 8, w[1] the next.

static inline void look_up(const uint8_t * qs, int half, __m256i lut, __m256i w[4]) {
    const __m256i low = _mm256_set1_epi8(0x0f);
    for (int i = 0; i < 2; ++i) {
        const __m256i raw = load_256(qs + 64*i + 32*half);
        w[i]     = _mm256_shuffle_epi8(lut, _mm256_and_si256(raw, low));
        w[i + 2] = _mm256_shuffle_epi8(lut, _mm256_and_si256(_mm256_srli_epi16(raw, 4), low));
    }
}

template <typename block_tx8> static inline void decode(const block_tx8 & b, int half, __m256i lut, __m256i w[4]) {
    look_up((const uint8_t *) b.qs, half, lut, w);
}

template <> inline void decode(const block_q5_0x8 & b, int half, __m256i, __m256i w[4]) {
    const __m256i low = _mm256_set1_epi8(0x0f);
    for (int i = 0; i < 2; ++i) {
        const __m256i raw = load_256(b.qs + 64*i + 32*half);
        w[i]     = _mm256_and_si256(raw, low);
        w[i + 2] = _mm256_and_si256(_mm256_srli_epi16(raw, 4), low);
    }
    // a byte for each bit
    const __m256i bytes = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bits  = _mm256_set1_epi64x((int64_t) 0x8040201008040201);
    for (int i = 0; i < 4; ++i) {
        int32_t qh;
        memcpy(&qh, b.qh + 8*i + 4*half, sizeof(qh));
        const __m256i spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(qh), bytes), bits);
        w[i] = _mm256_or_si256(w[i], _mm256_and_si256(_mm256_cmpeq_epi8(spread, bits), _mm256_set1_epi8(0x10)));
    }
}

template <> inline void decode(const block_q8_0x8 & b, int half, __m256i, __m256i w[4]) {
    for (int i = 0; i < 4; ++i) {
        w[i] = _mm256_xor_si256(load_256(b.qs + 64*i + 32*half), _mm256_set1_epi8((char) 0x80));
    }
}

#if defined(REPACK_B32_512)
static inline void look_up(const uint8_t * qs, __m512i lut, __m512i w[4]) {
    const __m512i low = _mm512_set1_epi8(0x0f);
    for (int i = 0; i < 2; ++i) {
        const __m512i raw = _mm512_loadu_si512(qs + 64*i);
        w[i]     = _mm512_shuffle_epi8(lut, _mm512_and_si512(raw, low));
        w[i + 2] = _mm512_shuffle_epi8(lut, _mm512_and_si512(_mm512_srli_epi16(raw, 4), low));
    }
}

template <typename block_tx8> static inline void decode(const block_tx8 & b, __m512i lut, __m512i w[4]) {
    look_up((const uint8_t *) b.qs, lut, w);
}

template <> inline void decode(const block_q4_0x8 & b, __m512i, __m512i w[4]) {
    // (x & 0x0f) ^ 0x08
    const auto low = [](__m512i x) {
        return _mm512_ternarylogic_epi32(x, _mm512_set1_epi8(0x0f), _mm512_set1_epi8(0x08), 0x6a);
    };
    for (int i = 0; i < 2; ++i) {
        const __m512i raw = _mm512_loadu_si512(b.qs + 64*i);
        w[i]     = low(raw);
        w[i + 2] = low(_mm512_srli_epi16(raw, 4));
    }
}

template <> inline void decode(const block_q5_0x8 & b, __m512i, __m512i w[4]) {
    const __m512i low = _mm512_set1_epi8(0x0f);
    for (int i = 0; i < 2; ++i) {
        const __m512i raw = _mm512_loadu_si512(b.qs + 64*i);
        w[i]     = _mm512_and_si512(raw, low);
        w[i + 2] = _mm512_and_si512(_mm512_srli_epi16(raw, 4), low);
    }
    for (int i = 0; i < 4; ++i) {
        uint64_t qh;
        memcpy(&qh, b.qh + 8*i, sizeof(qh));
        w[i] = _mm512_mask_add_epi8(w[i], qh, w[i], _mm512_set1_epi8(0x10));
    }
}

template <> inline void decode(const block_q8_0x8 & b, __m512i, __m512i w[4]) {
    for (int i = 0; i < 4; ++i) {
        w[i] = _mm512_xor_si512(_mm512_loadu_si512(b.qs + 64*i), _mm512_set1_epi8((char) 0x80));
    }
}
#endif

// A tile of 8 columns of the result.
template <typename block_tx8> struct tile_256 {
    const block_tx8 * b;
    __m256i lut;
    // the columns in the order in which pairs of lanes are added
    const __m256i order = _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7);

    __m256i w[2][4]; // of four columns each, 8 weights at a time
    __m256  scales;

    tile_256(const block_tx8 * b, __m128i values) :
        b(b), lut(_mm256_broadcastsi128_si256(_mm_add_epi8(values, _mm_set1_epi8((char) bias<block_tx8>)))) {}

    void load(int64_t i) {
        decode(b[i], 0, lut, w[0]);
        decode(b[i], 1, lut, w[1]);
        scales = _mm256_permutevar8x32_ps(scales_256(b[i]), order);
    }

    // The block's products with a row's activations, 8 bytes of which lie every `stride`, scaled and added to acc.
    void add(__m256 & acc, const int8_t * qs, int stride, const int32_t start[2], float d) const {
        const __m256i a[4] = { repeat_256(qs), repeat_256(qs + stride), repeat_256(qs + 2*stride), repeat_256(qs + 3*stride) };
        const __m256i first = repeat_256(start);
        const __m256i sums  = _mm256_hadd_epi32(dot_256(first, w[0], a), dot_256(first, w[1], a));
        acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), _mm256_mul_ps(scales, _mm256_set1_ps(d)), acc);
    }

    using vector = __m256;
    static vector zero() { return _mm256_setzero_ps(); }
    void store(float * s, __m256 acc) const { _mm256_storeu_ps(s, _mm256_permutevar8x32_ps(acc, order)); }
};

#if defined(REPACK_B32_512)
// start, in two lanes of each column, + the products of 8 columns with a row's activations, 8 bytes of which lie every `stride`
static inline __m512i dot_512(const int32_t start[2], const __m512i w[4], const int8_t * qs, int stride) {
    int64_t bytes;
    memcpy(&bytes, start, sizeof(bytes));
    __m512i sums = _mm512_set1_epi64(bytes);
    for (int i = 0; i < 4; ++i) {
        memcpy(&bytes, qs + i*stride, sizeof(bytes));
        sums = _mm512_dpbusd_epi32(sums, w[i], _mm512_set1_epi64(bytes));
    }
    return sums;
}

// 8 columns, one after the other in memory
template <typename block_tx8> struct tile_512 {
    const block_tx8 * b;
    __m512i lut;

    __m512i w[4];
    __m256  scales;

    tile_512(const block_tx8 * b, __m128i values) :
        b(b), lut(_mm512_broadcast_i32x4(_mm_add_epi8(values, _mm_set1_epi8((char) bias<block_tx8>)))) {}

    void load(int64_t i) {
        decode(b[i], lut, w);
        scales = scales_256(b[i]);
    }

    void add(__m256 & acc, const int8_t * qs, int stride, const int32_t start[2], float d) const {
        __m512i sums = dot_512(start, w, qs, stride);
        sums = _mm512_add_epi32(sums, _mm512_srli_epi64(sums, 32));
        acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm512_cvtepi64_epi32(sums)), _mm256_mul_ps(scales, _mm256_set1_ps(d)), acc);
    }

    using vector = __m256;
    static vector zero() { return _mm256_setzero_ps(); }
    void store(float * s, __m256 acc) const { _mm256_storeu_ps(s, acc); }
};

template <typename block_tx8> using row_tile = tile_512<block_tx8>;
#else
template <typename block_tx8> using row_tile = tile_256<block_tx8>;
#endif

// Q fours of rows from `a` on, the columns of one tile; `s` is where their results begin, `bs` floats apart
template <int Q, typename block_tx8, typename tile_type>
static inline void multiply(tile_type tile, const block_q8_0x4 * a, int64_t nb, float * s, size_t bs) {
    typename tile_type::vector acc[4*Q];
    for (auto & v : acc) {
        v = tile_type::zero();
    }
    for (int64_t i = 0; i < nb; ++i) {
        tile.load(i);
        for (int q = 0; q < Q; ++q) {
            const block_q8_0x4 & block = a[q*nb + i];
            alignas(32) int32_t start[8];
            alignas(16) float   d[4];
            _mm256_store_si256((__m256i *) start, start_of<block_tx8>(block));
            _mm_store_ps(d, _mm_cvtph_ps(_mm_loadl_epi64((const __m128i *) block.d)));
            for (int r = 0; r < 4; ++r) {
                tile.add(acc[4*q + r], block.qs + 8*r, 32, start + 2*r, d[r]);
            }
        }
    }
    for (int r = 0; r < 4*Q; ++r) {
        tile.store(s + r*bs, acc[r]);
    }
}

// f(Q, tile, a, s) for all of `nr` rows of activations, Q fours from `a` on, and all of `nc` columns, a tile of them at a
// time; the results begin at `s`. Tiles are made of weights, nb blocks apart, and of `args`.
template <typename tile, typename block_b, typename block_a, typename F, typename... A>
static inline void for_tiles(const block_b * b, const block_a * a, int64_t nb, float * s, size_t bs, int nr, int nc, F f, A... args) {
    int64_t y = 0;
    const auto rows = [&](auto n_fours) {
        constexpr int Q = decltype(n_fours)::value;
        for (; y + Q <= nr / 4; y += Q) {
            for (int64_t x = 0; x < nc / 8; ++x) {
                f(n_fours, tile(b + x*nb, args...), a + y*nb, s + 4*y*bs + 8*x);
            }
        }
    };
    rows(std::integral_constant<int, 4>());
    rows(std::integral_constant<int, 2>());
    rows(std::integral_constant<int, 1>());
}

// The parameters are those of ggml_gemm_*; `values` are what nibbles stand for, where they stand for others than themselves.
template <typename block_tx8>
static void gemm(int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc, __m128i values = _mm_setzero_si128()) {
    const int64_t nb = n / QK8_0;
    const auto product = [&](auto n_fours, auto tile, const block_q8_0x4 * a, float * s) {
        multiply<decltype(n_fours)::value, block_tx8>(tile, a, nb, s, bs);
    };
    for_tiles<tile_256<block_tx8>>((const block_tx8 *) vx, (const block_q8_0x4 *) vy, nb, s, bs, nr, nc, product, values);
}

// One row. Its weights are read once, and memory gives them no faster than they are multiplied: what can be known of the
// activations alone is found first, and 8 columns follow 8 in memory.
struct activations {
    int32_t start[2]; // of the block's sums
    float   d;
};

template <typename block_tx8>
static activations * prepare(const block_q8_0 * a, int64_t nb) {
    static thread_local std::vector<activations> ret;
    ret.resize(nb);
    for (int64_t i = 0; i < nb; ++i) {
        int32_t sum = 0;
        for (const int8_t q : a[i].qs) {
            sum += q;
        }
        ret[i] = { { -bias<block_tx8>*sum, 0 }, GGML_CPU_FP16_TO_FP32(a[i].d) };
    }
    return ret.data();
}

template <typename block_tx8>
static void gemv(int n, float * s, const void * vx, const void * vy, int nc, __m128i values = _mm_setzero_si128()) {
    const int64_t nb = n / QK8_0;
    const auto * b = (const block_tx8  *) vx;
    const auto * a = (const block_q8_0 *) vy;
    const activations * prepared = prepare<block_tx8>(a, nb);

    for (int64_t x = 0; x < nc / 8; ++x, b += nb) {
        row_tile<block_tx8> tile(b, values);
        auto acc = tile.zero();
        for (int64_t i = 0; i < nb; ++i) {
            tile.load(i);
            tile.add(acc, a[i].qs, 8, prepared[i].start, prepared[i].d);
        }
        tile.store(s + 8*x, acc);
    }
}

// Blocks of 8 rows that lie `stride` blocks apart, interleaved.

static inline block_q5_0x8 interleave(const block_q5_0 * rows, int64_t stride) {
    block_q5_0x8 out;
    for (int row = 0; row < 8; ++row) {
        const block_q5_0 & in = rows[row*stride];
        out.d[row] = in.d;
        for (int i = 0; i < 4; ++i) {
            out.qh[8*i + row] = in.qh[i];
        }
        for (int i = 0; i < 2; ++i) {
            memcpy(out.qs + 64*i + 8*row, in.qs + 8*i, 8);
        }
    }
    return out;
}

static inline block_q8_0x8 interleave(const block_q8_0 * rows, int64_t stride) {
    block_q8_0x8 out;
    for (int row = 0; row < 8; ++row) {
        const block_q8_0 & in = rows[row*stride];
        out.d[row] = in.d;
        for (int i = 0; i < 4; ++i) {
            memcpy(out.qs + 64*i + 8*row, in.qs + 8*i, 8);
        }
    }
    return out;
}

template <typename block_tx8, typename block_t>
static int repack(ggml_tensor * t, const void * data, block_tx8 (* interleave)(const block_t * rows, int64_t stride)) {
    const int64_t nb = t->ne[0] / ggml_blck_size(t->type);
    auto       * out = (block_tx8 *) t->data;
    const auto * in  = (const block_t *) data;
    for (int64_t row = 0; row < ggml_nrows(t); row += 8) {
        for (int64_t i = 0; i < nb; ++i) {
            *out++ = interleave(in + row*nb + i, nb);
        }
    }
    return 0;
}

} // namespace repack_b32

#endif
