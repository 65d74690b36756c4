#pragma once

// Repacked IQ4_XS, for processors with VNNI: its weights are too large for sums of 16 bits. Those of a sub-block are those of
// a block of IQ4_NL.

#include "repack-k.h"

#if defined(REPACK_B32_VNNI)

#define REPACK_IQ4XS

namespace repack_iq4xs {

using repack_k::N_SUB;

struct block_iq4_xsx8 {
    ggml_half d[8];
    struct {
        uint16_t high[8];
        uint8_t  low[N_SUB/2][8];
    } scales;
    uint8_t   qs[N_SUB][128]; // as in block_iq4_nlx8
};
static_assert(sizeof(block_iq4_xsx8) == 8*sizeof(block_iq4_xs), "wrong size");

// Blocks of 8 rows that lie `stride` blocks apart, interleaved.
static inline block_iq4_xsx8 interleave(const block_iq4_xs * rows, int64_t stride) {
    block_iq4_xsx8 out;
    for (int row = 0; row < 8; ++row) {
        const block_iq4_xs & in = rows[row*stride];
        out.d[row]           = in.d;
        out.scales.high[row] = in.scales_h;
        for (int i = 0; i < N_SUB/2; ++i) {
            out.scales.low[i][row] = in.scales_l[i];
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

template <> struct repack_k::format<repack_iq4xs::block_iq4_xsx8> {
    static constexpr int  n_scales = QK_K/32;
    static constexpr int  bias     = repack_b32::bias<block_iq4_nlx8>;
    static constexpr bool mins     = false;

    struct scales {
        int8_t values[n_scales][8];

        explicit scales(const decltype(repack_iq4xs::block_iq4_xsx8::scales) & from) {
            const __m128i high = _mm_loadu_si128((const __m128i *) from.high);
            for (int sub = 0; sub < n_scales; ++sub) {
                const __m128i both  = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *) from.low[sub/2]));
                const __m128i l     = _mm_and_si128(_mm_srli_epi16(both, sub%2*4), _mm_set1_epi16(0x0f));
                const __m128i h     = _mm_and_si128(_mm_srli_epi16(high, sub*2),   _mm_set1_epi16(0x03));
                const __m128i value = _mm_sub_epi16(_mm_or_si128(l, _mm_slli_epi16(h, 4)), _mm_set1_epi16(32));
                _mm_storel_epi64((__m128i *) values[sub], _mm_packs_epi16(value, value));
            }
        }
    };

    template <typename W, int sub> static void decode(const repack_iq4xs::block_iq4_xsx8 & b, int first, typename W::vector w[4]) {
        const __m128i values = _mm_loadu_si128((const __m128i *) kvalues_iq4nl);
        const auto    lut    = W::each_lane(_mm_add_epi8(values, _mm_set1_epi8((char) bias)));
        for (int k = 0; k < 2; ++k) {
            const auto raw = W::load(b.qs[sub] + 64*k + 8*first);
            w[k]     = W::look_up(lut, W::both(raw, W::set1(0x0f)));
            w[k + 2] = W::look_up(lut, W::both(W::template right<4>(raw), W::set1(0x0f)));
        }
    }
};

#endif
