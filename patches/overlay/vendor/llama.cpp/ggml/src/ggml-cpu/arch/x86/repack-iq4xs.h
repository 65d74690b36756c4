#pragma once

// Products of 8 interleaved rows of IQ4_XS with rows of Q8_K, for processors with VNNI, on the plan of repack-b32.h: the
// weights of a sub-block are those of a block of IQ4_NL. Its sums are multiplied by its scale as integers, and become
// floats at the end of the block of 256.

#include "repack-b32.h"

#if defined(REPACK_B32_VNNI)

#define REPACK_IQ4XS

namespace repack_iq4xs {

using repack_b32::dot_256;
#if defined(REPACK_B32_512)
using repack_b32::dot_512;
#endif
using repack_b32::look_up;
using repack_b32::repeat_256;
using repack_b32::scales_256;

constexpr int N_SUB = QK_K/32;

struct block_iq4_xsx8 {
    ggml_half d[8];
    uint16_t  scales_h[8];
    uint8_t   scales_l[N_SUB/2][8];
    uint8_t   qs[N_SUB][128]; // as in block_iq4_nlx8
};
static_assert(sizeof(block_iq4_xsx8) == 8*sizeof(block_iq4_xs), "wrong size");

constexpr int bias = repack_b32::bias<block_iq4_nlx8>;

// The scales of 8 rows, by sub-block.
struct scales {
    alignas(16) int16_t v[N_SUB][8];

    explicit scales(const block_iq4_xsx8 & b) {
        const __m128i high = _mm_loadu_si128((const __m128i *) b.scales_h);
        for (int sub = 0; sub < N_SUB; ++sub) {
            const __m128i both = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *) b.scales_l[sub/2]));
            const __m128i l    = _mm_and_si128(_mm_srli_epi16(both, sub%2*4), _mm_set1_epi16(0x0f));
            const __m128i h    = _mm_and_si128(_mm_srli_epi16(high, sub*2),   _mm_set1_epi16(0x03));
            _mm_store_si128((__m128i *) v[sub], _mm_sub_epi16(_mm_or_si128(l, _mm_slli_epi16(h, 4)), _mm_set1_epi16(32)));
        }
    }
};

// -bias * the sum of a row's 32 activations, by sub-block: where the sums of products start
struct starts {
    int32_t v[N_SUB][2]; // the second lane of a column starts at 0

    starts(const int16_t * bsums, int apart) { // two sums of 16, then `apart` further two
        for (int sub = 0; sub < N_SUB; ++sub) {
            const int16_t * of = bsums + sub/2*apart + sub%2*2;
            v[sub][0] = -bias*(of[0] + of[1]);
            v[sub][1] = 0;
        }
    }
};

static inline __m128i values() {
    return _mm_add_epi8(_mm_loadu_si128((const __m128i *) kvalues_iq4nl), _mm_set1_epi8((char) bias));
}

// A tile of 8 columns of the result.
struct tile_256 {
    using vector = __m256;
    struct sums { __m256i v[2]; }; // of four columns each, two lanes a column

    const block_iq4_xsx8 * b;
    const __m256i lut = _mm256_broadcastsi128_si256(values());
    // the columns in the order in which pairs of lanes are added
    const __m256i order = _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7);

    __m256i w[2][4];
    __m256i scale[2];
    __m256  d;
    alignas(32) int32_t scale_of[N_SUB][2][8];

    explicit tile_256(const block_iq4_xsx8 * b) : b(b) {}

    void load(int64_t i) {
        const scales found(b[i]);
        for (int sub = 0; sub < N_SUB; ++sub) {
            for (int g = 0; g < 2; ++g) {
                // each column's twice
                const __m256i v = _mm256_cvtepi16_epi64(_mm_loadl_epi64((const __m128i *) (found.v[sub] + 4*g)));
                _mm256_store_si256((__m256i *) scale_of[sub][g], _mm256_shuffle_epi32(v, _MM_SHUFFLE(2, 2, 0, 0)));
            }
        }
        d = _mm256_permutevar8x32_ps(scales_256(b[i].d), order);
    }

    void load(int64_t i, int sub) {
        for (int g = 0; g < 2; ++g) {
            look_up(b[i].qs[sub], g, lut, w[g]);
            scale[g] = _mm256_load_si256((const __m256i *) scale_of[sub][g]);
        }
    }

    static sums no_sums() { return { { _mm256_setzero_si256(), _mm256_setzero_si256() } }; }

    // the products with a row's activations, 8 bytes of which lie every `stride`
    void add(sums & s, const int8_t * qs, int stride, const int32_t start[2]) const {
        const __m256i a[4] = { repeat_256(qs), repeat_256(qs + stride), repeat_256(qs + 2*stride), repeat_256(qs + 3*stride) };
        const __m256i first = repeat_256(start);
        for (int g = 0; g < 2; ++g) {
            s.v[g] = _mm256_add_epi32(s.v[g], _mm256_mullo_epi32(dot_256(first, w[g], a), scale[g]));
        }
    }

    void finish(__m256 & acc, const sums & s, float d_row) const {
        acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_hadd_epi32(s.v[0], s.v[1])), _mm256_mul_ps(d, _mm256_set1_ps(d_row)), acc);
    }

    static vector zero() { return _mm256_setzero_ps(); }
    void store(float * s, __m256 acc) const { _mm256_storeu_ps(s, _mm256_permutevar8x32_ps(acc, order)); }
};

#if defined(REPACK_B32_512)
static inline __m512i scales_512(const int16_t * v) {
    return _mm512_shuffle_epi32(_mm512_cvtepi16_epi64(_mm_load_si128((const __m128i *) v)), (_MM_PERM_ENUM) _MM_SHUFFLE(2, 2, 0, 0));
}

// 8 columns, one after the other in memory
struct tile_512 {
    using vector = __m256;
    using sums   = __m512i;

    const block_iq4_xsx8 * b;
    const __m512i lut = _mm512_broadcast_i32x4(values());

    __m512i w[4];
    __m512i scale;
    __m256  d;
    __m512i scale_of[N_SUB];

    explicit tile_512(const block_iq4_xsx8 * b) : b(b) {}

    void load(int64_t i) {
        const scales found(b[i]);
        for (int sub = 0; sub < N_SUB; ++sub) {
            scale_of[sub] = scales_512(found.v[sub]);
        }
        d = scales_256(b[i].d);
    }

    void load(int64_t i, int sub) {
        look_up(b[i].qs[sub], lut, w);
        scale = scale_of[sub];
    }

    static sums no_sums() { return _mm512_setzero_si512(); }

    void add(sums & s, const int8_t * qs, int stride, const int32_t start[2]) const {
        s = _mm512_add_epi32(s, _mm512_mullo_epi32(dot_512(start, w, qs, stride), scale));
    }

    void finish(__m256 & acc, const sums & s, float d_row) const {
        const __m512i all = _mm512_add_epi32(s, _mm512_srli_epi64(s, 32));
        acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm512_cvtepi64_epi32(all)), _mm256_mul_ps(d, _mm256_set1_ps(d_row)), acc);
    }

    static vector zero() { return _mm256_setzero_ps(); }
    void store(float * s, __m256 acc) const { _mm256_storeu_ps(s, acc); }
};

using row_tile = tile_512;
#else
using row_tile = tile_256;
#endif

// Q fours of rows from `a` on, the columns of one tile; `s` is where their results begin, `bs` floats apart
template <int Q, typename tile_type>
static inline void multiply(tile_type tile, const block_q8_Kx4 * a, int64_t nb, float * s, size_t bs) {
    typename tile_type::vector acc[4*Q];
    for (auto & v : acc) {
        v = tile_type::zero();
    }
    for (int64_t i = 0; i < nb; ++i) {
        typename tile_type::sums sums[4*Q];
        alignas(8) int32_t       start[4*Q][N_SUB][2];
        for (int r = 0; r < 4*Q; ++r) {
            sums[r] = tile_type::no_sums();
            const starts found(a[r/4*nb + i].bsums + 4*(r%4), 16);
            memcpy(start[r], found.v, sizeof(found.v));
        }
        tile.load(i);
        for (int sub = 0; sub < N_SUB; ++sub) {
            tile.load(i, sub);
            for (int r = 0; r < 4*Q; ++r) {
                tile.add(sums[r], a[r/4*nb + i].qs + 128*sub + 8*(r%4), 32, start[r][sub]);
            }
        }
        for (int r = 0; r < 4*Q; ++r) {
            tile.finish(acc[r], sums[r], a[r/4*nb + i].d[r%4]);
        }
    }
    for (int r = 0; r < 4*Q; ++r) {
        tile.store(s + r*bs, acc[r]);
    }
}

// The parameters are those of ggml_gemm_*.
static void gemm(int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc) {
    const int64_t nb = n / QK_K;
    const auto product = [&](auto n_fours, auto tile, const block_q8_Kx4 * a, float * s) {
        multiply<decltype(n_fours)::value>(tile, a, nb, s, bs);
    };
    repack_b32::for_tiles<tile_256>((const block_iq4_xsx8 *) vx, (const block_q8_Kx4 *) vy, nb, s, bs, nr, nc, product);
}

static void gemv(int n, float * s, const void * vx, const void * vy, int nc) {
    const int64_t nb = n / QK_K;
    const auto * b = (const block_iq4_xsx8 *) vx;
    const auto * a = (const block_q8_K *) vy;

    static thread_local std::vector<starts> start;
    start.clear();
    for (int64_t i = 0; i < nb; ++i) {
        start.emplace_back(a[i].bsums, 4);
    }
    for (int64_t x = 0; x < nc / 8; ++x, b += nb) {
        row_tile tile(b);
        auto acc = tile.zero();
        for (int64_t i = 0; i < nb; ++i) {
            auto sums = tile.no_sums();
            tile.load(i);
            for (int sub = 0; sub < N_SUB; ++sub) {
                tile.load(i, sub);
                tile.add(sums, a[i].qs + 32*sub, 8, start[i].v[sub]);
            }
            tile.finish(acc, sums, a[i].d);
        }
        tile.store(s + 8*x, acc);
    }
}

// Blocks of 8 rows that lie `stride` blocks apart, interleaved.
static inline block_iq4_xsx8 interleave(const block_iq4_xs * rows, int64_t stride) {
    block_iq4_xsx8 out;
    for (int row = 0; row < 8; ++row) {
        const block_iq4_xs & in = rows[row*stride];
        out.d[row]        = in.d;
        out.scales_h[row] = in.scales_h;
        for (int i = 0; i < N_SUB/2; ++i) {
            out.scales_l[i][row] = in.scales_l[i];
        }
        for (int i = 0; i < QK_K/16; ++i) {
            memcpy(out.qs[i/2] + 64*(i%2) + 8*row, in.qs + 8*i, 8);
        }
    }
    return out;
}

static int repack(ggml_tensor * t, const void * data) {
    return repack_b32::repack(t, data, interleave);
}

} // namespace repack_iq4xs

#endif
