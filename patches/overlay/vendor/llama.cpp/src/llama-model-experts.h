#pragma once

#include "llama-expert-store.h"
#include "llama-graph.h"

#include <memory>
#include <vector>

struct llama_model;
struct llama_model_loader;

// The experts of a model that stay in its file (llama-expert-store.h): the store, and what graphs need to use it.
//
// Asked for by key-value overrides of the model:
//  - ARCH.expert_cache          int: bytes of memory for experts
//  - ARCH.expert_cache.threads  int: threads that read them
//  - ARCH.expert_cache.direct   bool: read past the page cache; true by default
//  - ARCH.expert_cache.margin   float: routers prefer an expert in memory to one whose score is higher by less than this.
//                               0 by default, as the text is another then. After arXiv 2412.00099
//
// An architecture adopts it like this:
//  - load_arch_tensors() calls load() with the layer whose tensors hold the experts of each layer, -1 for none, and
//    keeps the result in llama_model::experts. If there is one, it does not create the experts' tensors.
//  - The graph makes an llm_graph_input_experts, calls announce() as soon as a layer's experts are chosen, if that is
//    before their turn, and replaces their ids by acquire() for build_moe_ffn. If it has a margin, prefer() joins the
//    bias by which experts are selected.
struct llama_model_experts {
    llama_expert_store store;
    std::vector<int>   steps; // of the store, by layer
    float              margin;

    // null: not asked for. Gives the layers of `model` their tensors. Throws std::runtime_error
    static std::shared_ptr<llama_model_experts> load(
            llama_model_loader & ml, llama_model & model, const std::vector<int> & pool_layers, bool use_extra_bufts);

    // elements in the rows of the down projections of `layer`: n_ff, or more where the file has zeros after each row,
    // so that blocks of K- and IQ-quants fit. What enters is filled up likewise (build_moe_ffn)
    static int64_t row_size(const llama_model_loader & ml, llm_arch arch, int layer, int64_t n_ff);

    llama_model_experts(const llama_expert_store::params & params, std::vector<int> steps, float margin) :
        store(params), steps(std::move(steps)), margin(margin) {}
};

// the part of a graph that talks to the store
class llm_graph_input_experts : public llm_graph_input_i {
public:
    // throws std::runtime_error: so many tokens can use more experts at once than the store holds
    llm_graph_input_experts(const llama_model & model, int64_t n_tokens);

    // prompts, and tokens of several sequences, are routed as if all experts were in memory: together they use most
    bool has_margin() const { return experts.margin > 0.0f && n_tokens == 1; }

    // [n_expert], the margin for experts in memory and 0 for the others, once `after` is computed
    ggml_tensor * prefer(ggml_context * ctx, ggml_tensor * after, int il);

    // starts reading the experts in ids; gives nothing
    ggml_tensor * announce(ggml_context * ctx, ggml_tensor * ids, int il);

    // the slots of the experts in ids, once these are there. cur, which goes into the experts, orders this after the
    // layers before
    ggml_tensor * acquire(ggml_context * ctx, ggml_tensor * ids, ggml_tensor * cur, int il);

    void set_input(const llama_ubatch * ubatch) override;
    bool can_reuse(const llm_graph_params & params) override;
    bool done() override;

private:
    struct op {
        const llama_model_experts * experts;
        llama_expert_store::run   * run;
        int step;
    };

    const llama_model_experts & experts;
    const int64_t n_tokens;

    llama_expert_store::run run;
    std::vector<std::unique_ptr<op>> ops;

    ggml_tensor * build(ggml_context * ctx, ggml_type type, int64_t ne0, int64_t ne1, std::vector<ggml_tensor *> args, int n_tasks, int il, ggml_custom_op_t fun);
};
