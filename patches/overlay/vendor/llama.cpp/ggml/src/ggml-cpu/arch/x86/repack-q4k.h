#pragma once

// Products of 8 interleaved rows of Q4_K with fours of rows of Q8_K, for AVX2 and what came after it, on the plan of
// repack-b32.h: weights stay as they lie in memory, and 8 bytes of activations are repeated beside them. The products
// of a sub-block fit 16 bits, so multiplying by its scale adds lanes in pairs as well. A block's sums are integers
// until its end.

#include "repack-b32.h"

#if defined(REPACK_B32)

namespace repack_q4k {

using repack_b32::load_256;
using repack_b32::repeat_256;

constexpr int N_SUB = 8;

// The scales and the mins of 8 rows, by sub-block.
struct scales_and_mins {
    uint8_t scales[N_SUB][8];
    uint8_t mins[N_SUB][8];

    explicit scales_and_mins(const block_q4_Kx8 & b) {
        for (int sub = 0; sub < N_SUB; ++sub) {
            uint32_t packed[3];
            memcpy(packed, b.scales + 12*sub, sizeof(packed));
            const uint32_t out[4] = {
                packed[0] & 0x3f3f3f3f, (packed[2]        & 0x0f0f0f0f) | ((packed[0] >> 2) & 0x30303030),
                packed[1] & 0x3f3f3f3f, ((packed[2] >> 4) & 0x0f0f0f0f) | ((packed[1] >> 2) & 0x30303030),
            };
            memcpy(scales[sub], out, 8);
            memcpy(mins[sub], out + 2, 8);
        }
    }
};

// Sums of 32 activations of four rows, two in the lane of (row, pair of sub-blocks).
struct sums_of_activations {
    alignas(32) int32_t pairs[16];

    explicit sums_of_activations(const block_q8_Kx4 & a) {
        const __m256i ones = _mm256_set1_epi16(1);
        for (int i = 0; i < 2; ++i) {
            const __m256i first  = _mm256_madd_epi16(load_256(a.bsums + 32*i),      ones);
            const __m256i second = _mm256_madd_epi16(load_256(a.bsums + 32*i + 16), ones);
            _mm256_store_si256((__m256i *) pairs + i, _mm256_packs_epi32(first, second));
        }
    }

    int32_t operator()(int row, int pair) const {
        return pairs[pair/2*8 + row/2*4 + pair%2*2 + row%2];
    }
};

// A tile of 8 columns of the result.
struct tile_256 {
    using vector = __m256;
    struct sums { __m256i v[2]; }; // of four columns each, two lanes a column

    const block_q4_Kx8 * b;
    // the columns in the order in which pairs of lanes are added
    const __m256i order = _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7);

    __m256i w[2][4];
    __m256i scale[2];
    __m256i mins[N_SUB/2]; // a pair of sub-blocks a lane
    __m256  d, dmin;
    uint8_t scales[N_SUB][8];

    explicit tile_256(const block_q4_Kx8 * b) : b(b) {}

    void load(int64_t i) {
        const scales_and_mins found(b[i]);
        memcpy(scales, found.scales, sizeof(scales));
        for (int pair = 0; pair < N_SUB/2; ++pair) {
            const __m128i even = _mm_loadl_epi64((const __m128i *) found.mins[2*pair]);
            const __m128i odd  = _mm_loadl_epi64((const __m128i *) found.mins[2*pair + 1]);
            const __m256i both = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(even, odd));
            mins[pair] = _mm256_permutevar8x32_epi32(both, order);
        }
        d    = _mm256_permutevar8x32_ps(repack_b32::scales_256(b[i].d),    order);
        dmin = _mm256_permutevar8x32_ps(repack_b32::scales_256(b[i].dmin), order);
    }

    void load(int64_t i, int sub) {
        const __m256i low = _mm256_set1_epi8(0x0f);
        const __m256i all = repeat_256(scales[sub]);
        for (int g = 0; g < 2; ++g) {
            for (int k = 0; k < 4; ++k) {
                const __m256i raw = load_256(b[i].qs + 256*(sub/2) + 64*k + 32*g);
                w[g][k] = _mm256_and_si256(sub % 2 ? _mm256_srli_epi16(raw, 4) : raw, low);
            }
            // each column's four times, 16 bits wide
            const int64_t c = 4*g;
            const __m256i which = _mm256_add_epi8(_mm256_set1_epi8((char) c), _mm256_setr_epi64x(
                (int64_t) 0x8000800080008000, (int64_t) 0x8001800180018001,
                (int64_t) 0x8002800280028002, (int64_t) 0x8003800380038003));
            scale[g] = _mm256_shuffle_epi8(all, which);
        }
    }

    static sums no_sums() { return { { _mm256_setzero_si256(), _mm256_setzero_si256() } }; }

    void add(sums & s, const int8_t * qs) const {
        const __m256i a[4] = { repeat_256(qs), repeat_256(qs + 32), repeat_256(qs + 64), repeat_256(qs + 96) };
        for (int g = 0; g < 2; ++g) {
            const __m256i p01 = _mm256_add_epi16(_mm256_maddubs_epi16(w[g][0], a[0]), _mm256_maddubs_epi16(w[g][1], a[1]));
            const __m256i p23 = _mm256_add_epi16(_mm256_maddubs_epi16(w[g][2], a[2]), _mm256_maddubs_epi16(w[g][3], a[3]));
            s.v[g] = _mm256_add_epi32(s.v[g], _mm256_madd_epi16(_mm256_add_epi16(p01, p23), scale[g]));
        }
    }

    void finish(__m256 & acc, const sums & s, const sums_of_activations & of, int row, float d_row) const {
        __m256i less = _mm256_setzero_si256();
        for (int pair = 0; pair < N_SUB/2; ++pair) {
            less = _mm256_add_epi32(less, _mm256_madd_epi16(mins[pair], _mm256_set1_epi32(of(row, pair))));
        }
        const __m256 scale_row = _mm256_set1_ps(d_row);
        acc = _mm256_fmadd_ps (_mm256_cvtepi32_ps(_mm256_hadd_epi32(s.v[0], s.v[1])), _mm256_mul_ps(d, scale_row), acc);
        acc = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(less), _mm256_mul_ps(dmin, scale_row), acc);
    }

    static vector zero() { return _mm256_setzero_ps(); }
    void store(float * s, __m256 acc) const { _mm256_storeu_ps(s, _mm256_permutevar8x32_ps(acc, order)); }
};

// Q fours of rows from `a` on, the columns of one tile; `s` is where their results begin, `bs` floats apart
template <int Q, typename tile_type>
static inline void multiply(tile_type tile, const block_q8_Kx4 * a, int64_t nb, float * s, size_t bs) {
    typename tile_type::vector acc[4*Q];
    for (auto & v : acc) {
        v = tile_type::zero();
    }
    for (int64_t i = 0; i < nb; ++i) {
        typename tile_type::sums sums[4*Q];
        for (auto & v : sums) {
            v = tile_type::no_sums();
        }
        tile.load(i);
        for (int sub = 0; sub < N_SUB; ++sub) {
            tile.load(i, sub);
            for (int q = 0; q < Q; ++q) {
                for (int r = 0; r < 4; ++r) {
                    tile.add(sums[4*q + r], a[q*nb + i].qs + 128*sub + 8*r);
                }
            }
        }
        for (int q = 0; q < Q; ++q) {
            const sums_of_activations of(a[q*nb + i]);
            for (int r = 0; r < 4; ++r) {
                tile.finish(acc[4*q + r], sums[4*q + r], of, r, a[q*nb + i].d[r]);
            }
        }
    }
    for (int r = 0; r < 4*Q; ++r) {
        tile.store(s + r*bs, acc[r]);
    }
}

// The parameters are those of ggml_gemm_q4_K_8x8_q8_K.
static void gemm(int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc) {
    const int64_t nb = n / QK_K;
    const auto product = [&](auto n_fours, auto tile, const block_q8_Kx4 * a, float * s) {
        multiply<decltype(n_fours)::value>(tile, a, nb, s, bs);
    };
    repack_b32::for_tiles<tile_256>((const block_q4_Kx8 *) vx, (const block_q8_Kx4 *) vy, nb, s, bs, nr, nc, product);
}

} // namespace repack_q4k

#endif
