#pragma once

#include "llama.h"

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

extern "C" {

// How often the routers of layer il have chosen each expert since the model was loaded: a count a token, in counts,
// which has room for n_counts. `pool` is the layer that holds the experts' weights. Returns the number of experts; 0: the
// layer has none, or they are not counted. Asked for by the override ARCH.expert_counts (bool) of the model
LLAMA_API uint32_t llama_model_expert_counts(
        const struct llama_model * model, int32_t il, uint64_t * counts, uint32_t n_counts, int32_t * pool);

}

struct ggml_context;
struct ggml_tensor;
struct llama_model_loader;

// Counts what routers choose. A node of the graph does it, on the CPU, since ids are nowhere else once a graph has run.
class llama_expert_counts {
public:
    // null: not asked for, or layers are on a GPU, which would stop at each node. pool_layers as for llama_model_experts
    static std::shared_ptr<llama_expert_counts> load(
            const llama_model_loader & ml, const llama_model & model, const std::vector<int> & pool_layers);

    llama_expert_counts(const std::vector<int> & pool_layers, int n_expert, int n_used);

    // counts the experts in ids [n_used, n_tokens]; gives nothing. Those of a warm-up, where all are used, do not count
    ggml_tensor * count(ggml_context * ctx, ggml_tensor * ids, int il);

    uint32_t get(int il, uint64_t * counts, uint32_t n_counts, int32_t * pool) const;

private:
    struct layer {
        int pool; // -1: no experts
        std::vector<std::atomic<uint64_t>> counts;
    };

    const int n_used;
    std::deque<layer> layers;
};
