// The products on AMX tiles against those without, over types, shapes and numbers of rows. Tiles are emulated, so that
// processors without them can run it: AVX-512 with VNNI is enough.

#include <cstdio>

#if defined(__AVX512VNNI__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

namespace tiles {

// rows and bytes a row of each, as ggml_tile_config_init sets them
const int ROWS[]  = { 8, 8, 16, 16, 16, 16, 16, 16 };
const int BYTES[] = { 64, 64, 32, 32, 64, 64, 64, 64 };

int8_t data[8][16][64];

void load(int tile, const void * base, size_t stride) {
    for (int row = 0; row < ROWS[tile]; ++row) {
        memcpy(data[tile][row], (const char *) base + row*stride, BYTES[tile]);
    }
}

void store(int tile, void * base, size_t stride) {
    for (int row = 0; row < ROWS[tile]; ++row) {
        memcpy((char *) base + row*stride, data[tile][row], BYTES[tile]);
    }
}

// TDPBSSD of the Intel SDM
void dpbssd(int c, int a, int b) {
    for (int m = 0; m < ROWS[c]; ++m) {
        for (int n = 0; n < BYTES[c]/4; ++n) {
            int32_t sum;
            memcpy(&sum, data[c][m] + 4*n, sizeof(sum));
            for (int k = 0; k < BYTES[a]; ++k) {
                sum += data[a][m][k]*data[b][k/4][4*n + k%4];
            }
            memcpy(data[c][m] + 4*n, &sum, sizeof(sum));
        }
    }
}

} // namespace tiles

#undef  _tile_zero
#undef  _tile_loadd
#undef  _tile_stored
#undef  _tile_dpbssd
#define _tile_zero(t)                    memset(tiles::data[t], 0, sizeof(tiles::data[t]))
#define _tile_loadd(t, base, stride)     tiles::load(t, base, stride)
#define _tile_stored(t, base, stride)    tiles::store(t, base, stride)
#define _tile_dpbssd(c, a, b)            tiles::dpbssd(c, a, b)

#undef  __AMX_TILE__
#undef  __AMX_INT8__
#define __AMX_TILE__ 1
#define __AMX_INT8__ 1
#define GGML_COMMON_IMPL_CPP
#include "ggml-common.h"
#include "ggml-cpu.h"
#include "../ggml/src/ggml-cpu/repack.h"
#include "../ggml/src/ggml-cpu/arch/x86/repack-panels.h"

static bool with_tiles;

ggml_backend_buffer_type_t ggml_backend_amx_buffer_type() {
    static int any;
    return (ggml_backend_buffer_type_t) &any;
}

void ggml_amx_configure_tiles() {
    with_tiles = true;
}

// made when first asked for: nothing runs before main has asked what the processor can do
static uint32_t draw() {
    static std::mt19937 rng(1);
    return rng();
}

static void fill(ggml_half & h) { h = GGML_CPU_FP32_TO_FP16(0.5f + (draw() % 1000)/1000.0f); }

template <typename T> static void fill(T & b) {
    auto * bytes = (uint8_t *) &b;
    for (size_t i = 0; i < sizeof(b); ++i) {
        bytes[i] = draw();
    }
    if constexpr (std::is_same_v<T, block_mxfp4x8>) {
        for (auto & e : b.e) {
            e = 120 + e % 8;
        }
    } else {
        for (auto & d : b.d) {
            if constexpr (std::is_same_v<T, block_q8_Kx4>) {
                d = 0.5f + (draw() % 1000)/1000.0f;
            } else {
                fill(d);
            }
        }
    }
    if constexpr (std::is_same_v<T, repack_k::block_q4_kx8> || std::is_same_v<T, repack_k::block_q5_kx8>) {
        for (auto & d : b.dmin) {
            fill(d);
        }
    }
    if constexpr (std::is_same_v<T, block_q8_Kx4>) {
        for (int i = 0; i < QK_K/4; ++i) { // 16 activations of a row
            const int row = i/4 % 4;
            const int at  = (i/16*4 + i%4)*2; // groups of 8
            b.bsums[i] = 0;
            for (int k = 0; k < 16; ++k) {
                b.bsums[i] += b.qs[(at + k/8)*32 + row*8 + k%8];
            }
        }
    }
}

template <typename block_tx8> static bool test(const char * name, __m128i values = _mm_setzero_si128()) {
    using type    = repack_panels::weights<block_tx8>;
    using block_a = typename type::block_a;
    double worst = 0;
    int    n     = 0;
    for (const int n_in : { 32, 256, 1408, 2048, 10944 }) {
        if (n_in % (32*type::n_sub)) {
            continue;
        }
        const int64_t nb = n_in/(32*type::n_sub);
        for (const int nc : { 8, 16, 24, 32, 48, 104 }) {
            for (const int nr : { 12, 16, 20, 32, 44, 132, 268 }) {
                if ((int64_t) n_in*nc*nr > 20000000) {
                    continue;
                }
                std::vector<block_tx8> w(nc/8*nb);
                std::vector<block_a>   a(nr/4*nb);
                for (auto & b : w) {
                    fill(b);
                }
                for (auto & b : a) {
                    fill(b);
                }
                const size_t bs = nc + 5;
                std::vector<float> want(nr*bs, 7), got(nr*bs, 7);
                repack_x86::gemm_few<block_tx8>(n_in, want.data(), bs, w.data(), a.data(), nr, nc, values);
                with_tiles = false;
                repack_x86::gemm<block_tx8>(n_in, got.data(), bs, w.data(), a.data(), nr, nc, values);
                double error = with_tiles == (nc >= repack_panels::N_COLS && !type::halves) ? 0 : INFINITY, total = 0;
                for (size_t i = 0; i < got.size(); ++i) {
                    error += (double) (got[i] - want[i])*(got[i] - want[i]);
                    total += (double) want[i]*want[i];
                }
                worst = error >= 0 && error < INFINITY ? std::max(worst, error/total) : INFINITY;
                n++;
            }
        }
    }
    printf("%-8s %3d products, largest NMSE %g\n", name, n, worst);
    return n > 0 && worst < 1e-12;
}

int main() {
    if (!__builtin_cpu_supports("avx512vnni")) {
        printf("skipped: this processor has no AVX-512 VNNI\n");
        return 0;
    }
    ggml_cpu_init(); // fills tables
    const auto nibbles = [](const int8_t * values) { return _mm_loadu_si128((const __m128i *) values); };
    const __m128i signed_nibbles = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    const bool ok[] = {
        test<block_q4_0x8>("q4_0", signed_nibbles),
        test<repack_b32::block_q5_0x8>("q5_0"),
        test<block_q8_0x8>("q8_0"),
        test<block_iq4_nlx8>("iq4_nl", nibbles(kvalues_iq4nl)),
        test<block_mxfp4x8>("mxfp4", nibbles(kvalues_mxfp4)),
        test<repack_k::block_q4_kx8>("q4_K"),
        test<repack_k::block_q5_kx8>("q5_K"),
        test<repack_k::block_q6_kx8>("q6_K"), // without tiles
        test<repack_iq4xs::block_iq4_xsx8>("iq4_xs"),
    };
    for (const bool good : ok) {
        if (!good) {
            return 1;
        }
    }
    return 0;
}

#else
int main() {
    printf("skipped: built without AVX-512 VNNI\n");
}
#endif
