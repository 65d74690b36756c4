#pragma once

// Products of 8 interleaved rows with many rows of activations, for AVX-512 with VNNI and for AMX. Weights are unpacked once
// for all rows of activations, 32 columns at a time, to bytes in the order in which products take them: four of each column
// in turn. A product spans 32 weights, the blocks of most types, or each half of them; its sums become floats there.

#include "repack-b32.h"
#include "repack-iq4xs.h"
#include "repack-k.h"

#if defined(REPACK_B32_512)

#define REPACK_PANELS

#include <algorithm>
#include <atomic>

#if defined(__AMX_TILE__) && defined(__AMX_INT8__)
#define REPACK_AMX
#include "amx/amx.h"
#endif

namespace repack_panels {

constexpr int N_BLOCK  = 32;  // weights a product spans
constexpr int N_ROWS   = 16;  // of activations at a time
constexpr int N_COLS   = 16;  // of weights in a register
constexpr int N_GROUP  = 4;   // blocks that lie together
constexpr int MIN_ROWS = 8;   // for fewer, unpacking costs more than it saves
constexpr int MAX_ROWS = 128; // of activations: they stay in the second level of cache

// A group of blocks of 16 rows of activations.
struct group_a {
    int8_t  qs[N_GROUP][N_ROWS][N_BLOCK];
    float   d[N_ROWS][N_GROUP];
    float   sums[2][N_ROWS][N_GROUP];   // of qs, and of their second halves
    int32_t starts[2][N_ROWS][N_GROUP]; // of sums of products with biased weights, and of those of second halves
};

// A group of blocks of 16 columns of weights.
struct group_b {
    uint8_t qs[N_GROUP][N_BLOCK/4][N_COLS][4];
    float   d[N_GROUP][N_COLS];
    float   halves[N_GROUP][N_COLS];  // scales of second halves
    float   mins[2][N_GROUP][N_COLS]; // and those of second halves
};

// What there is to know of a type: how to find the weights of 8 columns of a block, plus `bias`, which makes them unsigned,
// and their scales, times those of the whole block.

template <typename block_tx8> struct weights {
    using block_a = block_q8_0x4;
    static constexpr int  n_sub     = 1;    // blocks of 32 in a block
    static constexpr bool own_scale = true; // activations have a scale each block of 32
    static constexpr bool mins      = false;
    static constexpr bool halves    = false; // whether halves of a block have scales of their own
    static constexpr int  bias      = repack_b32::bias<block_tx8>;

    static __m512i lut(__m128i values) {
        return _mm512_broadcast_i32x4(_mm_add_epi8(values, _mm_set1_epi8((char) bias)));
    }

    template <int /* sub */> static void decode(const block_tx8 & b, __m512i lut, __m512i w[4]) {
        repack_b32::decode(b, lut, w);
    }

    static void scales(group_b * out, const block_tx8 & b, int half, int64_t i) {
        _mm256_storeu_ps(out[i/N_GROUP].d[i%N_GROUP] + 8*half, repack_b32::scales_256(b));
    }
};

// those of repack-k.h
template <typename block_tx8> struct weights_k {
    using block_a = block_q8_Kx4;
    using format  = repack_k::format<block_tx8>;
    static constexpr int  n_sub     = QK_K/N_BLOCK;
    static constexpr bool own_scale = false;
    static constexpr bool halves    = format::n_scales > n_sub;
    static constexpr bool mins      = format::mins;
    static constexpr int  bias      = format::bias;

    static __m512i lut(__m128i) {
        return _mm512_setzero_si512();
    }

    template <int sub> static void decode(const block_tx8 & b, __m512i /* lut */, __m512i w[4]) {
        format::template decode<repack_k::wide_512, sub>(b, 0, w);
    }

    static void scales(group_b * out, const block_tx8 & b, int half, int64_t i) {
        const auto times = [](__m256 d, const int8_t v[8]) {
            return _mm256_mul_ps(d, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) v))));
        };
        const __m256 d = repack_b32::scales_256(b.d);
        const typename format::scales found(b.scales);
        for (int sub = 0; sub < n_sub; ++sub) {
            group_b & g = out[(n_sub*i + sub)/N_GROUP];
            _mm256_storeu_ps(g.d[sub%N_GROUP] + 8*half, times(d, found.values[halves ? 2*sub : sub]));
            if constexpr (halves) {
                _mm256_storeu_ps(g.halves[sub%N_GROUP] + 8*half, times(d, found.values[2*sub + 1]));
            }
            if constexpr (mins) {
                const __m256 dmin = repack_b32::scales_256(b.dmin);
                for (int e = 0; e < 1 + halves; ++e) {
                    _mm256_storeu_ps(g.mins[e][sub%N_GROUP] + 8*half, times(dmin, found.mins[(1 + halves)*sub + e]));
                }
            }
        }
    }
};

template <> struct weights<repack_k::block_q2_kx8> : weights_k<repack_k::block_q2_kx8> {};
template <> struct weights<repack_k::block_q3_kx8> : weights_k<repack_k::block_q3_kx8> {};
template <> struct weights<repack_k::block_q4_kx8> : weights_k<repack_k::block_q4_kx8> {};
template <> struct weights<repack_k::block_q5_kx8> : weights_k<repack_k::block_q5_kx8> {};
template <> struct weights<repack_k::block_q6_kx8> : weights_k<repack_k::block_q6_kx8> {};
template <> struct weights<repack_iq4xs::block_iq4_xsx8> : weights_k<repack_iq4xs::block_iq4_xsx8> {};

// 128 bytes of four rows, 8 of each in turn, to 32 bytes of each
static inline void pack_a(int8_t * out, const int8_t * qs) {
    const __m512i first  = _mm512_loadu_si512(qs);
    const __m512i second = _mm512_loadu_si512(qs + 64);
    _mm512_storeu_si512(out,      _mm512_permutex2var_epi64(first, _mm512_setr_epi64(0, 4,  8, 12, 1, 5,  9, 13), second));
    _mm512_storeu_si512(out + 64, _mm512_permutex2var_epi64(first, _mm512_setr_epi64(2, 6, 10, 14, 3, 7, 11, 15), second));
}

// Block i of rows [row, row + 4).

template <typename type> static inline void pack_a(group_a * out, int row, const block_q8_0x4 & a, int64_t i) {
    group_a & g = out[i/N_GROUP];
    pack_a(g.qs[i%N_GROUP][row], a.qs);
    alignas(16) float   d[4];
    alignas(32) int32_t sums[8]; // two of each row
    _mm_store_ps(d, _mm_cvtph_ps(_mm_loadl_epi64((const __m128i *) a.d)));
    _mm256_store_si256((__m256i *) sums, repack_b32::sums_of(a, 1));
    for (int r = 0; r < 4; ++r) {
        g.d     [row + r][i%N_GROUP] = d[r];
        g.starts[0][row + r][i%N_GROUP] = -type::bias*(sums[2*r] + sums[2*r + 1]);
    }
}

template <typename type> static inline void pack_a(group_a * out, int row, const block_q8_Kx4 & a, int64_t i) {
    for (int sub = 0; sub < type::n_sub; ++sub) {
        group_a & g = out[(type::n_sub*i + sub)/N_GROUP];
        pack_a(g.qs[sub%N_GROUP][row], a.qs + 4*N_BLOCK*sub);
        for (int r = 0; r < 4; ++r) {
            const int16_t * sums = a.bsums + sub/2*16 + 4*r + sub%2*2;
            g.d   [row + r][sub%N_GROUP] = a.d[r];
            g.sums[0][row + r][sub%N_GROUP] = type::halves ? sums[0] : sums[0] + sums[1];
            g.sums[1][row + r][sub%N_GROUP] = sums[1];
            g.starts[0][row + r][sub%N_GROUP] = -type::bias*(type::halves ? sums[0] : sums[0] + sums[1]);
            g.starts[1][row + r][sub%N_GROUP] = -type::bias*sums[1];
        }
    }
}

// 8 columns each, 8 bytes of a column in turn, to 16 columns, four bytes in turn
static inline void pack_b(uint8_t (* out)[N_COLS][4], const __m512i first[4], const __m512i second[4]) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd  = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    for (int k = 0; k < 4; ++k) {
        _mm512_store_si512(out[2*k],     _mm512_permutex2var_epi32(first[k], even, second[k]));
        _mm512_store_si512(out[2*k + 1], _mm512_permutex2var_epi32(first[k], odd,  second[k]));
    }
}

// Block i of 16 columns, the second 8 of which lie nb blocks behind. Signed unless `biased`.
template <typename block_tx8, bool biased>
static inline void pack_b(group_b * out, const block_tx8 * b, int64_t nb, __m512i lut, int64_t i) {
    using type = weights<block_tx8>;
    for (int half = 0; half < 2; ++half) {
        type::scales(out, b[half*nb + i], half, i);
    }
    repack_k::for_each_of(std::make_integer_sequence<int, type::n_sub>(), [&](auto n) {
        constexpr int sub = decltype(n)::value;
        __m512i w[2][4];
        for (int half = 0; half < 2; ++half) {
            type::template decode<sub>(b[half*nb + i], lut, w[half]);
            for (auto & v : w[half]) {
                v = biased ? v : _mm512_sub_epi8(v, _mm512_set1_epi8((char) type::bias));
            }
        }
        const int64_t block = type::n_sub*i + sub;
        pack_b(out[block/N_GROUP].qs[block%N_GROUP], w[0], w[1]);
    });
}

// Sums of products of block i of a group are added up as floats: with the scale of both or, where the activations of all
// blocks have the same scale, with that of the weights at first. `first` and `second` are those of halves, or add up to
// those of the block. `part` is what the blocks of the group gave so far.
template <typename type>
static inline void add(float * acc, float * part, __m512i first, __m512i second, const group_a & a, int r, const group_b & b, int i) {
    const __m512 sum   = _mm512_cvtepi32_ps(type::halves ? first : _mm512_add_epi32(first, second));
    const __m512 scale = _mm512_load_ps(b.d[i]);
    if constexpr (type::own_scale) {
        _mm512_store_ps(acc, _mm512_fmadd_ps(sum, _mm512_mul_ps(scale, _mm512_set1_ps(a.d[r][i])), _mm512_load_ps(acc)));
    } else {
        __m512 all = i == 0 ? _mm512_mul_ps(sum, scale) : _mm512_fmadd_ps(sum, scale, _mm512_load_ps(part));
        if constexpr (type::mins) {
            for (int e = 0; e < 1 + type::halves; ++e) {
                all = _mm512_fnmadd_ps(_mm512_load_ps(b.mins[e][i]), _mm512_set1_ps(a.sums[e][r][i]), all);
            }
        }
        if constexpr (type::halves) {
            all = _mm512_fmadd_ps(_mm512_cvtepi32_ps(second), _mm512_load_ps(b.halves[i]), all);
        }
        if (i < N_GROUP - 1) {
            _mm512_store_ps(part, all);
        } else {
            _mm512_store_ps(acc, _mm512_fmadd_ps(all, _mm512_set1_ps(a.d[r][i]), _mm512_load_ps(acc)));
        }
    }
}

static inline void store(float * s, size_t bs, int n_rows, int n, const float (* acc)[N_ROWS][N_COLS]) {
    for (int r = 0; r < n_rows; ++r) {
        for (int x = 0; x < n; ++x) {
            _mm512_storeu_ps(s + r*bs + N_COLS*x, _mm512_load_ps(acc[x][r]));
        }
    }
}

// Up to 16 rows, 16*B columns; `s` is where the results begin, `bs` floats apart.
template <typename type, int B>
static inline void multiply(const group_a * a, const group_b * b, int64_t n_groups, float * s, size_t bs, int n_rows) {
    alignas(64) float acc [B][N_ROWS][N_COLS] = {};
    alignas(64) float part[B][N_ROWS][N_COLS];
    for (int64_t g = 0; g < n_groups; ++g) {
        for (int i = 0; i < N_GROUP; ++i) {
            __m512i w[B][N_BLOCK/4];
            for (int x = 0; x < B; ++x) {
                for (int k = 0; k < N_BLOCK/4; ++k) {
                    w[x][k] = _mm512_load_si512(b[x*n_groups + g].qs[i][k]);
                }
            }
            for (int r = 0; r < n_rows; ++r) {
                __m512i sums[2][B];
                for (int x = 0; x < B; ++x) {
                    sums[0][x] = _mm512_set1_epi32(a[g].starts[0][r][i]);
                    sums[1][x] = type::halves ? _mm512_set1_epi32(a[g].starts[1][r][i]) : _mm512_setzero_si512();
                }
                for (int k = 0; k < N_BLOCK/4; ++k) {
                    int32_t bytes;
                    memcpy(&bytes, a[g].qs[i][r] + 4*k, sizeof(bytes));
                    for (int x = 0; x < B; ++x) {
                        __m512i & sum = sums[type::halves ? k/4 : k%2][x];
                        sum = _mm512_dpbusd_epi32(sum, w[x][k], _mm512_set1_epi32(bytes));
                    }
                }
                for (int x = 0; x < B; ++x) {
                    add<type>(acc[x][r], part[x][r], sums[0][x], sums[1][x], a[g], r, b[x*n_groups + g], i);
                }
            }
        }
    }
    store(s, bs, n_rows, B, acc);
}

#if defined(REPACK_AMX)
constexpr int MIN_ROWS_TILES = 12; // instead of MIN_ROWS

static inline bool tiles_usable() {
    static const bool allowed = ggml_backend_amx_buffer_type() != nullptr; // asks the kernel
    return allowed;
}

// The same for 16*A rows, the last 16 of which may be incomplete. Tiles 0 and 1 hold weights, which are signed, 2 and 3
// activations, 4 to 7 sums.
template <typename type, int A, int B>
static inline void multiply_tiles(const group_a * a, const group_b * b, int64_t n_groups, float * s, size_t bs, int n_rows) {
    alignas(64) int32_t sums[A][B][N_GROUP][N_ROWS][N_COLS];
    alignas(64) float   acc [A][B][N_ROWS][N_COLS] = {};
    alignas(64) float   part[N_COLS];
    constexpr int stride = N_COLS*sizeof(int32_t);
    for (int64_t g = 0; g < n_groups; ++g) {
        for (int i = 0; i < N_GROUP; ++i) {
            _tile_loadd(0, b[g].qs[i], stride);
            _tile_loadd(2, a[g].qs[i], N_BLOCK);
            _tile_zero(4);
            _tile_dpbssd(4, 2, 0);
            _tile_stored(4, sums[0][0][i], stride);
            if constexpr (B == 2) {
                _tile_loadd(1, b[n_groups + g].qs[i], stride);
                _tile_zero(5);
                _tile_dpbssd(5, 2, 1);
                _tile_stored(5, sums[0][B - 1][i], stride);
            }
            if constexpr (A == 2) {
                _tile_loadd(3, a[n_groups + g].qs[i], N_BLOCK);
                _tile_zero(6);
                _tile_dpbssd(6, 3, 0);
                _tile_stored(6, sums[A - 1][0][i], stride);
            }
            if constexpr (A == 2 && B == 2) {
                _tile_zero(7);
                _tile_dpbssd(7, 3, 1);
                _tile_stored(7, sums[A - 1][B - 1][i], stride);
            }
        }
        for (int y = 0; y < A; ++y) {
            for (int x = 0; x < B; ++x) {
                for (int r = 0; r < std::min(n_rows - N_ROWS*y, N_ROWS); ++r) {
                    for (int i = 0; i < N_GROUP; ++i) {
                        add<type>(acc[y][x][r], part, _mm512_load_si512(sums[y][x][i][r]), _mm512_setzero_si512(), a[y*n_groups + g], r, b[x*n_groups + g], i);
                    }
                }
            }
        }
    }
    for (int y = 0; y < A; ++y) {
        store(s + N_ROWS*y*bs, bs, std::min(n_rows - N_ROWS*y, N_ROWS), B, acc[y]);
    }
}
#endif

// n times n_groups groups, a thread's own, until it asks again. Blocks that the last group of each lacks are zero.
template <typename group> static group * scratch(int n, int64_t n_groups, int64_t n_blocks) {
    static_assert(sizeof(group) % 64 == 0, "elements would not stay aligned");
    static thread_local std::vector<uint8_t> buffer;
    const size_t size = n*n_groups*sizeof(group) + 64;
    if (buffer.size() < size) {
        buffer.resize(size);
    }
    auto * ret = (group *) (((uintptr_t) buffer.data() + 63) & ~(uintptr_t) 63);
    for (int i = 0; n_blocks % N_GROUP != 0 && i < n; ++i) {
        memset((void *) (ret + (i + 1)*n_groups - 1), 0, sizeof(group));
    }
    return ret;
}

template <typename block_tx8, bool tiles>
static void gemm_with(int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc, __m128i values) {
    using type    = weights<block_tx8>;
    using block_a = typename type::block_a;
    const int64_t nb       = n / (type::n_sub*N_BLOCK);
    const int64_t n_blocks = n/N_BLOCK;
    const int64_t n_groups = (n_blocks + N_GROUP - 1)/N_GROUP;
    const __m512i lut      = type::lut(values);
    const std::integral_constant<int, 1> one;
    const std::integral_constant<int, 2> two;

    for (int first = 0; first < nr; first += MAX_ROWS) {
        const int n_rows = std::min(nr - first, MAX_ROWS);

        group_a * a = scratch<group_a>((n_rows + N_ROWS - 1)/N_ROWS, n_groups, n_blocks);
        for (int row = 0; row < n_rows; row += 4) {
            const auto * in = (const block_a *) vy + (first + row)/4*nb;
            for (int64_t i = 0; i < nb; ++i) {
                pack_a<type>(a + row/N_ROWS*n_groups, row%N_ROWS, in[i], i);
            }
        }
        group_b * b = scratch<group_b>(2, n_groups, n_blocks);
        for (int x = 0; x < nc; x += 2*N_COLS) {
            const int n_cols = std::min(nc - x, 2*N_COLS);
            for (int c = 0; c < n_cols; c += N_COLS) {
                for (int64_t i = 0; i < nb; ++i) {
                    pack_b<block_tx8, !tiles>(b + c/N_COLS*n_groups, (const block_tx8 *) vx + (x + c)/8*nb, nb, lut, i);
                }
            }
            const auto rows = [&](int y, auto B) {
                const group_a * from = a + y/N_ROWS*n_groups;
                float         * to   = s + (first + y)*bs + x;
                const int       left = n_rows - y;
                constexpr int   n_b  = decltype(B)::value;
#if defined(REPACK_AMX)
                if constexpr (tiles) {
                    left > N_ROWS ? multiply_tiles<type, 2, n_b>(from, b, n_groups, to, bs, std::min(left, 2*N_ROWS))
                                  : multiply_tiles<type, 1, n_b>(from, b, n_groups, to, bs, left);
                    return;
                }
#endif
                multiply<type, n_b>(from, b, n_groups, to, bs, std::min(left, N_ROWS));
            };
            std::atomic_signal_fence(std::memory_order_seq_cst); // GCC does not know that loading tiles reads memory
            for (int y = 0; y < n_rows; y += tiles ? 2*N_ROWS : N_ROWS) {
                n_cols > N_COLS ? rows(y, two) : rows(y, one);
            }
        }
    }
}

// The parameters are those of repack_b32::gemm, and nc is a multiple of 16.
template <typename block_tx8>
static void gemm(int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc, __m128i values) {
#if defined(REPACK_AMX)
    if constexpr (!weights<block_tx8>::halves) { // a tile would have to span 16 weights
        if (nr >= MIN_ROWS_TILES && tiles_usable()) {
            ggml_amx_configure_tiles();
            gemm_with<block_tx8, true>(n, s, bs, vx, vy, nr, nc, values);
            return;
        }
    }
#endif
    gemm_with<block_tx8, false>(n, s, bs, vx, vy, nr, nc, values);
}

} // namespace repack_panels

#endif

#if defined(REPACK_B32)

namespace repack_x86 {

template <typename block_tx8> constexpr bool of_32 = repack_b32::bias<block_tx8> != 0;

template <typename block_tx8>
static void gemm_few(int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc, __m128i values) {
    if constexpr (of_32<block_tx8>) {
        repack_b32::gemm<block_tx8>(n, s, bs, vx, vy, nr, nc, values);
    } else {
        repack_k::gemm<block_tx8>(n, s, bs, vx, vy, nr, nc);
    }
}

// The parameters are those of repack_b32::gemm.
template <typename block_tx8>
static void gemm(int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc, __m128i values = _mm_setzero_si128()) {
#if defined(REPACK_PANELS)
    if (nr >= repack_panels::MIN_ROWS && nc >= repack_panels::N_COLS) {
        const int done = nc/repack_panels::N_COLS*repack_panels::N_COLS;
        const int nb   = n/(repack_panels::weights<block_tx8>::n_sub*repack_panels::N_BLOCK);
        repack_panels::gemm<block_tx8>(n, s, bs, vx, vy, nr, done, values);
        s  += done;
        vx  = (const block_tx8 *) vx + done/8*nb;
        nc -= done;
    }
#endif
    gemm_few<block_tx8>(n, s, bs, vx, vy, nr, nc, values);
}

} // namespace repack_x86

#endif
