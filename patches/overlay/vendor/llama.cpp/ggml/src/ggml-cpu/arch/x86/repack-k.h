#pragma once

// Products of 8 interleaved rows of Q2_K to Q6_K and IQ4_XS with rows of Q8_K, for AVX2 and what came after it, on the
// plan of repack-b32.h: weights stay as they lie in memory, and 8 bytes of activations are repeated beside them. A block's
// sums are integers until its end. With VNNI the products of a scale's weights are added in 32 bits, and start at what
// makes weights unsigned. Without it they are added in 16, which must hold them, so that multiplying by the scale adds
// lanes in pairs; the rest is subtracted as the mins of Q4_K are.

#include "repack-b32.h"

#include <array>
#include <utility>

#if defined(REPACK_B32)

namespace repack_k {


constexpr int N_SUB = QK_K/32; // sub-blocks: what tiles load at a time

// Layouts of our own: what a product needs next lies next, or memory is read at two thirds of its speed.

struct block_q2_kx8 {
    ggml_half d[8];
    ggml_half dmin[8];
    uint8_t   scales[QK_K/16][8]; // and mins
    uint8_t   qs[2][4][8][8];     // by 128 weights: 8 bytes of each row in turn
};
static_assert(sizeof(block_q2_kx8) == 8*sizeof(block_q2_K), "wrong size");

struct block_q3_kx8 {
    ggml_half d[8];
    uint32_t  scales[3][8];       // four bytes of each row in turn
    uint8_t   high[4][8][8];
    uint8_t   qs[2][4][8][8];
};
static_assert(sizeof(block_q3_kx8) == 8*sizeof(block_q3_K), "wrong size");

struct block_q4_kx8 {
    ggml_half d[8];
    ggml_half dmin[8];
    uint32_t  scales[3][8];    // four bytes of each row in turn
    uint8_t   qs[4][4][8][8];  // by 64 weights: 8 bytes of each row in turn
};
static_assert(sizeof(block_q4_kx8) == 8*sizeof(block_q4_K), "wrong size");

struct block_q5_kx8 {
    ggml_half d[8];
    ggml_half dmin[8];
    uint32_t  scales[3][8];
    uint8_t   high[4][8][8];
    uint8_t   qs[4][4][8][8];
};
static_assert(sizeof(block_q5_kx8) == 8*sizeof(block_q5_K), "wrong size");

struct block_q6_kx8 {
    ggml_half d[8];
    int8_t    scales[QK_K/16][8];
    struct {
        uint8_t even[4][8][8]; // low bits of the first and third 32 weights
        uint8_t high[4][8][8];
        uint8_t odd[4][8][8];
    } parts[2];
};
static_assert(sizeof(block_q6_kx8) == 8*sizeof(block_q6_K), "wrong size");

// Bytes of one row to where 8 of each row lie in turn.
template <int n> static inline void interleave(uint8_t (* out)[8][8], int row, const uint8_t * in) {
    for (int k = 0; k < n/8; ++k) {
        memcpy(out[k][row], in + 8*k, 8);
    }
}

// Blocks of 8 rows that lie `stride` blocks apart, interleaved.

static inline block_q2_kx8 interleave(const block_q2_K * rows, int64_t stride) {
    block_q2_kx8 out;
    for (int row = 0; row < 8; ++row) {
        const block_q2_K & in = rows[row*stride];
        out.d[row]    = in.GGML_COMMON_AGGR_U.GGML_COMMON_AGGR_S.d;
        out.dmin[row] = in.GGML_COMMON_AGGR_U.GGML_COMMON_AGGR_S.dmin;
        for (int i = 0; i < QK_K/16; ++i) {
            out.scales[i][row] = in.scales[i];
        }
        interleave<QK_K/4>(out.qs[0], row, in.qs);
    }
    return out;
}

static inline block_q3_kx8 interleave(const block_q3_K * rows, int64_t stride) {
    block_q3_kx8 out;
    for (int row = 0; row < 8; ++row) {
        const block_q3_K & in = rows[row*stride];
        out.d[row] = in.d;
        for (int i = 0; i < 3; ++i) {
            memcpy(&out.scales[i][row], in.scales + 4*i, 4);
        }
        interleave<QK_K/8>(out.high, row, in.hmask);
        interleave<QK_K/4>(out.qs[0], row, in.qs);
    }
    return out;
}

template <typename block_tx8, typename block_t>
static inline void interleave_with_mins(block_tx8 & out, int row, const block_t & in) {
    out.d[row]    = in.GGML_COMMON_AGGR_U.GGML_COMMON_AGGR_S.d;
    out.dmin[row] = in.GGML_COMMON_AGGR_U.GGML_COMMON_AGGR_S.dmin;
    for (int i = 0; i < 3; ++i) {
        memcpy(&out.scales[i][row], in.scales + 4*i, 4);
    }
    interleave<QK_K/2>(out.qs[0], row, in.qs);
}

static inline block_q4_kx8 interleave(const block_q4_K * rows, int64_t stride) {
    block_q4_kx8 out;
    for (int row = 0; row < 8; ++row) {
        interleave_with_mins(out, row, rows[row*stride]);
    }
    return out;
}

static inline block_q5_kx8 interleave(const block_q5_K * rows, int64_t stride) {
    block_q5_kx8 out;
    for (int row = 0; row < 8; ++row) {
        interleave_with_mins(out, row, rows[row*stride]);
        interleave<QK_K/8>(out.high, row, rows[row*stride].qh);
    }
    return out;
}

static inline block_q6_kx8 interleave(const block_q6_K * rows, int64_t stride) {
    block_q6_kx8 out;
    for (int row = 0; row < 8; ++row) {
        const block_q6_K & in = rows[row*stride];
        out.d[row] = in.d;
        for (int i = 0; i < QK_K/16; ++i) {
            out.scales[i][row] = in.scales[i];
        }
        for (int part = 0; part < 2; ++part) {
            interleave<32>(out.parts[part].even, row, in.ql + 64*part);
            interleave<32>(out.parts[part].odd,  row, in.ql + 64*part + 32);
            interleave<32>(out.parts[part].high, row, in.qh + 32*part);
        }
    }
    return out;
}

// Vectors of whole columns, 8 bytes of each.

struct wide_256 {
    using vector = __m256i;
    static constexpr int n_cols = 4;
#if defined(REPACK_B32_VNNI)
    static constexpr bool vnni = true;
#else
    static constexpr bool vnni = false;
#endif

    static vector set1(int v)                   { return _mm256_set1_epi8((char) v); }
    static vector load(const void * p)          { return repack_b32::load_256(p); }
    static vector repeat(const void * p)        { return repack_b32::repeat_256(p); }
    static vector each_lane(__m128i v)          { return _mm256_broadcastsi128_si256(v); }
    static vector look_up(vector lut, vector v) { return _mm256_shuffle_epi8(lut, v); }
    template <int bits>
    static vector right(vector v)               { return bits < 0 ? _mm256_slli_epi16(v, -bits & 15) : _mm256_srli_epi16(v, bits & 15); }
    static vector both(vector a, vector b)      { return _mm256_and_si256(a, b); }
    static vector either(vector a, vector b)    { return _mm256_or_si256(a, b); }

    // a byte of each column, in 32 bits twice or in 16 bits four times
    static vector scales(const int8_t * v) {
        int32_t bytes;
        memcpy(&bytes, v, sizeof(bytes));
        const __m256i in_64 = _mm256_cvtepi8_epi64(_mm_cvtsi32_si128(bytes));
        return vnni ? _mm256_shuffle_epi32(in_64, _MM_SHUFFLE(2, 2, 0, 0)) : _mm256_shuffle_epi8(in_64, _mm256_setr_epi64x(
            0x0100010001000100, 0x0908090809080908, 0x0100010001000100, 0x0908090809080908));
    }

    // sum + scale*(start + the products of w[i] and a[i]); starts are those of VNNI
    template <int n> static vector add(vector sum, vector scale, vector start, const vector w[n], const vector a[n]) {
#if defined(REPACK_B32_VNNI)
        return _mm256_add_epi32(sum, _mm256_mullo_epi32(scale, repack_b32::dot_256<n>(start, w, a)));
#else
        vector products = _mm256_maddubs_epi16(w[0], a[0]);
        for (int i = 1; i < n; ++i) {
            products = _mm256_add_epi16(products, _mm256_maddubs_epi16(w[i], a[i]));
        }
        return _mm256_add_epi32(sum, _mm256_madd_epi16(products, scale));
#endif
    }

    // pairs of lanes added: 8 columns, in an order that in_order undoes
    static __m256i sums(const vector v[2]) { return _mm256_hadd_epi32(v[0], v[1]); }
    static __m256  in_order(__m256 v)      { return _mm256_permutevar8x32_ps(v, _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7)); }
};

#if defined(REPACK_B32_512)
struct wide_512 {
    using vector = __m512i;
    static constexpr int  n_cols = 8;
    static constexpr bool vnni   = true;

    static vector set1(int v)                   { return _mm512_set1_epi8((char) v); }
    static vector load(const void * p)          { return _mm512_loadu_si512(p); }
    static vector repeat(const void * p)        { int64_t v; memcpy(&v, p, sizeof(v)); return _mm512_set1_epi64(v); }
    static vector each_lane(__m128i v)          { return _mm512_broadcast_i32x4(v); }
    static vector look_up(vector lut, vector v) { return _mm512_shuffle_epi8(lut, v); }
    template <int bits>
    static vector right(vector v)               { return bits < 0 ? _mm512_slli_epi16(v, -bits & 15) : _mm512_srli_epi16(v, bits & 15); }
    static vector both(vector a, vector b)      { return _mm512_and_si512(a, b); }
    static vector either(vector a, vector b)    { return _mm512_or_si512(a, b); }

    static vector scales(const int8_t * v) {
        const __m512i in_64 = _mm512_cvtepi8_epi64(_mm_loadl_epi64((const __m128i *) v));
        return _mm512_shuffle_epi32(in_64, (_MM_PERM_ENUM) _MM_SHUFFLE(2, 2, 0, 0));
    }

    template <int n> static vector add(vector sum, vector scale, vector start, const vector w[n], const vector a[n]) {
        for (int i = 0; i < n; ++i) {
            start = _mm512_dpbusd_epi32(start, w[i], a[i]);
        }
        return _mm512_add_epi32(sum, _mm512_mullo_epi32(scale, start));
    }

    static __m256i sums(const vector v[1]) { return _mm512_cvtepi64_epi32(_mm512_add_epi32(v[0], _mm512_srli_epi64(v[0], 32))); }
    static __m256  in_order(__m256 v)      { return v; }
};

using wide = wide_512;
#else
using wide = wide_256;
#endif

// What there is to know of a type: how many scales a block has, whether it has mins, `bias`, which makes weights unsigned,
// the scales of 8 columns, and the unsigned weights of a sub-block from column `first` on.
template <typename block_tx8> struct format;

// four bytes of each of 8 rows to rows' bytes, four times
static inline void store_rows_bytes(int8_t * out, __m256i v) {
    const __m256i each = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m256i rows = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256((__m256i *) out, _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(v, each), rows));
}

template <> struct format<block_q2_kx8> {
    static constexpr int  n_scales = QK_K/16;
    static constexpr int  bias     = 0;
    static constexpr bool mins     = true;

    struct scales {
        int8_t values[n_scales][8];
        int8_t mins[n_scales][8];

        explicit scales(const uint8_t (& from)[n_scales][8]) {
            const __m256i four = _mm256_set1_epi8(0x0f);
            for (int i = 0; i < n_scales; i += 4) {
                const __m256i both = repack_b32::load_256(from[i]);
                _mm256_storeu_si256((__m256i *) values[i], _mm256_and_si256(both, four));
                _mm256_storeu_si256((__m256i *) mins[i],   _mm256_and_si256(_mm256_srli_epi16(both, 4), four));
            }
        }
    };

    template <typename W, int sub> static void decode(const block_q2_kx8 & b, int first, typename W::vector w[4]) {
        for (int k = 0; k < 4; ++k) {
            w[k] = W::both(W::template right<sub%4*2>(W::load(b.qs[sub/4][k][first])), W::set1(0x03));
        }
    }
};

template <> struct format<block_q3_kx8> {
    static constexpr int  n_scales = QK_K/16;
    static constexpr int  bias     = 4;
    static constexpr bool mins     = false;

    struct scales {
        int8_t values[n_scales][8];

        // as dequantize_row_q3_K of ggml-quants.c: 4 bits of each, then 2 of each
        explicit scales(const uint32_t (& from)[3][8]) {
            const __m256i a = repack_b32::load_256(from[0]), b = repack_b32::load_256(from[1]), c = repack_b32::load_256(from[2]);
            const __m256i four = _mm256_set1_epi8(0x0f), high = _mm256_set1_epi8(0x30);
            const auto joined = [&](__m256i low, __m256i of) {
                const __m256i six = _mm256_or_si256(_mm256_and_si256(low, four), _mm256_and_si256(of, high));
                return _mm256_sub_epi8(six, _mm256_set1_epi8(32));
            };
            store_rows_bytes(values[0],  joined(a, _mm256_slli_epi16(c, 4)));
            store_rows_bytes(values[4],  joined(b, _mm256_slli_epi16(c, 2)));
            store_rows_bytes(values[8],  joined(_mm256_srli_epi16(a, 4), c));
            store_rows_bytes(values[12], joined(_mm256_srli_epi16(b, 4), _mm256_srli_epi16(c, 2)));
        }
    };

    template <typename W, int sub> static void decode(const block_q3_kx8 & b, int first, typename W::vector w[4]) {
        for (int k = 0; k < 4; ++k) {
            const auto low  = W::template right<sub%4*2>(W::load(b.qs[sub/4][k][first]));
            const auto high = W::template right<sub - 2>(W::load(b.high[k][first]));
            w[k] = W::either(W::both(low, W::set1(0x03)), W::both(high, W::set1(0x04)));
        }
    }
};

// Q4_K and Q5_K: scales and mins of 6 bits
struct format_with_mins {
    static constexpr int  n_scales = QK_K/32;
    static constexpr int  bias     = 0;
    static constexpr bool mins     = true;

    struct scales {
        int8_t values[n_scales][8];
        int8_t mins[n_scales][8];

        // as get_scale_min_k4 of ggml-quants.c
        explicit scales(const uint32_t (& from)[3][8]) {
            const __m256i a = repack_b32::load_256(from[0]), b = repack_b32::load_256(from[1]), c = repack_b32::load_256(from[2]);
            const __m256i six = _mm256_set1_epi8(0x3f), four = _mm256_set1_epi8(0x0f), high = _mm256_set1_epi8(0x30);
            const auto joined = [&](__m256i low, __m256i of) {
                return _mm256_or_si256(_mm256_and_si256(low, four), _mm256_and_si256(_mm256_srli_epi16(of, 2), high));
            };
            store_rows_bytes(values[0], _mm256_and_si256(a, six));
            store_rows_bytes(values[4], joined(c, a));
            store_rows_bytes(mins[0],   _mm256_and_si256(b, six));
            store_rows_bytes(mins[4],   joined(_mm256_srli_epi16(c, 4), b));
        }
    };
};

template <> struct format<block_q4_kx8> : format_with_mins {
    template <typename W, int sub> static void decode(const block_q4_kx8 & b, int first, typename W::vector w[4]) {
        for (int k = 0; k < 4; ++k) {
            w[k] = W::both(W::template right<sub%2*4>(W::load(b.qs[sub/2][k][first])), W::set1(0x0f));
        }
    }
};

template <> struct format<block_q5_kx8> : format_with_mins {
    template <typename W, int sub> static void decode(const block_q5_kx8 & b, int first, typename W::vector w[4]) {
        for (int k = 0; k < 4; ++k) {
            const auto low  = W::template right<sub%2*4>(W::load(b.qs[sub/2][k][first]));
            const auto high = W::template right<sub - 4>(W::load(b.high[k][first]));
            w[k] = W::either(W::both(low, W::set1(0x0f)), W::both(high, W::set1(0x10)));
        }
    }
};

template <> struct format<block_q6_kx8> {
    static constexpr int  n_scales = QK_K/16;
    static constexpr int  bias     = 32;
    static constexpr bool mins     = false;

    struct scales {
        int8_t values[n_scales][8];

        explicit scales(const int8_t (& from)[n_scales][8]) { memcpy(values, from, sizeof(values)); }
    };

    template <typename W, int sub> static void decode(const block_q6_kx8 & b, int first, typename W::vector w[4]) {
        const auto & part = b.parts[sub/4];
        for (int k = 0; k < 4; ++k) {
            const auto low  = W::template right<sub%4/2*4>(W::load((sub%2 ? part.odd : part.even)[k][first]));
            const auto high = W::template right<sub%4*2 - 4>(W::load(part.high[k][first]));
            w[k] = W::either(W::both(low, W::set1(0x0f)), W::both(high, W::set1(0x30)));
        }
    }
};

// f of each sub-block, a constant, as shifts by constants are cheaper
template <typename F, int... sub> static inline void for_each_of(std::integer_sequence<int, sub...>, F f) {
    (f(std::integral_constant<int, sub>()), ...);
}

template <typename F> static inline void for_subs(F f) {
    for_each_of(std::make_integer_sequence<int, N_SUB>(), f);
}

// A tile of 8 columns of the result.
template <typename W, typename block_tx8> struct tile {
    using format = repack_k::format<block_tx8>;
    using block  = block_tx8;
    using vector = __m256;
    using wide   = typename W::vector;
    static constexpr int  n_scales = format::n_scales;
    static constexpr int  n_each   = n_scales/N_SUB; // scales a sub-block
    static constexpr int  n_wide   = 8/W::n_cols;
    static constexpr bool starts   = format::bias != 0 && W::vnni;
    static constexpr bool less     = format::mins || (format::bias != 0 && !W::vnni); // whether something is subtracted

    struct sums { wide v[n_wide]; }; // two lanes a column

    // What is known of a row of activations, from the sums of 16 of them: four, and `apart` further the next four.
    struct row {
        std::array<int32_t[2], starts ? n_scales : 0> start; // the second lane of a column starts at 0
        std::array<int16_t[2], less ? n_scales/2 : 0> pairs; // sums over the weights of each scale

        row(const int16_t * bsums, int apart) {
            for (int i = 0; i < n_scales; ++i) {
                const int first = i*QK_K/16/n_scales;
                int32_t   sum   = 0;
                for (int k = first; k < first + QK_K/16/n_scales; ++k) {
                    sum += bsums[k/4*apart + k%4];
                }
                if constexpr (starts) {
                    start[i][0] = -format::bias*sum;
                    start[i][1] = 0;
                }
                if constexpr (less) {
                    pairs[i/2][i%2] = (int16_t) sum;
                }
            }
        }
    };

    struct part { // a sub-block
        wide w[n_wide][4];
        wide scale[n_wide][n_each];
    };

    const block_tx8 * b;
    int8_t scales[n_scales][8];
    __m256 d;
    __m256 d_less;
    std::array<__m256i, less ? n_scales/2 : 0> factors; // of the sums of activations

    explicit tile(const block_tx8 * b) : b(b) {}

    void load(int64_t i) {
        const typename format::scales found(b[i].scales);
        memcpy(scales, found.values, sizeof(scales));
        d = W::in_order(repack_b32::scales_256(b[i].d));
        if constexpr (format::mins) {
            load_less(found.mins, repack_b32::scales_256(b[i].dmin));
        } else if constexpr (less) {
            load_less(found.values, _mm256_mul_ps(repack_b32::scales_256(b[i].d), _mm256_set1_ps(format::bias)));
        }
    }

    void load_less(const int8_t v[n_scales][8], __m256 d) {
        d_less = W::in_order(d);
        for (int pair = 0; pair < n_scales/2; ++pair) {
            const __m128i first  = _mm_loadl_epi64((const __m128i *) v[2*pair]);
            const __m128i second = _mm_loadl_epi64((const __m128i *) v[2*pair + 1]);
            const __m256i both   = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(first, second));
            factors[pair] = _mm256_castps_si256(W::in_order(_mm256_castsi256_ps(both)));
        }
    }

    template <int sub> part load(int64_t i) const {
        part ret;
        for (int x = 0; x < n_wide; ++x) {
            format::template decode<W, sub>(b[i], W::n_cols*x, ret.w[x]);
            for (int e = 0; e < n_each; ++e) {
                ret.scale[x][e] = W::scales(scales[n_each*sub + e] + W::n_cols*x);
            }
        }
        return ret;
    }

    // the products with a row's activations, 8 bytes of which lie every `stride`
    template <int sub> static void add(sums & s, const part & p, const int8_t * qs, int stride, const row & of) {
        const wide a[4] = { W::repeat(qs), W::repeat(qs + stride), W::repeat(qs + 2*stride), W::repeat(qs + 3*stride) };
        for (int e = 0; e < n_each; ++e) {
            wide start = {};
            if constexpr (starts) {
                start = W::repeat(of.start[n_each*sub + e]);
            }
            for (int x = 0; x < n_wide; ++x) {
                constexpr int n = 4/n_each;
                s.v[x] = W::template add<n>(s.v[x], p.scale[x][e], start, p.w[x] + n*e, a + n*e);
            }
        }
    }

    void finish(__m256 & acc, const sums & s, const row & of, float d_row) const {
        const __m256 scale_row = _mm256_set1_ps(d_row);
        acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(W::sums(s.v)), _mm256_mul_ps(d, scale_row), acc);
        if constexpr (less) {
            __m256i sum = _mm256_setzero_si256();
            for (int pair = 0; pair < n_scales/2; ++pair) {
                int32_t both;
                memcpy(&both, of.pairs[pair], sizeof(both));
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(factors[pair], _mm256_set1_epi32(both)));
            }
            acc = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(d_less, scale_row), acc);
        }
    }

    static vector zero() { return _mm256_setzero_ps(); }
    void store(float * s, __m256 acc) const { _mm256_storeu_ps(s, W::in_order(acc)); }
};

// Q fours of rows from `a` on, the columns of one tile; `known` is what is known of the rows, `s` is where their results
// begin, `bs` floats apart
template <int Q, typename tile_type>
static inline void multiply(tile_type tile, const block_q8_Kx4 * a, const typename tile_type::row * known, int64_t nb, float * s, size_t bs) {
    typename tile_type::vector acc[4*Q];
    for (auto & v : acc) {
        v = tile_type::zero();
    }
    for (int64_t i = 0; i < nb; ++i) {
        typename tile_type::sums sums[4*Q] = {};
        tile.load(i);
        for_subs([&](auto n) {
            constexpr int sub = decltype(n)::value;
            const auto part = tile.template load<sub>(i);
            for (int r = 0; r < 4*Q; ++r) {
                const int64_t block = r/4*nb + i;
                tile.template add<sub>(sums[r], part, a[block].qs + 128*sub + 8*(r%4), 32, known[4*block + r%4]);
            }
        });
        for (int r = 0; r < 4*Q; ++r) {
            const int64_t block = r/4*nb + i;
            tile.finish(acc[r], sums[r], known[4*block + r%4], a[block].d[r%4]);
        }
    }
    for (int r = 0; r < 4*Q; ++r) {
        tile.store(s + r*bs, acc[r]);
    }
}

// The parameters of both are those of ggml_gemm_* and ggml_gemv_*.

template <typename block_tx8>
static void gemm(int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc) {
    using tile_type = tile<wide_256, block_tx8>;
    const int64_t nb = n / QK_K;
    const auto * first = (const block_q8_Kx4 *) vy;

    static thread_local std::vector<typename tile_type::row> known;
    known.clear();
    for (int64_t i = 0; i < nr/4*nb; ++i) {
        for (int r = 0; r < 4; ++r) {
            known.emplace_back(first[i].bsums + 4*r, 16);
        }
    }
    const auto product = [&](auto n_fours, auto tile, const block_q8_Kx4 * a, float * s) {
        multiply<decltype(n_fours)::value>(tile, a, known.data() + 4*(a - first), nb, s, bs);
    };
    repack_b32::for_tiles<tile_type>((const block_tx8 *) vx, first, nb, s, bs, nr, nc, product);
}

template <typename block_tx8>
static void gemv(int n, float * s, const void * vx, const void * vy, int nc) {
    using tile_type = tile<wide, block_tx8>;
    const int64_t nb = n / QK_K;
    const auto * b = (const block_tx8 *) vx;
    const auto * a = (const block_q8_K *) vy;

    static thread_local std::vector<typename tile_type::row> known;
    known.clear();
    for (int64_t i = 0; i < nb; ++i) {
        known.emplace_back(a[i].bsums, 4);
    }
    for (int64_t x = 0; x < nc / 8; ++x, b += nb) {
        tile_type tile(b);
        auto acc = tile.zero();
        for (int64_t i = 0; i < nb; ++i) {
            typename tile_type::sums sums = {};
            tile.load(i);
            for_subs([&](auto n) {
                constexpr int sub = decltype(n)::value;
                tile.template add<sub>(sums, tile.template load<sub>(i), a[i].qs + 32*sub, 8, known[i]);
            });
            tile.finish(acc, sums, known[i], a[i].d);
        }
        tile.store(s + 8*x, acc);
    }
}

} // namespace repack_k

#endif
