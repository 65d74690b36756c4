// Products of weights of each type, as they lie in a file and interleaved, with some rows of activations: the best of
// the rounds. kernels N_OUT THREADS ROWS ROUNDS

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

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

template <typename F> static double seconds(F f) {
    const auto start = std::chrono::steady_clock::now();
    f();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

struct product {
    ggml_type     type;
    bool          interleaved;
    ggml_cgraph * graph;
    size_t        bytes;
    double        repack, best;
};

int main(int, char ** argv) {
    const int64_t n_in = 2048, n_out = atoll(argv[1]), n_rows = atoll(argv[3]);
    const int     n_rounds = atoi(argv[4]);
    std::mt19937 rng(0);
    std::normal_distribution<float> normal;

    ggml_backend_dev_t dev     = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    ggml_backend_t     backend = ggml_backend_dev_init(dev, nullptr);
    ggml_backend_cpu_set_n_threads(backend, atoi(argv[2]));

    std::vector<product> products;
    for (const ggml_type type : { GGML_TYPE_Q4_0, GGML_TYPE_Q5_0, GGML_TYPE_Q8_0, GGML_TYPE_IQ4_NL, GGML_TYPE_MXFP4,
                                  GGML_TYPE_Q2_K, GGML_TYPE_Q3_K, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K,
                                  GGML_TYPE_IQ4_XS }) {
        // 64 rows, again and again
        std::vector<float> values(64*n_in);
        std::generate(values.begin(), values.end(), [&] { return normal(rng); });
        std::vector<uint8_t> quants(n_out*ggml_row_size(type, n_in));
        const size_t size = ggml_quantize_chunk(type, values.data(), quants.data(), 0, 64, n_in, nullptr);
        for (size_t at = size; at < quants.size(); at += size) {
            memcpy(quants.data() + at, quants.data(), std::min(size, quants.size() - at));
        }
        for (const bool interleaved : { false, true }) {
            const auto buft = interleaved ? repack_buffer_type(dev) : ggml_backend_cpu_buffer_type();
            ggml_context * weights = ggml_init({ ggml_tensor_overhead(), nullptr, true });
            ggml_tensor  * w       = ggml_new_tensor_2d(weights, type, n_in, n_out);
            ggml_context * ctx     = ggml_init({ ggml_tensor_overhead()*8 + ggml_graph_overhead(), nullptr, true });
            ggml_tensor  * x       = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_in, n_rows);
            ggml_tensor  * y       = ggml_mul_mat(ctx, w, x);
            if (!buft || !ggml_backend_alloc_ctx_tensors_from_buft(weights, buft) || !ggml_backend_alloc_ctx_tensors(ctx, backend)) {
                continue;
            }
            if (interleaved && !w->extra) { // not on this processor
                continue;
            }
            std::vector<float> in(n_rows*n_in);
            std::generate(in.begin(), in.end(), [&] { return normal(rng); });
            ggml_backend_tensor_set(x, in.data(), 0, ggml_nbytes(x));
            const auto set = [&] { ggml_backend_tensor_set(w, quants.data(), 0, quants.size()); };
            set(); // gets the memory
            const double repack = seconds(set);
            ggml_cgraph * graph = ggml_new_graph(ctx);
            ggml_build_forward_expand(graph, y);
            products.push_back({ type, interleaved, graph, quants.size(), repack, 1e9 });
        }
    }
    for (int i = 0; i < n_rounds; ++i) {
        for (auto & p : products) {
            p.best = std::min(p.best, seconds([&] { ggml_backend_graph_compute(backend, p.graph); }));
        }
    }
    for (const auto & p : products) {
        printf("%s %d %g %g %g\n", ggml_type_name(p.type), p.interleaved, p.bytes/p.best/1e9,
               (double) n_in*n_out*n_rows/p.best/1e9, p.bytes/p.repack/1e9);
    }
}
