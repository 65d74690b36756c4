// The products of repacked weights against sums in double precision, over types, shapes and numbers of rows. Activations
// are whole numbers times a power of two with the largest in each block, so that quantizing them loses nothing: what
// differs is rounding in F32 alone.

#include "ggml.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

static const double MAX_NMSE = 1e-12;

static ggml_backend_buffer_type_t repack_buffer_type(ggml_backend_dev_t dev) {
    auto * get = (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(
        ggml_backend_dev_backend_reg(dev), "ggml_backend_dev_get_extra_bufts");
    for (auto * bufts = get(dev); *bufts; ++bufts) {
        if (std::string(ggml_backend_buft_name(*bufts)) == "CPU_REPACK") {
            return *bufts;
        }
    }
    return nullptr;
}

struct shape {
    int64_t n_in, n_out, n_expert, n_used, n_tokens; // n_expert 0: one matrix
    bool    shared;                                  // all experts of a token get the same activations
};

// whether it was tried; `ok` becomes false where it fails
static bool test(ggml_backend_t backend, ggml_backend_buffer_type_t buft, ggml_type type, const shape & s, bool & ok) {
    std::mt19937 rng(s.n_in + 31*s.n_out + 977*s.n_tokens + type);
    const int64_t n_mats = std::max<int64_t>(s.n_expert, 1);

    ggml_context * weights = ggml_init({ ggml_tensor_overhead(), nullptr, true });
    ggml_tensor  * w       = s.n_expert ? ggml_new_tensor_3d(weights, type, s.n_in, s.n_out, s.n_expert)
                                        : ggml_new_tensor_2d(weights, type, s.n_in, s.n_out);
    ggml_context * ctx = ggml_init({ ggml_tensor_overhead()*8 + ggml_graph_overhead(), nullptr, true });
    const int64_t n_rows = s.n_expert && !s.shared ? s.n_used : 1; // of activations a token
    ggml_tensor * x   = s.n_expert ? ggml_new_tensor_3d(ctx, GGML_TYPE_F32, s.n_in, n_rows, s.n_tokens)
                                   : ggml_new_tensor_2d(ctx, GGML_TYPE_F32, s.n_in, s.n_tokens);
    ggml_tensor * ids = s.n_expert ? ggml_new_tensor_2d(ctx, GGML_TYPE_I32, s.n_used, s.n_tokens) : nullptr;
    ggml_tensor * y   = s.n_expert ? ggml_mul_mat_id(ctx, w, x, ids) : ggml_mul_mat(ctx, w, x);

    ggml_backend_buffer_t buf_w = ggml_backend_alloc_ctx_tensors_from_buft(weights, buft);
    ggml_backend_buffer_t buf   = ggml_backend_alloc_ctx_tensors(ctx, backend);
    const bool tried = w->extra != nullptr && ggml_backend_supports_op(backend, y);
    if (tried) {
        std::normal_distribution<float> normal;
        std::vector<float> values(n_mats*s.n_out*s.n_in);
        for (auto & v : values) {
            v = normal(rng);
        }
        std::vector<uint8_t> quants(ggml_nbytes(w));
        ggml_quantize_chunk(type, values.data(), quants.data(), 0, n_mats*s.n_out, s.n_in, nullptr);
        ggml_get_type_traits(type)->to_float(quants.data(), values.data(), values.size());
        ggml_backend_tensor_set(w, quants.data(), 0, quants.size());

        std::vector<float> in(ggml_nelements(x));
        const size_t block = std::max<size_t>(ggml_blck_size(type), 32);
        for (size_t i = 0; i < in.size(); ++i) {
            const size_t n     = i/block;
            const float  scale = std::ldexp(1.0f, (int) (n % 9) - 4);
            in[i] = scale*(i % block == n % block ? (n % 2 ? 127 : -127) : (int) (rng() % 255) - 127);
        }
        ggml_backend_tensor_set(x, in.data(), 0, ggml_nbytes(x));

        // few experts, so that some have many rows and others none
        std::vector<int32_t> chosen(s.n_used*s.n_tokens);
        for (int64_t t = 0; t < s.n_tokens && s.n_expert; ++t) {
            for (int64_t u = 0; u < s.n_used; ++u) {
                chosen[t*s.n_used + u] = (int32_t) ((u*u + (rng() % 3)*s.n_used + u) % s.n_expert);
            }
        }
        if (ids) {
            ggml_backend_tensor_set(ids, chosen.data(), 0, ggml_nbytes(ids));
        }

        ggml_cgraph * graph = ggml_new_graph(ctx);
        ggml_build_forward_expand(graph, y);
        ggml_backend_graph_compute(backend, graph);
        std::vector<float> out(ggml_nelements(y));
        ggml_backend_tensor_get(y, out.data(), 0, ggml_nbytes(y));

        double error = 0, total = 0;
        const int64_t n_used = s.n_expert ? s.n_used : 1;
        for (int64_t t = 0; t < s.n_tokens; ++t) {
            for (int64_t u = 0; u < n_used; ++u) {
                const float * matrix = values.data() + (s.n_expert ? chosen[t*n_used + u] : 0)*s.n_out*s.n_in;
                const float * row    = in.data() + (t*n_rows + u % n_rows)*s.n_in;
                for (int64_t o = 0; o < s.n_out; ++o) {
                    double sum = 0;
                    for (int64_t i = 0; i < s.n_in; ++i) {
                        sum += (double) matrix[o*s.n_in + i]*row[i];
                    }
                    const double d = out[(t*n_used + u)*s.n_out + o] - sum;
                    error += d*d;
                    total += sum*sum;
                }
            }
        }
        const bool good = error <= MAX_NMSE*total; // false for NaN
        ok = ok && good;
        if (!good) {
            printf("%s %dx%d, %d experts, %d tokens: NMSE %g\n", ggml_type_name(type), (int) s.n_out, (int) s.n_in,
                   (int) s.n_expert, (int) s.n_tokens, error/total);
        }
    }
    ggml_backend_buffer_free(buf);
    ggml_backend_buffer_free(buf_w);
    ggml_free(ctx);
    ggml_free(weights);
    return tried;
}

extern "C" void quantize_row_q8_K_ref(const float * x, void * y, int64_t k); // of ggml-quants.h

// activations are quantized as the reference does it, to the bit
static bool test_q8_K() {
    std::mt19937 rng(1);
    std::normal_distribution<float> normal;
    const int64_t n = 256*64;
    std::vector<float> x(n);
    for (int64_t i = 0; i < n; ++i) {
        const int64_t block = i/256;
        x[i] = block % 7 == 3 ? 0 : std::ldexp(block % 3 ? normal(rng) : (float) (rng() % 21) - 10, (int) (block % 40) - 20);
    }
    std::vector<uint8_t> want(ggml_row_size(GGML_TYPE_Q8_K, n)), got(want);
    quantize_row_q8_K_ref(x.data(), want.data(), n);
    ggml_get_type_traits_cpu(GGML_TYPE_Q8_K)->from_float(x.data(), got.data(), n);
    return want == got;
}

int main() {
    ggml_backend_load_all();
    ggml_backend_dev_t dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    ggml_backend_t backend = ggml_backend_dev_init(dev, nullptr);
    ggml_backend_buffer_type_t buft = repack_buffer_type(dev);
    if (!buft) {
        printf("this build repacks nothing\n");
        return 0;
    }
    bool ok = test_q8_K();
    if (!ok) {
        printf("Q8_K: other bytes than the reference's\n");
    }
    for (const int n_threads : { 1, 3 }) {
        ggml_backend_cpu_set_n_threads(backend, n_threads);
        for (const ggml_type type : { GGML_TYPE_Q4_0, GGML_TYPE_Q5_0, GGML_TYPE_Q8_0, GGML_TYPE_IQ4_NL, GGML_TYPE_MXFP4, GGML_TYPE_Q2_K, GGML_TYPE_Q3_K, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K, GGML_TYPE_IQ4_XS }) {
            int n = 0;
            for (const int64_t n_out : { 8, 24, 1408 }) {
                for (const int64_t n_in : { 32, 256, 1408, 2048, 10944 }) {
                    if (n_out*n_in > 100000 || n_in % ggml_blck_size(type)) {
                        continue;
                    }
                    for (const int64_t n_tokens : { 1, 2, 4, 7, 29, 150 }) {
                        n += test(backend, buft, type, { n_in, n_out, 0, 0, n_tokens, true }, ok);
                        n += n_out < 1000 && test(backend, buft, type, { n_in, n_out, 9, 3, n_tokens, true  }, ok);
                        n += n_out < 1000 && test(backend, buft, type, { n_in, n_out, 9, 3, n_tokens, false }, ok);
                    }
                }
            }
            printf("%-8s %d threads: %d products\n", ggml_type_name(type), n_threads, n);
        }
    }
    ggml_backend_free(backend);
    printf("%s\n", ok ? "OK" : "FAILED");
    return ok ? 0 : 1;
}
